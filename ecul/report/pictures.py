"""Pictures of a run and of a search, drawn without a display; matplotlib is imported on first use."""

import io
import itertools
import logging
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from ecul.common.files import prepare_output, write_file
from ecul.data.decode import read_image, resize

log = logging.getLogger("ecul")
GOOD, BAD, PLAIN, ASKED = "#1a9641", "#d7191c", "#9a9a9a", "#2b2b2b"
MODALITY = {"visible": "#2c7fb8", "infrared": "#d95f0e", "joint": "#756bb1"}
DASHES = {BAD: (0, (2.5, 1.5))}  # green and red differ in more than colour
HEIGHT, GAP, LINE, LABEL = 112, 12, 11, 190  # of a sheet, in hundredths of an inch
MOST = 600  # images of a sheet
FINE = 2  # pixels of an image in a hundredth of an inch
OTHER = ("#444444", "#1b9e77", "#e7298a", "#a6761d")
LINES = {"cluster": "-", "instance": "--", "agnostic": ":"}
SCRIPTS = ("Noto Sans CJK", "Source Han Sans", "WenQuanYi", "PingFang", "Microsoft YaHei", "Arial Unicode MS")


@dataclass(frozen=True)
class Cell:
    """One image of a sheet, uint8 (H, W, 3), with the text below it and the colour of its frame."""

    image: np.ndarray
    caption: str
    color: str = PLAIN


def prepare_picture(path):
    """Whether this picture can be drawn, asked before the work for it: `prepare_output`, and matplotlib."""
    _matplotlib()
    prepare_output(path, ".png")


def _matplotlib():
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install 'ecul[plots]'") from e
    return Figure, FigureCanvasAgg


def _figure(width, height):
    figure_class, canvas_class = _matplotlib()
    figure = figure_class((width, height), dpi=100 * FINE, facecolor="none")
    canvas_class(figure)
    return figure


def _save(figure, path, below=None):
    """Write the figure as a PNG, whole or not at all; below: uint8 (H, W, 3) of its size instead of white."""
    from PIL import Image

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.canvas.draw()
    if any("Glyph" in str(warning.message) for warning in caught):
        log.warning("%s: no font here has every letter of the names (Noto Sans CJK has most)", path)
    content = io.BytesIO()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
    sheet = Image.new("RGB", drawn.size, "white") if below is None else Image.fromarray(below)
    sheet.paste(drawn, mask=drawn)
    sheet.save(content, "PNG", optimize=True)
    write_file(prepare_output(path, ".png"), content.getvalue())


@lru_cache(maxsize=1)
def _fonts():
    """The default font, then those of other scripts that are installed here: for names of files."""
    from matplotlib import font_manager

    names = sorted({font.name for font in font_manager.fontManager.ttflist})
    return ["DejaVu Sans", *(name for name in names if name.startswith(SCRIPTS))]


def draw_sheet(path, rows, lead=0):
    """Write rows of framed images as a PNG.

    rows: list of (label, list of `Cell`); the label, a few short lines, stands left of its row, its first
    line in bold. lead: how many first cells of each row are set apart, as a query is from its answers.
    Errors: ValueError for no rows, or more than `MOST` images; ImportError that says what to install.
    """
    count = sum(len(cells) for _, cells in rows)
    if not 0 < count <= MOST:
        raise ValueError(f"a picture holds 1 to {MOST} images, got {count}; ask for fewer queries or answers")
    from PIL import Image

    height, width = next(cell.image.shape[:2] for _, cells in rows for cell in cells)
    wide = max(40, round(HEIGHT * width / height))
    most = max(len(cells) for _, cells in rows)
    lines = max(cell.caption.count("\n") + bool(cell.caption) for _, cells in rows for cell in cells)
    step, total = HEIGHT + LINE * lines + 2 * GAP, LABEL + most * (wide + GAP) + 2 * GAP * bool(lead) + GAP
    figure = _figure(total / 100, (len(rows) * step + GAP) / 100)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas = np.full((FINE * (len(rows) * step + GAP), FINE * total, 3), 255, np.uint8)
    for i, (label, cells) in enumerate(rows):
        top = GAP + i * step
        _label(axes, label.splitlines(), top + HEIGHT / 2)
        for j, cell in enumerate(cells):
            left = LABEL + j * (wide + GAP) + 2 * GAP * (lead > 0 and j >= lead)
            thumbnail = resize(Image.fromarray(cell.image), (FINE * HEIGHT, FINE * wide))
            canvas[FINE * top : FINE * (top + HEIGHT), FINE * left : FINE * (left + wide)] = thumbnail
            axes.add_patch(_frame(left, top, wide, cell.color))
            place = (left + wide / 2, top + HEIGHT + 6)
            _write(axes, *place, cell.caption, fontsize=6, ha="center", va="top", linespacing=1.3)
    axes.set(xlim=(0, total), ylim=(len(rows) * step + GAP, 0))
    axes.axis("off")
    _save(figure, path, canvas)


def _label(axes, lines, middle):
    """Lines of text left of a row, the first in bold."""
    for k, line in enumerate(lines):
        weight = "normal" if k else "bold"
        y = middle + 15 * (k - (len(lines) - 1) / 2)
        _write(axes, GAP, y, line, fontsize=7.5, va="center", fontweight=weight)


def _write(axes, x, y, text, **style):
    """Text as it is: names of files in any script, with any sign; what is not UTF-8 as a question mark."""
    text = text.encode("utf-8", "replace").decode()
    axes.text(x, y, text, color=ASKED, fontfamily=_fonts(), parse_math=False, **style)


def _frame(left, top, width, color):
    from matplotlib.patches import Rectangle

    return Rectangle(
        (left - 1, top - 1), width + 2, HEIGHT + 2, fill=False, edgecolor=color, linewidth=2.2,
        linestyle=DASHES.get(color, "-"),
    )  # fmt: skip


def draw_ranking(path, ranking, size=(288, 144), queries=24, answers=20):
    """Write a `Ranking` as a PNG: its first `queries` queries with the first `answers` answers to each.

    Returns how many queries it shows. Errors: those of `prepare_picture`; ValueError for an image that can be
    read no more.
    """
    rows, held = [], zip(ranking.query.paths, ranking.rows, ranking.scores, strict=True)
    for asked, found, scores in itertools.islice(held, queries):
        found, scores = found[:answers], scores[:answers]
        cells = [Cell(read_image(asked, size), "query", ASKED)]
        for rank, (row, score) in enumerate(zip(found.tolist(), scores.tolist(), strict=True), 1):
            answer = ranking.gallery.paths[row]
            cells.append(Cell(read_image(answer, size), f"{rank}\n{score:.3f}\n{short_name(answer)}"))
        rows.append((short_path(asked), cells))
    draw_sheet(path, rows, lead=1)
    return len(rows)


def short_path(path):
    """A path in two lines that fit beside a row: the file's name, and the end of its folder."""
    folder, _, name = str(path).replace("\\", "/").rpartition("/")
    return "\n".join(_end(part, 24) for part in (name, folder) if part)


def short_name(path):
    """A file's name without its suffix, in one line or two that fit below an image."""
    name = Path(str(path).replace("\\", "/")).stem
    return name if len(name) <= 11 else f"{name[:11]}\n{_end(name[11:], 11)}"


def _end(text, width):
    return text if len(text) <= width else "…" + text[1 - width :]


def draw_curves(path, history):
    """Write the log's curves as a PNG: losses, clusters, outliers, scores, monitors, time.

    history: list of dicts, a row an epoch, as `train` returns; panels without a value are left out.
    """
    panels = [
        ("losses", "loss_", "mean of the epoch"),
        ("clusters", "clusters_", "number"),
        ("outliers", "outliers_", "images"),
        ("label-free scores", "score_", "higher is better"),
        ("monitors (read identities)", "monitor_", "adjusted Rand index"),
        ("time", "seconds", "seconds"),
    ]
    panels = [p for p in panels if any(k.startswith(p[1]) for row in history for k in row)]
    columns = min(3, len(panels))
    spare = -len(panels) % columns  # the first panel, which has the most lines, takes what would stay empty
    lines = (len(panels) + spare) // columns
    figure = _figure(4 * columns, 3.3 * lines)
    figure.set_layout_engine("constrained")
    epochs = [row["epoch"] + 1 for row in history]
    second = next((row["epoch"] + 0.5 for row in history if row["stage"] == 2), None)
    for place, (title, prefix, unit) in enumerate(panels, 1):
        cells = (1, 1 + spare) if place == 1 else place + spare
        axes = figure.add_subplot(lines, columns, cells)
        axes.set_prop_cycle(color=OTHER)
        for name in dict.fromkeys(k for row in history for k in row if k.startswith(prefix)):
            values = [row.get(name, float("nan")) for row in history]
            short = name.removeprefix(prefix).strip("_").replace("_", " ") or "whole epoch"
            axes.plot(epochs, values, label=short, marker="o", markersize=2.5, linewidth=1.4, **_line(name))
        _dress(axes, title, unit, second if second and second > 1 else None)
    _save(figure, path)


def _line(name):
    """Colour by modality, dashes by kind of loss, where the name tells them."""
    words = name.split("_")
    color = next((MODALITY[w] for w in words if w in MODALITY), None)
    style = next((LINES[w] for w in words if w in LINES), "-")
    return {"linestyle": style, **({"color": color} if color else {})}


def _dress(axes, title, unit, second):
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if unit in ("number", "images"):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    low, high = np.nanmin([0, *values]), np.nanmax([0, *values])
    high = high if high > low else low + 1
    axes.set_ylim(low, high + 0.13 * (high - low))  # room for the word above the lines
    if second is not None:
        axes.axvline(second, color=PLAIN, linestyle=(0, (2, 2)), linewidth=1)
        head = axes.get_xaxis_transform()
        axes.text(second, 0.99, " stage 2", transform=head, fontsize=7, color="#555", va="top")
    axes.legend(fontsize=7, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def draw_matches(path, similarity, match, same=None):
    """Write the visible-infrared match matrix as a PNG.

    similarity: (B infrared, A visible) cosines of cluster centres; match: the same shape, bool, as
    `match_clusters` gives; same: the same shape, bool, whether two clusters are mostly one person, or None.
    The pairs of the best one-to-one assignment lie on the diagonal, the most similar first; the rest follow.
    """
    rows, columns = _diagonal(similarity)
    similarity, match = similarity[rows][:, columns], match[rows][:, columns]
    infrared, visible = match.shape
    wide = min(10.0, max(5.0, 2.2 + 0.06 * visible))
    figure = _figure(wide + 1.2, min(9.0, max(3.6, 1.6 + (wide - 1) * infrared / visible)))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(similarity, cmap="Greys", aspect="auto", interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="cosine of the centres", fraction=0.04, pad=0.02)
    groups = [(match, MODALITY["visible"], "o", "match")]
    if same is not None:
        same = same[rows][:, columns]
        groups = [
            (match & same, GOOD, "o", "match, same person"),
            (match & ~same, BAD, "X", "match, another person"),
        ]
    size = np.clip((380 / max(match.shape)) ** 2, 2, 40)
    for chosen, color, marker, label in groups:
        y, x = np.nonzero(chosen)
        axes.scatter(x, y, s=size, c=color, marker=marker, label=f"{label} ({len(x)})", linewidths=0)
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"{visible} visible clusters")
    axes.set_ylabel(f"{infrared} infrared clusters")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8, markerscale=1.2)
    _save(figure, path)


def _diagonal(similarity):
    """Orders of rows and columns: assigned pairs first, the most similar before the others."""
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    best = np.argsort(-similarity[rows, columns], kind="stable")
    rest = [
        np.setdiff1d(np.arange(n), taken) for n, taken in zip(similarity.shape, (rows, columns), strict=True)
    ]
    return np.append(rows[best], rest[0]), np.append(columns[best], rest[1])
