"""One HTML page that holds its pictures: nothing beside it, nothing from a network."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top }
th { color: #666; font-weight: 600 }
.sub { color: #666 }
.columns { columns: 3 16rem }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence or two, a PNG, a table whose rows begin with a head."""

    title: str
    text: str = ""
    picture: Path | None = None
    rows: Sequence = ()


def page(title, subtitle, sections):
    """The page's text, with all its pictures inside."""
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="sub">{html.escape(subtitle)}</p>']
    for section in sections:
        name = html.escape(section.title)
        parts.append(f"<h2>{name}</h2><p>{html.escape(section.text)}</p>")
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
        if section.rows:
            columns = ' class="columns"' if len(section.rows) > 10 else ""
            parts.append(f"<div{columns}>{_table(section.rows)}</div>")
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def plain_rows(values):
    """A dict as rows of a table, floats with four digits."""
    return [(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in values.items()]


def _table(rows):
    lines = []
    for head, *rest in rows:
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in rest)
        lines.append(f"<tr><th>{html.escape(str(head))}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
