"""What people read: log lines, and bars beside them or lines in their place."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ecul.common.names import printable

MINUTE = 60.0  # seconds between two lines about a step, where there is no terminal

log = logging.getLogger("ecul")


def progress(
    total: int, what: str, unit: str = "it", shown: bool = True, items: Iterable | None = None
) -> tqdm:
    """A bar with the time left of a step that takes long; without a terminal a line of the log a minute.

    what: the step's name. shown=False: nothing at all. items: what to iterate over, where it is not updated
    by hand.
    """
    options: dict[str, Any] = {"total": total, "desc": what, "disable": not shown, "leave": False}
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, unit=unit, delay=2, **options)
    form = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left"
    every = {"mininterval": MINUTE, "maxinterval": MINUTE, "miniters": 1, "delay": MINUTE}
    return tqdm(items, file=_Lines(), bar_format=form, **every, **options)  # type: ignore[call-overload]


class _Lines:
    """What a bar writes, as lines of the log."""

    def write(self, text: str) -> None:
        if text := text.strip():
            log.info("%s", text)

    def flush(self) -> None:
        pass


class _BesideBars(logging.Handler):
    """Lines on stderr that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record), "\n"), file=sys.stderr)


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Log lines on stderr in here, where nobody has set up logging; of several processes the first speaks.

    `logging.getLogger("ecul").setLevel("ERROR")` makes it quiet.
    """
    log = logging.getLogger("ecul")
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
