"""The function that is called after each epoch with a row of the log."""

import inspect
import logging
import math
from collections.abc import Callable

from ecul.common.names import clipped

log = logging.getLogger("ecul")
Hook = Callable[[dict], object]


def check_hook(on_epoch: Hook | None) -> None:
    """Errors: TypeError unless on_epoch is None or a function of a row."""
    try:
        if on_epoch is not None:
            inspect.signature(on_epoch).bind({})
    except ValueError:  # a built-in function that does not tell
        pass
    except TypeError as e:
        raise TypeError(f"on_epoch must be a function of a row of the log, got {on_epoch!r}") from e


def call_hook(on_epoch: Hook | None, row: dict) -> tuple[dict[str, float], bool]:
    """Call on_epoch with a copy of the row: the figures that it added, and whether it raised StopIteration.

    A figure is a finite number, of Python, NumPy or torch; a warning names every other entry.
    """
    given, stop, figures = dict(row), False, {}
    try:
        if on_epoch is not None:
            on_epoch(given)
    except StopIteration:
        stop = True
    for name in [name for name in given if name not in row]:
        try:
            number = math.nan if isinstance(given[name], str | bytes) else float(given[name])
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if isinstance(name, str) and math.isfinite(number):
            figures[name] = number
        else:
            told = clipped(name), clipped(given[name], 60)
            log.warning("on_epoch: %s is no finite number (%s): the log leaves it out", *told)
    return figures, stop
