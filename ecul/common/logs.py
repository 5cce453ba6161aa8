"""Log lines for people, and progress: bars at a terminal, a line a minute elsewhere."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from ecul.common.names import printable

MINUTE = 60.0  # seconds between two lines about a step, where there is no terminal

log = logging.getLogger("ecul")


class _Stderr:
    """Standard error as it is now. It may be full or closed: then the text is lost, and the work goes on."""

    def write(self, text: str) -> None:
        with suppress(AttributeError, OSError, ValueError):  # it is None, full, or closed
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class _Lines:
    """Takes the text of a bar and logs it."""

    def write(self, text: str) -> None:
        if text := text.strip():
            log.info("%s", text)

    def flush(self) -> None:
        pass


class _BesideBars(logging.Handler):
    """Lines on stderr that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record), "\n"), file=_STDERR)


_STDERR = _Stderr()


def progress(
    total: int,
    what: str,
    unit: str = "it",
    shown: bool = True,
    items: Iterable | None = None,
    lines: bool = True,
) -> tqdm:
    """A bar with the time left of a long step; without a terminal, a line of the log each minute.

    what: the step's name. shown=False: nothing at all. items: what to iterate over; without them, call
    `update`. lines=False: nothing without a terminal.
    """
    terminal = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
    options: dict[str, Any] = {"total": total, "desc": what, "disable": not (shown and (terminal or lines))}
    if terminal:
        return tqdm(items, unit=unit, delay=2, leave=False, file=_STDERR, **options)
    options |= {"bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left"}
    options |= {"mininterval": MINUTE, "maxinterval": MINUTE, "miniters": 1, "delay": MINUTE, "leave": False}
    return tqdm(items, file=_Lines(), **options)


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Log to stderr in this block, unless logging is set up already; of several processes the first logs.

    `logging.getLogger("ecul").setLevel("ERROR")` makes it quiet.
    """
    if log.hasHandlers():
        yield
        return
    handler, level = _BesideBars(), log.level
    log.addHandler(handler)
    if level == logging.NOTSET:
        log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
