"""What a run looks like: pictures, and one page that holds them."""

from ecul.report.page import report

__all__ = ["report"]
