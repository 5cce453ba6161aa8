"""What a run looks like: pictures, and one page that holds them."""

from ecul.report.build import report

__all__ = ["report"]
