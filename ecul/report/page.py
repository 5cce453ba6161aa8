"""A run at a glance: PNGs, and one HTML page that holds everything and can be sent to anyone."""

import base64
import html
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ecul import MODALITIES
from ecul.common.distributed import choose_device
from ecul.common.files import write_file
from ecul.data.dataset import Dataset
from ecul.evaluation.protocols import evaluate
from ecul.matching import match_clusters
from ecul.model import load_model
from ecul.report import pictures
from ecul.report.measured import (
    Embedded,
    cluster_rows,
    counted,
    match_rows,
    measure_clusters,
    next_labels,
    ranked_rows,
)
from ecul.report.pictures import Row
from ecul.run.saved import SavedRun, read_run

CURVES = (
    "Each loss is the mean of its epoch; stage 2 adds terms. The score is the separation of the clusters, "
    "which needs no identities."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1 { margin-bottom: 0 }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px; overflow-wrap: normal }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top }
th { color: #666; font-weight: 600; white-space: nowrap }
.sub { color: #666 }
.columns { columns: 3 16rem }
.wide { overflow-x: auto }
@media (max-width: 40rem) { img { max-width: none; width: 48rem } td, th { font-size: 11px } }
"""


def report(
    run: str | Path, dataset: Dataset | None = None, *, model: Any = None, root: str | Path | None = None,
    queries: int = 6, top: int = 10, device: str | torch.device | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Write `report/` in a run directory: PNGs and `index.html`, which holds all of them. Returns its path.

    run: the directory that `train` wrote. dataset: the `Dataset` it was trained on; by default it is opened
    where it was, or in `root`. Identities, where known, colour frames and give the accuracy of the test
    images; nothing else reads them. model: the trained model if it is no `TwoStreamResNet`, for instance
    `Backbone.from_pretrained(run, network)`. queries, top: size of the ranked lists. device: by default the
    GPU if there is one. Errors: ValueError for a directory that is no run, images that are not there any
    more, another data set, a model that cannot be read, or too many images to draw; ImportError without
    matplotlib. Source: ECUL for the clusters that are shown, MBCCM for the matches.
    """
    if min(queries, top) < 1 or queries * (top + 1) > pictures.MOST_IMAGES:
        most = f"at most {pictures.MOST_IMAGES} images in all"
        raise ValueError(f"queries and top must be at least 1, with {most}, got {queries} and {top}")
    saved = read_run(run)
    if not saved.history:
        raise ValueError(f"{saved.directory}: the run has not finished an epoch yet")
    folder = saved.directory / "report"
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link; the report would be written to its target; remove it")
    dataset = saved.open(root) if dataset is None else dataset
    saved.require_same(dataset)
    model = (model or load_model(saved.directory)).to(choose_device(device))
    pictures.prepare_picture(folder / "curves.png")
    sections, verdict = _image_sections(folder, saved, dataset, model, (queries, top), progress)
    pictures.draw_curves(folder / "curves.png", pictures.panels_of(saved.history), saved.config.epochs_intra)
    last = saved.history[-1]
    sections = [
        section("What happened", table=[*_happened(saved, dataset), ("verdict", verdict)]),
        *sections,
        section("Curves", CURVES, folder / "curves.png"),
        section("Last epoch", table=[*{**last, "epoch": last["epoch"] + 1}.items()]),
        section("Settings", table=[*saved.config.to_dict().items()]),
    ]
    done = counted(len(saved.history), "epoch", saved.config.epochs)
    subtitle = f"{done} done, stage {last['stage']}; {saved.directory}"
    page = render_page(f"{saved.config.method} on {saved.dataset['dataset']}", subtitle, sections)
    write_file(folder / "index.html", page.encode("utf-8", "replace"))
    return folder / "index.html"


def _happened(saved: SavedRun, dataset: Dataset) -> list[tuple[str, str]]:
    """When, how long, on how many images, and what went wrong: (name, text) a row."""
    ended = time.localtime((saved.directory / "resume.safetensors").stat().st_mtime)
    seconds = round(sum(row.get("seconds", 0) for row in saved.history))
    done = counted(len(saved.history), "epoch", saved.config.epochs)
    rows = [
        ("ended", time.strftime("%Y-%m-%d %H:%M", ended)),
        ("training", f"{done} in {timedelta(seconds=seconds)}"),
    ]
    rows += [(name.replace("_", " "), f"{len(images):,} images") for name, images in dataset.splits().items()]
    fell = [str(row["epoch"] + 1) for row in saved.history if row.get("fell_apart")]
    if fell:
        rows.append(("warning", f"clusters fell apart in epoch {', '.join(fell)}: lower lr or other weights"))
    return rows


def _image_sections(
    folder: Path, saved: SavedRun, dataset: Dataset, model: Any, size: tuple[int, int], progress: bool
) -> tuple[list[str], str]:
    """The sections that need images, and a verdict on the clusters."""

    def sheet(name: str, title: str, text: str, rows: Sequence[Row], lead: int = 0) -> str:
        pictures.draw_sheet(folder / f"{name}.png", rows, lead)
        return section(title, text, folder / f"{name}.png")

    trained = tested = Embedded.by(model, (dataset.visible, dataset.infrared), progress)
    sections, kind = [], "training"
    if dataset.test_visible is not None and dataset.test_infrared is not None:
        tested = Embedded.by(model, (dataset.test_visible, dataset.test_infrared), progress)
        sections, kind = accuracy(dataset, tested), "test"
    sections.append(sheet("ranked", "Ranked lists", *ranked_rows(tested, dataset.protocol, *size, kind), 1))
    labels = next_labels(trained, saved, model)
    if not labels.enough:
        return sections, "bad: fewer than two clusters in a modality; see eps and min_samples"
    clusters = measure_clusters(trained.features, labels)
    sections.append(sheet("clusters", "Clusters", *cluster_rows(trained, clusters)))
    visible, infrared = (centers.numpy() for centers in labels.centers)
    rule = saved.config.matching
    match = match_clusters(visible, infrared, rule) if labels.match is None else labels.match
    told = match_rows(trained, clusters, infrared @ visible.T, match)
    sections.append(sheet("pairs", "Visible-infrared matches", *told))
    return sections, "; ".join(side.told() for side in clusters)


def accuracy(dataset: Dataset, tested: Embedded) -> list[str]:
    """A section with the protocol's figures; none without a protocol or without identities."""
    if dataset.protocol is None or tested.pids() is None:
        return []
    features = dict(zip(MODALITIES, tested.sides, strict=True))
    told, table = evaluate(None, dataset, features=features, progress=False).cells()
    return [section("Accuracy on the test images", f"{told}. It selected nothing.", table=table)]


def section(
    title: str, text: str = "", picture: Path | None = None, table: Sequence[Iterable[Any]] = ()
) -> str:
    """A part of the page: a heading, a sentence or two, a PNG, a table with a head column."""
    parts = [f"<h2>{html.escape(title)}</h2>", *[f"<p>{html.escape(text)}</p>"] * bool(text)]
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        parts.append(f'<div class="wide">{image}</div>')
    lines = []
    for line in table:
        name, *cells = (html.escape(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in line)
        lines.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    if lines:
        kind = "columns" if len(lines) > 10 else "wide"
        parts.append(f'<div class="{kind}"><table>{"".join(lines)}</table></div>')
    return "\n".join(parts)


def render_page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The page's text, with all its pictures inside."""
    title, subtitle, body = html.escape(title), html.escape(subtitle), "\n".join(sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{STYLE}</style></head>
<body><h1>{title}</h1>
<p class="sub">{subtitle}</p>
{body}
</body></html>
"""
