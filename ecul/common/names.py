"""Names for people: hints for misspelt ones, long lists shortened, foreign ones made harmless."""

import difflib
from collections.abc import Iterable


def did_you_mean(value: object, names: Iterable[object]) -> str:
    """A hint for an error message: the name most like this value, or nothing."""
    known = [str(n) for n in names]
    longer = [n for n in known if str(value) and n.startswith(str(value))]
    close = longer or difflib.get_close_matches(str(value)[:100], known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shorten(names: Iterable[str], most: int = 10, between: str = ", ") -> str:
    """The first `most` names, and how many more there are; fit for a terminal, whoever gave the names."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return between.join(map(clipped, names[:most])) + more


def clipped(text: object, most: int = 300) -> str:
    """`printable` text of at most so many characters, and how many there were."""
    told = printable(text)
    return told if len(told) <= most else f"{told[:most]}... of {len(told):,} characters"


def printable(text: object, keep: str = "") -> str:
    r"""Text from files, fit for a terminal: what would steer it or hide is shown as in `repr`, `\x1b` say.

    keep: characters that stay as they are, such as "\n" where lines are meant. Bytes of a name that are not
    UTF-8 stay too, but for those that steer, as the surrogates that Python has for them: encoded again they
    are the name's own bytes.
    """
    return "".join(
        c if c.isprintable() or c in keep or "\udca0" <= c <= "\udcff" else repr(c)[1:-1] for c in str(text)
    )
