"""A run at a glance: PNGs, and one HTML page that holds everything and can be sent to anyone."""

import base64
import html
from collections.abc import Iterable, Sequence
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
    match_rows,
    measure_clusters,
    next_labels,
    ranked_rows,
)
from ecul.report.pictures import Row
from ecul.run.saved import SavedRun, read_run

MOST_IMAGES = 600  # of the ranked lists


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
    if min(queries, top) < 1 or queries * (top + 1) > MOST_IMAGES:
        most = f"at most {MOST_IMAGES} images in all"
        raise ValueError(f"queries and top must be at least 1, with {most}, got {queries} and {top}")
    saved = read_run(run)
    folder = saved.directory / "report"
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link; the report would be written to its target; remove it")
    dataset = saved.open(root) if dataset is None else dataset
    saved.require_same(dataset)
    model = (model or load_model(saved.directory)).to(choose_device(device))
    pictures.prepare_picture(folder / "curves.png")
    sections = []
    trained = tested = Embedded.by(model, (dataset.visible, dataset.infrared), progress)
    if dataset.test_visible is not None and dataset.test_infrared is not None:
        tested = Embedded.by(model, (dataset.test_visible, dataset.test_infrared), progress)
        if dataset.protocol is not None and tested.pids() is not None:
            features = dict(zip(MODALITIES, tested.sides, strict=True))
            told, table = evaluate(None, dataset, features=features, progress=False).cells()
            sections.append(
                section("Accuracy on the test images", f"{told}. It selected nothing.", table=table)
            )
    sheets = {"ranked": ("Ranked lists", *ranked_rows(tested, dataset.protocol, queries, top))}
    sheets |= training_sheets(trained, saved, model)
    for name, (title, text, rows) in sheets.items():
        pictures.draw_sheet(folder / f"{name}.png", rows)
        sections.append(section(title, text, folder / f"{name}.png"))
    if "clusters" not in sheets:
        told = "A modality has fewer than two clusters: there are none to show. See eps and min_samples."
        sections.append(section("Clusters", told))
    stage = saved.history[-1]["stage"]
    second = saved.config.epochs_intra if stage == 2 else 0
    pictures.draw_curves(folder / "curves.png", pictures.panels_of(saved.history), second)
    fell = [str(row["epoch"] + 1) for row in saved.history if row.get("fell_apart")]
    told = f" The clusters fell apart in epoch {', '.join(fell)}: lower lr." if fell else ""
    sections.append(section("Curves", f"Stage 2 adds losses.{told}", folder / "curves.png"))
    sections.append(section("Images", table=[(name, len(side)) for name, side in dataset.splits().items()]))
    sections.append(section("Settings", table=saved.config.to_dict().items()))
    title = f"{saved.config.method} on {saved.dataset['dataset']}"
    done = f"{len(saved.history)} of {saved.config.epochs} epochs done, stage {stage}; {saved.directory}"
    page = render_page(title, done, sections)
    write_file(folder / "index.html", page.encode("utf-8", "replace"))
    return folder / "index.html"


def training_sheets(trained: Embedded, saved: SavedRun, model: Any) -> dict[str, tuple[str, str, list[Row]]]:
    """The title, the text and the rows of the sheets of clusters and matches; none without clusters."""
    labels = next_labels(trained, saved, model)
    if not labels.enough:
        return {}
    clusters = measure_clusters(trained.features, labels)
    visible, infrared = (centers.numpy() for centers in labels.centers)
    rule = saved.config.matching
    match = match_clusters(visible, infrared, rule) if labels.match is None else labels.match
    matches = match_rows(trained, clusters, infrared @ visible.T, match)
    return {
        "clusters": ("Clusters", *cluster_rows(trained, clusters)),
        "pairs": ("Visible-infrared matches", *matches),
    }


def section(
    title: str, text: str = "", picture: Path | None = None, table: Iterable[Iterable[Any]] = ()
) -> str:
    """A part of the page: a heading, a sentence or two, a PNG, a table."""
    parts = [f"<h2>{html.escape(title)}</h2>", f"<p>{html.escape(text)}</p>"]
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    parts.append("<table>")
    for line in table:
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in line)
        parts.append(f"<tr>{cells}</tr>")
    return "\n".join([*parts, "</table>"])


def render_page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The page's text, with all its pictures inside."""
    title, subtitle, body = html.escape(title), html.escape(subtitle), "\n".join(sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; overflow-wrap: anywhere }}
img {{ max-width: 100% }}
td {{ padding-right: 1rem; vertical-align: top }}
</style></head>
<body><h1>{title}</h1><p>{subtitle}</p>
{body}
</body></html>
"""
