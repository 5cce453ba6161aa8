"""Pictures of a run and of a search, drawn without a display; matplotlib is imported on first use."""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ecul.common.files import prepare_output, write_file
from ecul.data.decode import load_pixels
from ecul.tools.search import Ranking

log = logging.getLogger("ecul")
RIGHT, WRONG, NEUTRAL, INK = "#1a9641", "#d7191c", "#9a9a9a", "#2b2b2b"
MODALITY = {"visible": "#2c7fb8", "infrared": "#d95f0e", "joint": "#756bb1"}
LOSSES = {"cluster": "-", "instance": "--", "agnostic": ":"}
HEIGHT, GAP, LINE, LABEL = 112, 12, 11, 190  # of a sheet, in hundredths of an inch
MOST_IMAGES = 600  # of a sheet
DPI, MOST_PIXELS = 200, 60_000  # a side of a picture has fewer than 2^16 pixels
SCRIPTS = ("Noto Sans CJK", "Source Han Sans", "WenQuanYi", "PingFang", "Microsoft YaHei", "Arial Unicode MS")
PANELS = (  # of the curves: title, beginning of the names in the log, unit
    ("losses", "loss_", "mean of the epoch"),
    ("clusters", "clusters_", "number"),
    ("outliers", "outliers_", "images"),
    ("label-free score", "score", "separation of the clusters"),
    ("monitors (read identities)", "monitor_", "adjusted Rand index"),
    ("time", "seconds", "seconds"),
)


class Curve(NamedTuple):
    """A line of a panel: its name, values (runs, epochs) with NaN for none, and how matplotlib draws it."""

    name: str
    values: np.ndarray
    look: dict[str, Any] = {}


class Panel(NamedTuple):
    """Curves in the same axes, below a title, with what they count."""

    title: str
    unit: str
    curves: list[Curve]


class Cell(NamedTuple):
    """One image of a sheet, uint8 (H, W, 3), with the text below it and the colour of its frame."""

    image: np.ndarray
    caption: str
    color: str = NEUTRAL


class Row(NamedTuple):
    """A row of a sheet: a label of a few short lines, its images, and whether the label is red."""

    label: str
    cells: list[Cell]
    bad: bool = False


def prepare_picture(path: str | Path | None) -> None:
    """Fail early where the picture that is asked for cannot be drawn: bad output, or no matplotlib."""
    if path:
        _matplotlib()
        prepare_output(path, ".png")


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
        import matplotlib.font_manager
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install 'ecul[plots]'") from e
    return matplotlib


@contextmanager
def _picture(path: str | Path, width: float, height: float, **options: Any) -> Iterator[Any]:
    """A matplotlib figure of so many inches, in the end written as a PNG, whole or not at all."""
    matplotlib = _matplotlib()
    installed = sorted(matplotlib.font_manager.get_font_names())  # names of files come in any script
    fonts = ["DejaVu Sans", *(name for name in installed if name.startswith(SCRIPTS))]
    style = {"font.family": fonts, "text.parse_math": False, "font.size": 8}
    with matplotlib.rc_context(style), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dpi, content = min(DPI, MOST_PIXELS / max(width, height)), io.BytesIO()
        yield (figure := matplotlib.figure.Figure((width, height), dpi, facecolor="white", **options))
        figure.savefig(content, format="png", dpi=dpi)
    if any("Glyph" in str(warning.message) for warning in caught):
        log.warning("%s: no font here has every letter of the names (Noto Sans CJK has most)", path)
    write_file(prepare_output(path, ".png"), content.getvalue())


def draw_sheet(path: str | Path, rows: Sequence[Row], lead: int = 0, title: str = "") -> None:
    """Write rows of framed images, each right of its label, as a PNG.

    lead: how many first cells of each row are set apart, as a query is from its answers. title: a line above.
    Errors: ValueError for no images, or more than `MOST_IMAGES`; ImportError that says what to install.
    """
    everything = [cell for row in rows for cell in row.cells]
    if not 0 < len(everything) <= MOST_IMAGES:
        many = f"1 to {MOST_IMAGES} images, got {len(everything)}"
        raise ValueError(f"a picture holds {many}; ask for fewer queries or answers")
    height, width = everything[0].image.shape[:2]
    width = max(40, round(HEIGHT * width / height))
    lines = max(len(cell.caption.splitlines()) for cell in everything)
    step = HEIGHT + LINE * lines + 2 * GAP
    right = LABEL + max(len(row.cells) for row in rows) * (width + GAP) + 2 * GAP * bool(lead) + GAP
    right = max(right, 8 * len(title))
    head_room = 26 * bool(title)
    bottom = head_room + len(rows) * step + GAP
    rectangle = _matplotlib().patches.Rectangle
    with _picture(path, right / 100, bottom / 100) as figure:
        axes = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[], yticks=[])
        axes.text(GAP, GAP, _printable(title), color=INK, fontsize=10, va="top", fontweight="bold")
        for i, row in enumerate(rows):
            top = head_room + GAP + i * step
            text: dict[str, Any] = {"color": WRONG if row.bad else INK, "fontsize": 7.5}
            head, _, rest = _printable(row.label).partition("\n")
            middle = top + HEIGHT / 2 - 7.5 * rest.count("\n")
            axes.text(GAP, middle - 3, head, va="bottom", fontweight="bold", **text)
            axes.text(GAP, middle + 3, rest, va="top", linespacing=1.45, **text)
            for j, cell in enumerate(row.cells):
                left = LABEL + j * (width + GAP) + 2 * GAP * (lead > 0 and j >= lead)
                extent = (left, left + width, top + HEIGHT, top)
                axes.imshow(cell.image, extent=extent, aspect="auto", interpolation="antialiased")
                dashes = (0, (2.5, 1.5)) if cell.color == WRONG else "-"  # differs in more than colour
                frame = {"facecolor": "none", "edgecolor": cell.color, "linestyle": dashes, "linewidth": 2.2}
                axes.add_patch(rectangle((left - 1, top - 1), width + 2, HEIGHT + 2, **frame))
                below = {"ha": "center", "va": "top", "linespacing": 1.3, "color": INK, "fontsize": 6}
                axes.text(left + width / 2, top + HEIGHT + 6, _printable(cell.caption), **below)
        axes.set(xlim=(0, right), ylim=(bottom, 0))


def _printable(text: str) -> str:
    """The text with a question mark for every byte of a file's name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def draw_ranking(
    path: str | Path,
    ranking: Ranking,
    size: tuple[int, int] = (288, 144),
    queries: int = 5,
    answers: int = 10,
) -> int:
    """Write a sample of the queries of a `Ranking`, each with its first answers, as a PNG of a screen.

    Returns how many queries it shows. Errors: those of `prepare_picture`; ValueError for an image that cannot
    be read any more.
    """
    count, rows = len(ranking.rows), []
    for i in np.linspace(0, count - 1, min(queries, count)).round().astype(int).tolist():
        query, scores = ranking.query.paths[i], ranking.scores[i, :answers].tolist()
        nobody = ranking.threshold is not None and not any(map(ranking.is_same, scores))
        cells = [Cell(load_pixels(query, size), "query\nnobody" if nobody else "query", INK)]
        for rank, (row, score) in enumerate(zip(ranking.rows[i].tolist(), scores, strict=False), 1):
            name = ranking.gallery.paths[row]
            mark, color = (" =", RIGHT) if ranking.is_same(score) else ("", NEUTRAL)
            cells.append(
                Cell(load_pixels(name, size), f"{rank}{mark}\n{score:.3f}\n{short_name(name)}", color)
            )
        rows.append(Row(short_path(query), cells))
    title = (
        f"{len(rows)} of {count} {ranking.query.modality} queries, {len(ranking.gallery.paths):,} "
        f"{ranking.gallery.modality} images, best first{f' by {ranking.rerank}' if ranking.rerank else ''}"
    )
    draw_sheet(path, rows, lead=1, title=title)
    return len(rows)


def short_path(path: str) -> str:
    """A path in two lines that fit beside a row: the file's name, and the end of its folder."""
    folder, _, name = str(path).replace("\\", "/").rpartition("/")
    return "\n".join(_end(part, 24) for part in (name, folder) if part)


def short_name(path: str) -> str:
    """The end of a path in lines that fit below an image: the folder, where there is one, and the name."""
    parts = Path(str(path).replace("\\", "/")).with_suffix("").parts[-2:]
    return "\n".join(_end(part, 13) for part in parts if part not in ("/", "."))


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


def panels_of(history: Sequence[dict]) -> list[Panel]:
    """The panels of a run's log, a row an epoch; those without a value are left out."""
    keys = dict.fromkeys(key for row in history for key in row)
    panels = []
    for title, prefix, unit in PANELS:
        curves = []
        for key in (key for key in keys if key.startswith(prefix)):
            words = key.removeprefix(prefix).strip("_").split("_")
            look: dict[str, Any] = {"linestyle": next((LOSSES[w] for w in words if w in LOSSES), "-")}
            look |= next(({"color": MODALITY[w]} for w in words if w in MODALITY), {})
            values = np.array([[row.get(key, np.nan) for row in history]], dtype=float)
            curves.append(Curve(" ".join(words) or key, values, look))
        if curves:
            panels.append(Panel(title, unit, curves))
    return panels


def draw_curves(
    path: str | Path, panels: Sequence[Panel], second: int = 0, shared: bool = False,
    over: tuple[str, Sequence[float]] = ("epoch", ()),
) -> None:  # fmt: skip
    """Write curves over epochs as a PNG: the mean of the runs, and a band of a deviation for several.

    second: the number of epochs before stage 2, which is marked. shared: one legend for all panels. over: the
    name of another axis than epochs, and the places of the values on it.
    """
    axis, places = over
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with _picture(path, 4.2 * columns, 3.3 * lines, layout="constrained") as figure:
        for place, (title, unit, curves) in enumerate(panels, 1):
            axes = figure.add_subplot(lines, columns, place, xlabel=axis, ylabel=unit)
            for name, values, look in curves:
                counted = np.isfinite(values).any(0)
                x = np.asarray(places or range(1, len(counted) + 1))[counted]
                held = values[:, counted]
                mean, deviation = np.nanmean(held, 0), np.nanstd(held, 0)
                (line,) = axes.plot(x, mean, label=name, linewidth=1.4, marker="o", markersize=2.5, **look)
                if len(values) > 1:
                    band = {"color": line.get_color(), "alpha": 0.18, "lw": 0}
                    axes.fill_between(x, mean - deviation, mean + deviation, **band)
            axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.margins(y=0.13)  # room for the word above the lines
            axes.set_ylim(min(0, axes.dataLim.ymin))
            axes.locator_params(axis="x", integer=not places, nbins=8, min_n_ticks=1)
            if 0 < second < max(values.shape[1] for _, values, _ in curves):
                axes.axvline(second + 0.5, color=NEUTRAL, linestyle=(0, (2, 2)), linewidth=1)
                head = axes.get_xaxis_transform()
                axes.text(second + 0.5, 0.99, " stage 2", transform=head, fontsize=7, color="#555", va="top")
            if not shared:
                axes.legend(
                    fontsize=7, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18)
                )
        if shared:
            handles, names = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", fontsize=8, frameon=False)
