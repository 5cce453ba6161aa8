"""One HTML page that holds its pictures: nothing beside it, nothing from a network."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top }
th { color: #666; font-weight: 600; white-space: nowrap }
.sub { color: #666 }
.columns { columns: 3 16rem }
.wide { overflow-x: auto }
@media (max-width: 40rem) { .wide img { max-width: 40rem } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence or two, a PNG, a table whose rows begin with a head."""

    title: str
    text: str = ""
    picture: Path | None = None
    rows: Sequence[Sequence[Any]] = ()

    def html(self) -> str:
        """The section with its picture inside."""
        parts = [f"<h2>{html.escape(self.title)}</h2>"]
        if self.text:
            parts.append(f"<p>{html.escape(self.text)}</p>")
        if self.picture is not None:
            data = base64.b64encode(self.picture.read_bytes()).decode()
            image = f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,{data}">'
            parts.append(f'<div class="wide">{image}</div>')
        lines = []
        for row in self.rows:
            head, *rest = (
                html.escape(f"{value:.4g}" if isinstance(value, float) else str(value)) for value in row
            )
            lines.append(f"<tr><th>{head}</th>{''.join(f'<td>{value}</td>' for value in rest)}</tr>")
        if lines:
            kind = "columns" if len(lines) > 10 else "wide"
            parts.append(f'<div class="{kind}"><table>' + "".join(lines) + "</table></div>")
        return "\n".join(parts)


def render_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page's text, with all its pictures inside."""
    title, subtitle = html.escape(title), html.escape(subtitle)
    body = "\n".join([f'<h1>{title}</h1>\n<p class="sub">{subtitle}</p>', *(s.html() for s in sections)])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
