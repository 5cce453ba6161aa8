"""Tables of results as people paste them: plain text, Markdown, CSV, LaTeX, JSON."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

FORMATS = ("text", "markdown", "csv", "latex", "json")


def render_table(form: str, head: str, lines: Sequence[Sequence[str]], rows: Sequence[dict[str, Any]]) -> str:
    """One table in a form of `FORMATS`.

    head: a line about all of it. lines: the cells as people read them, the headings first. rows: the same
    with every figure unrounded, a dict a row: what CSV and JSON hold.
    """
    if form == "json":
        return json.dumps({"rows": list(rows)}, indent=2)
    if form == "csv":
        return _csv(rows)
    if form == "markdown":
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        cells.insert(1, ["---"] * len(lines[0]))
        return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in cells)])
    if form == "latex":
        return _latex(head, lines)
    if form != "text":
        raise ValueError(f"form: expected one of {', '.join(FORMATS)}, not {form!r}")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join([head, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)])


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """A column for every name that a row has; empty where another has not."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*dict.fromkeys(k for row in rows for k in row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _latex(head: str, lines: Sequence[Sequence[str]]) -> str:
    """A tabular of booktabs under its head as a comment."""
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    letters = str.maketrans(special | {"^": r"\textasciicircum{}", "±": r"$\pm$"})
    names, *body = [" & ".join(cell.translate(letters) for cell in line) + r" \\" for line in lines]
    begin = [f"% {head}", rf"\begin{{tabular}}{{{'l' * len(lines[0])}}}", r"\toprule", names, r"\midrule"]
    return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}"])
