"""Log lines for people, and progress: bars at a terminal, a line a minute elsewhere."""

import io
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


class _Stderr(io.TextIOBase):
    """Standard error as it is now. It may be full or closed: then the text is lost, and the work goes on."""

    def write(self, text: str) -> int:
        with suppress(AttributeError, OSError, ValueError):  # it is None, full, or closed
            sys.stderr.write(text)
            sys.stderr.flush()
        return len(text)


class _Lines(io.TextIOBase):
    """Takes the text of a bar and logs it."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


class _BesideBars(logging.Handler):
    """Lines on stderr that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record), "\n"), file=_STDERR)


_STDERR = _Stderr()  # tqdm knows by this one object which bars share the stream


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
    options: dict[str, Any] = {"total": total, "desc": what, "leave": False}
    options |= {"disable": not (shown and (terminal or lines))}
    if terminal:
        return tqdm(items, unit=unit, delay=2, file=_STDERR, **options)
    options |= {"bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left"}
    options |= {"mininterval": MINUTE, "maxinterval": MINUTE, "miniters": 1, "delay": MINUTE}
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
    first = os.environ.get("RANK", "0") == "0"
    log.setLevel(level or (logging.INFO if first else logging.ERROR))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
