"""Pictures of a run and of a search, drawn without a display; matplotlib is imported on first use.

The fonts are those of matplotlib's settings. Letters that they lack are drawn as boxes, with a warning.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ecul.common.files import prepare_output, write_file
from ecul.data.decode import load_pixels
from ecul.tools.search import Ranking

RIGHT, WRONG, NEUTRAL, INK = "#1a9641", "#d7191c", "#9a9a9a", "#2b2b2b"
MODALITY = {"visible": "#2c7fb8", "infrared": "#d95f0e"}
HEIGHT, WIDTH, GAP, LINE, LABEL = 112, 56, 12, 11, 170  # of a sheet, in hundredths of an inch
DPI = 200
SIZE = (2 * HEIGHT, 2 * WIDTH)  # of an image in a sheet, in dots
PANELS = (  # of the curves: title, beginning of the names in the log, unit
    ("losses", "loss_", "mean of the epoch"),
    ("clusters", "clusters_", "number"),
    ("outliers", "outliers_", "images"),
    ("label-free score", "score", "separation of the clusters"),
    ("monitors (read identities)", "monitor_", "adjusted Rand index"),
    ("time", "seconds", "seconds"),
)


class Panel(NamedTuple):
    """Curves in the same axes: a title, what they count, and values (runs, epochs) by name, NaN for none."""

    title: str
    unit: str
    curves: dict[str, np.ndarray]


class Cell(NamedTuple):
    """One image of a sheet, uint8 (H, W, 3), with the text below it and the colour of its frame."""

    image: np.ndarray
    caption: str
    color: str = NEUTRAL


Row = tuple[str, list[Cell | None]]  # of a sheet: a label of a few short lines, and images; None is a gap


def prepare_picture(path: str | Path | None) -> None:
    """Fail early where the picture that is asked for cannot be drawn: bad output, or no matplotlib."""
    if path:
        _matplotlib()
        prepare_output(path, ".png")


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install 'ecul[plots]'") from e
    return matplotlib


@contextmanager
def _picture(path: str | Path, width: float, height: float, **options: Any) -> Iterator[Any]:
    """A matplotlib figure of so many inches, in the end written as a PNG, whole or not at all."""
    matplotlib, content = _matplotlib(), io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 8}):
        yield (figure := matplotlib.figure.Figure((width, height), DPI, **options))
        figure.savefig(content, format="png")
    write_file(prepare_output(path, ".png"), content.getvalue())


def draw_sheet(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows of framed images, each right of its label, as a PNG.

    Errors: ValueError for a picture of 2**16 dots or more; ImportError that says what to install.
    """
    lines = max(cell.caption.count("\n") + 1 for _, cells in rows for cell in cells if cell)
    step = HEIGHT + LINE * lines + 2 * GAP
    right = LABEL + max(len(cells) for _, cells in rows) * (WIDTH + GAP)
    bottom = len(rows) * step + GAP
    rectangle = _matplotlib().patches.Rectangle
    with _picture(path, right / 100, bottom / 100) as figure:
        axes = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[], yticks=[])
        for top, (label, cells) in zip(range(GAP, bottom, step), rows, strict=False):
            axes.text(GAP, top + HEIGHT / 2, label, color=INK, va="center", linespacing=1.5)
            for left, cell in zip(range(LABEL, right, WIDTH + GAP), cells, strict=False):
                if cell is None:
                    continue
                extent = (left, left + WIDTH, top + HEIGHT, top)
                axes.imshow(cell.image, extent=extent, aspect="auto", interpolation="antialiased")
                frame = {"facecolor": "none", "edgecolor": cell.color, "linewidth": 2.2}
                axes.add_patch(rectangle((left - 1, top - 1), WIDTH + 2, HEIGHT + 2, **frame))
                below = {"ha": "center", "va": "top", "linespacing": 1.3, "color": INK, "fontsize": 6}
                axes.text(left + WIDTH / 2, top + HEIGHT + 6, cell.caption, **below)
        axes.set(xlim=(0, right), ylim=(bottom, 0))


def draw_ranking(path: str | Path, ranking: Ranking) -> None:
    """Write at most five queries of a `Ranking`, each with its first ten answers, as a PNG.

    Errors: those of `prepare_picture`; ValueError for an image that cannot be read any more.
    """
    rows: list[Row] = []
    for i in spread(range(len(ranking.rows)), 5):
        query, scores = ranking.query.paths[i], ranking.scores[i, :10].tolist()
        nobody = ranking.threshold is not None and not any(map(ranking.is_same, scores))
        cells = [Cell(load_pixels(query, SIZE), "query\nnobody" if nobody else "query", INK), None]
        for rank, (row, score) in enumerate(zip(ranking.rows[i].tolist(), scores, strict=False), 1):
            name = ranking.gallery.paths[row]
            mark, color = (" =", RIGHT) if ranking.is_same(score) else ("", NEUTRAL)
            caption = f"{rank}{mark}\n{score:.3f}\n{short_name(name)}"
            cells.append(Cell(load_pixels(name, SIZE), caption, color))
        rows.append((short_name(query, 24), cells))
    draw_sheet(path, rows)


def spread(values: Sequence, most: int) -> list:
    """At most so many of these, from the first to the last."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[place] for place in places]


def short_name(path: str, width: int = 13) -> str:
    """The end of a path in lines of at most `width` letters: its folder, and its name without the suffix.

    A byte that is not UTF-8 becomes a question mark, as no font can draw it.
    """
    parts = Path(path.encode("utf-8", "replace").decode()).with_suffix("").parts[-2:]
    return "\n".join(part if len(part) <= width else "…" + part[1 - width :] for part in parts)


def panels_of(history: Sequence[dict]) -> list[Panel]:
    """The panels of a run's log, a row an epoch; those without a value are left out."""
    names = dict.fromkeys(name for row in history for name in row)
    panels = []
    for title, prefix, unit in PANELS:
        curves = {}
        for name in (name for name in names if name.startswith(prefix)):
            values = np.array([[row.get(name, np.nan) for row in history]], dtype=float)
            curves[name.removeprefix(prefix).strip("_").replace("_", " ") or name] = values
        if curves:
            panels.append(Panel(title, unit, curves))
    return panels


def draw_curves(
    path: str | Path, panels: Sequence[Panel], second: int = 0,
    over: tuple[str, Sequence[float]] = ("epoch", ()),
) -> None:  # fmt: skip
    """Write curves over epochs as a PNG: the mean of the runs, and a band of a deviation for several.

    Panels with the same names share one legend. second: the number of epochs before stage 2, which is marked.
    over: the name of another axis than epochs, and the places of the values on it.
    """
    axis, places = over
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    shared = len({tuple(panel.curves) for panel in panels}) == 1
    with _picture(path, 4.2 * columns, 3.3 * lines, layout="constrained") as figure:
        for place, (title, unit, curves) in enumerate(panels, 1):
            axes = figure.add_subplot(lines, columns, place, xlabel=axis, ylabel=unit)
            for name, values in curves.items():
                counted = np.isfinite(values).any(0)
                x = np.asarray(places or range(1, len(counted) + 1))[counted]
                mean, deviation = np.nanmean(values[:, counted], 0), np.nanstd(values[:, counted], 0)
                (line,) = axes.plot(x, mean, ".-", label=name)
                if len(values) > 1:
                    axes.fill_between(
                        x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2
                    )
            if second:
                axes.axvline(second + 0.5, color=NEUTRAL, linestyle=":", label="stage 2")
            axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
            axes.grid(alpha=0.25)
            axes.set_ylim(min(0, axes.dataLim.ymin))
            axes.locator_params(axis="x", integer=not places, min_n_ticks=1)
            if not shared:
                below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
                axes.legend(fontsize=7, frameon=False, ncols=3, **below)
        if shared:
            handles, names = axes.get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", fontsize=8, frameon=False)
