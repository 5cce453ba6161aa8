"""Names for people: hints for misspelt ones, long lists shortened."""

import difflib
from collections.abc import Iterable


def did_you_mean(value: object, names: Iterable[object]) -> str:
    """A hint for an error message: the name most like this value, or nothing."""
    known = [str(n) for n in names]
    longer = [n for n in known if str(value) and n.startswith(str(value))]
    close = longer or difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shorten(names: Iterable[str], most: int = 10, between: str = ", ") -> str:
    """The first `most` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return between.join(names[:most]) + more
