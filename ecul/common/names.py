"""Names for people: hints for misspelt ones, short lists, and foreign text made harmless."""

import difflib
from collections.abc import Iterable


def did_you_mean(value: object, names: Iterable[object]) -> str:
    """A hint for an error message: the name most like this value, or nothing."""
    known = [str(n) for n in names]
    longer = [n for n in known if str(value) and n.startswith(str(value))]
    close = longer or difflib.get_close_matches(str(value)[:100], known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shorten(names: Iterable[str], most: int = 10, between: str = ", ") -> str:
    """The first `most` names, and the number of the others; safe to print, whoever gave the names."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return between.join(map(clipped, names[:most])) + more


def clipped(text: object, most: int = 300) -> str:
    """`printable` text of at most so many characters, and their number where there were more."""
    told = printable(text)
    return told if len(told) <= most else f"{told[:most]}... of {len(told):,} characters"


def printable(text: object, keep: str = "") -> str:
    r"""Text from files that is safe to print: control and hidden characters become escapes like `\x1b`.

    keep: characters that stay, such as "\n" in several lines. Bytes of a name that are not UTF-8 stay as
    Python's surrogates and are written as they were, except those that could steer a terminal.
    """
    return "".join(
        c if c.isprintable() or c in keep or "\udca0" <= c <= "\udcff" else repr(c)[1:-1] for c in str(text)
    )
