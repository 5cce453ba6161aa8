"""What people read: log lines beside progress bars, and lists of names that stay short."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ecul.common.names import printable


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
