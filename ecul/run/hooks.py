"""Functions that are called after each epoch, with a row of the log, or with a row and the model."""

import inspect
import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from ecul.common.files import write_file
from ecul.common.names import clipped
from ecul.common.tables import render_table

log = logging.getLogger("ecul")
Hook = Callable[[dict, nn.Module], object]


def as_hook(on_epoch: Callable[..., object] | None) -> Hook:
    """on_epoch as a function of a row and the model. Errors: TypeError unless it takes a row, or both."""
    if on_epoch is None:
        return lambda row, model: None
    wanted = f"on_epoch must be a function of a row, or of a row and the model, got {on_epoch!r}"
    if not callable(on_epoch):
        raise TypeError(wanted)
    try:
        signature = inspect.signature(on_epoch)
    except ValueError:  # a built-in function that does not tell
        return lambda row, model: on_epoch(row)
    for given in ((None,), (None, None)):
        with suppress(TypeError):
            signature.bind(*given)
            return lambda *both: on_epoch(*both[: len(given)])
    raise TypeError(wanted)


def call_hook(hook: Hook, row: dict, model: nn.Module) -> tuple[dict[str, float], bool]:
    """Call the hook with a copy of the row: the figures that it added, and whether it raised StopIteration.

    A figure is a finite number, of Python, NumPy or torch; a warning names every other entry.
    """
    given, stop, figures = dict(row), False, {}
    try:
        hook(given, model)
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


def csv_logger(directory: str | Path) -> Callable[[dict], None]:
    """Write `log.csv` beside the run's `log.jsonl`: a row an epoch, a column for each name in any of them."""
    directory = Path(directory)

    def on_epoch(row: dict) -> None:
        rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        write_file(directory / "log.csv", render_table("csv", "", [], rows).encode())

    return on_epoch


def tensorboard_logger(directory: str | Path) -> Callable[[dict], None]:
    """Write each number of a row as a scalar into `tensorboard/` of the run; epochs count from 1.

    Errors: ImportError that says what to install.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError("TensorBoard's files need its package: pip install tensorboard") from e
    writers: list[Any] = []  # made with the first epoch: not for a run that fails before

    def on_epoch(row: dict) -> None:
        if not writers:
            writers.append(SummaryWriter(str(Path(directory) / "tensorboard")))
        for name, value in row.items():
            writers[0].add_scalar(name.replace("_", "/", 1), value, row["epoch"] + 1)
        writers[0].flush()

    return on_epoch


LOGGERS = {"csv": csv_logger, "tensorboard": tensorboard_logger}
