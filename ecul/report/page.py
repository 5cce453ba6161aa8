"""A run at a glance: PNGs, and one HTML page that holds everything and can be sent to anyone."""

import base64
import html
import io
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecul import MODALITIES
from ecul.common.distributed import choose_device
from ecul.common.files import write_file
from ecul.data.checks import count_images
from ecul.data.dataset import Dataset
from ecul.evaluation.protocols import evaluate
from ecul.labels import Labels
from ecul.matching import match_clusters
from ecul.model import load_model
from ecul.report import measured, pictures
from ecul.report.measured import MIXED, Clusters, Embedded, counted
from ecul.report.pictures import Cell, Row
from ecul.run.saved import SavedRun, read_run

log = logging.getLogger("ecul")
MAPPED = 600  # images of a map
CURVES = (
    "Each loss is the mean of its epoch; stage 2 adds terms. Scores rate the weights without identities: "
    "separation of the clusters, mutual nearest neighbours across modalities, stability of the labels since "
    "the epoch before."
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
.row { display: flex; flex-wrap: wrap; gap: 10px 8px; margin-bottom: 1.2rem; font-size: 12px }
.row p { width: 11rem; margin: 0; white-space: pre-line }
.row figure { width: 4.4rem; margin: 0; text-align: center; white-space: pre-line; font-size: 10px }
.row img { width: 100%; box-sizing: border-box; border: 3px solid; display: block }
.bad { color: #d7191c }
.lead { margin-right: 1.2rem !important }
@media (max-width: 40rem) { .row p { width: 100% } td, th { padding-right: 6px; font-size: 11px } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence or two, a PNG, rows of images, a table with a head column."""

    title: str
    text: str = ""
    picture: Path | None = None
    sheet: Sequence[Row] = ()
    lead: int = 0  # the first images of each row that are set apart
    table: Sequence[Sequence[Any]] = ()

    def html(self) -> str:
        """The section with its pictures inside."""
        parts = [f"<h2>{html.escape(self.title)}</h2>"]
        if self.text:
            parts.append(f"<p>{html.escape(self.text)}</p>")
        if self.picture is not None:
            parts.append(
                f'<img alt="{html.escape(self.title)}" src="{_url("png", self.picture.read_bytes())}">'
            )
        for row in self.sheet:
            head, _, rest = html.escape(row.label).partition("\n")
            images = "".join(_figure(cell, i == self.lead) for i, cell in enumerate(row.cells, 1))
            parts.append(
                f'<div class="row"><p class="{"bad" * row.bad}"><b>{head}</b>\n{rest}</p>{images}</div>'
            )
        lines = []
        for line in self.table:
            cells = (html.escape(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in line)
            lines.append(f"<tr><th>{next(cells)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        if lines:
            kind = "columns" if len(lines) > 10 else "wide"
            parts.append(f'<div class="{kind}"><table>' + "".join(lines) + "</table></div>")
        return "\n".join(parts)


def _figure(cell: Cell, lead: bool) -> str:
    from PIL import Image  # matplotlib needs it too

    image, color = io.BytesIO(), f"border-color: {cell.color}"
    Image.fromarray(cell.image).save(image, "jpeg", quality=90)
    dashes = "; border-style: dashed" * (cell.color == pictures.WRONG)  # differs in more than colour
    shown = f'<img alt="" style="{color}{dashes}" src="{_url("jpeg", image.getvalue())}">'
    return f'<figure class="{"lead" * lead}">{shown}{html.escape(cell.caption)}</figure>'


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page's text, with all its pictures inside."""
    title, subtitle = html.escape(title), html.escape(subtitle)
    body = "\n".join([f'<h1>{title}</h1>\n<p class="sub">{subtitle}</p>', *(s.html() for s in sections)])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def report(
    run: str | Path, dataset: Dataset | None = None, *, model: Any = None, root: str | Path | None = None,
    options: dict | Iterable[tuple[str, Any]] = (), queries: int = 6, top: int = 10,
    device: str | torch.device | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Write `report/` in a run directory: PNGs and `index.html`, which holds all of them. Returns its path.

    run: the directory that `train` wrote. dataset: the `Dataset` it was trained on; by default it is opened
    where it was, or in `root`, with its options and these ones. Without it the report has curves and settings
    alone. Identities, where known, colour frames and give the accuracy of the test images; nothing else reads
    them. model: the trained model if it is no `TwoStreamResNet`, for instance
    `Backbone.from_pretrained(run, network)`. queries, top: size of the ranked lists. device: by default the
    GPU if there is one. Errors: ValueError for a directory that is no run, another data set, a model that
    cannot be read, too many images to draw, or an earlier report whose pictures cannot be drawn again;
    ImportError without matplotlib. Source: ECUL for the clusters that are shown, MBCCM for the matches.
    """
    if min(queries, top) < 1 or queries * (top + 1) > pictures.MOST_IMAGES:
        most = f"at most {pictures.MOST_IMAGES} images in all"
        raise ValueError(f"queries and top must be at least 1, with {most}, got {queries} and {top}")
    saved, given = read_run(run), dataset is not None or root is not None
    if not saved.history:
        raise ValueError(f"{saved.directory}: the run has not finished an epoch yet")
    folder = saved.directory / "report"
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link; the report would be written to its target; remove it")
    try:
        dataset = dataset if dataset is not None else saved.open(root, options)
        saved.require_same(dataset)
        model = model or load_model(saved.directory)
    except (ValueError, FileNotFoundError) as e:
        if given:
            raise
        if (folder / "ranked.png").exists():
            raise ValueError(f"{e}; for curves alone remove the earlier report, which has pictures") from e
        log.warning("curves and settings alone: %s", e)
        dataset = None
    folder.mkdir(exist_ok=True)
    happened = _happened(saved, dataset)
    pictures.draw_curves(folder / "curves.png", saved.history)
    sections = [Section("Curves", CURVES, folder / "curves.png")]
    if dataset is not None:
        model = model.to(choose_device(device))
        more, found = _image_sections(folder, saved, dataset, model, (queries, top), progress)
        sections, happened = [*more, *sections], [*happened, *found]
    last, config = saved.history[-1], saved.config
    sections += [
        Section("Data", table=_data_rows(saved, dataset)),
        Section("Last epoch", table=list({**last, "epoch": last["epoch"] + 1}.items())),
        Section("Settings", table=list(config.to_dict().items())),
    ]
    done = counted(len(saved.history), "epoch", config.epochs)
    subtitle = f"{done} done, stage {last['stage']}; {saved.directory}"
    sections = [Section("What happened", table=happened), *sections]
    page = render_page(f"{config.method} on {saved.dataset['dataset']}", subtitle, sections)
    write_file(folder / "index.html", page.encode("utf-8", "replace"))
    return folder / "index.html"


def _happened(saved: SavedRun, dataset: Dataset | None) -> list[tuple[str, str]]:
    """When, how long, on how many images, and what went wrong: (name, text) a row."""
    ended = time.localtime((saved.directory / "resume.safetensors").stat().st_mtime)
    seconds = round(sum(row.get("seconds", 0) for row in saved.history))
    done = counted(len(saved.history), "epoch", saved.config.epochs)
    rows = [
        ("ended", time.strftime("%Y-%m-%d %H:%M", ended)),
        ("training", f"{done} in {timedelta(seconds=seconds)}"),
    ]
    for prefix, name in (("", "trained on"), ("test_", "tested on")) if dataset is not None else ():
        sides = [getattr(dataset, f"{prefix}{m}") for m in MODALITIES]
        if None not in sides:
            rows.append((name, ", ".join(f"{len(side):,} {side.modality}" for side in sides) + " images"))
    fell = [str(row["epoch"] + 1) for row in saved.history if row.get("fell_apart")]
    if fell:
        rows.append(("warning", f"clusters fell apart in epoch {', '.join(fell)}: lower lr or other weights"))
    return rows


def _image_sections(
    folder: Path, saved: SavedRun, dataset: Dataset, model: Any, size: tuple[int, int], progress: bool
) -> tuple[list[Section], list[tuple[str, str]]]:
    """The sections that need images, and what they say in short."""
    trained = tested = Embedded.by(model, (dataset.visible, dataset.infrared), progress)
    sections: list[Section] = []
    happened: list[tuple[str, str]] = []
    if dataset.test_visible is not None and dataset.test_infrared is not None:
        tested = Embedded.by(model, (dataset.test_visible, dataset.test_infrared), progress)
        sections, happened = _accuracy(dataset, tested)
    kind = "training" if tested is trained else "test"
    sections.append(_ranked_section(folder, tested, dataset.protocol, *size, kind))
    labels = measured.next_labels(trained, saved, model)
    if labels.enough:
        clusters = measured.measure_clusters(trained.features, labels)
        happened.append(("verdict", "; ".join(side.told() for side in clusters)))
        sections.append(_cluster_section(folder, trained, clusters))
        sections.append(_match_section(folder, trained, labels, saved.config.matching))
    else:
        happened.append(("verdict", "bad: fewer than two clusters in a modality; see eps and min_samples"))
    return [*sections, _map_section(folder, tested)], happened


def _sheet(title: str, text: str, path: Path, rows: Sequence[Row], lead: int = 0) -> Section:
    """A section of rows of images, which are written as a PNG too."""
    pictures.draw_sheet(path, rows, lead)
    return Section(title, text, sheet=rows, lead=lead)


def _accuracy(dataset: Dataset, tested: Embedded) -> tuple[list[Section], list[tuple[str, str]]]:
    """The protocol's figures, whole and in short; nothing without a protocol or without identities."""
    if dataset.protocol is None or tested.pids() is None:
        return [], []
    features = dict(zip(MODALITIES, tested.sides, strict=True))
    found = evaluate(None, dataset, features=features, progress=False)
    short = [
        (f"{row['mode']}, {row['direction']}", f"rank-1 {row['rank1']:.1f} %, mAP {row['mAP']:.1f} %")
        for row in found.rows
        if row["mAP"] is not None
    ]
    told, table = found.cells()
    return [Section("Accuracy on the test images", f"{told}. It selected nothing.", table=table)], short


def _ranked_section(
    folder: Path, table: Embedded, protocol: str | None, queries: int, top: int, kind: str
) -> Section:
    """Infrared queries and visible answers; what the protocol ignores is left out, as in evaluation."""
    (gallery, query), pids = table.images, table.pids()
    rows = []
    for index in measured.choose_queries(query, queries):
        row = len(gallery) + index
        scores = table.sides[0] @ table.features[row]
        scores[torch.from_numpy(measured.ignored(protocol, query, index, gallery))] = -torch.inf
        cells = [table.cell(row, pictures.INK)]
        for rank, found in enumerate(scores.topk(min(top, len(gallery))).indices.tolist(), 1):
            if scores[found] == -torch.inf:
                break
            color, mark = pictures.NEUTRAL, ""
            if pids is not None and pids[found] >= 0:
                color, mark = (pictures.RIGHT, " ✓") if pids[found] == pids[row] else (pictures.WRONG, " ✗")
            name = pictures.short_name(gallery.names[found])
            cells.append(table.cell(found, color, f"{rank}{mark}  {scores[found]:.3f}", name))
        who = "" if pids is None else f"person {pids[row]}\n"
        rows.append(Row(who + pictures.short_path(query.names[index]), cells))
    colors = "Green ✓: the same person; red ✗: another; gray: a distractor."
    text = (
        f"{len(rows)} random infrared queries and their best answers among {len(gallery)} visible {kind} "
        f"images, best first. {'Identities are not known.' if pids is None else colors} Below each: rank, "
        f"cosine similarity{', camera' if gallery.camids.any() else ''}, file."
    )
    return _sheet("Ranked lists", text, folder / "ranked.png", rows, 1)


def _cluster_section(
    folder: Path, table: Embedded, clusters: Sequence[Clusters], each: int = 3, most: int = 10
) -> Section:
    """The largest, the smallest and the least certain clusters, each once."""
    visible, infrared = (side.labels for side in clusters)
    border = len(clusters[0].margins)
    labels = torch.cat([visible, torch.where(infrared < 0, -1, infrared + border)])
    sizes, margins = torch.bincount(labels[labels >= 0]), torch.cat([side.margins for side in clusters])
    chosen: dict[int, list[str]] = {}
    for name, order in (("largest", -sizes), ("smallest", sizes), ("least certain", margins)):
        for cluster in order.argsort(stable=True)[:each].tolist():
            chosen.setdefault(cluster, []).append(name)
    pids, rows = table.pids(), []
    for cluster, names in chosen.items():
        members = torch.nonzero(labels == cluster)[:, 0].numpy()
        mixed = bool(margins[cluster] < MIXED)
        label = [", ".join(names), f"{len(members)} {MODALITIES[cluster >= border]} images"]
        label.append(f"silhouette {margins[cluster]:.3f}{': looks mixed' * mixed}")
        if pids is not None:
            people = np.unique(pids[members], return_counts=True)[1]
            label.append(f"purity {people.max() / len(members):.0%}, persons {len(people)}")
        spread = np.linspace(0, len(members) - 1, min(most, len(members))).round().astype(int)
        rows.append(Row("\n".join(label), [table.cell(row) for row in members[spread].tolist()], mixed))
    text = (
        f"{len(sizes)} clusters of the training images, each of one modality, by the features of the final "
        "weights. Blue frame: visible, orange: infrared. Silhouette: how much nearer the members are to "
        "their own centre than to the nearest other centre of their modality, from -1 to 1, on average. A "
        f"cluster looks mixed (red) if it is below {MIXED}. Other clusters can still hold several people."
    )
    return _sheet("Clusters", text, folder / "clusters.png", rows)


def _match_section(folder: Path, table: Embedded, labels: Labels, rule: str) -> Section:
    """Matches from the best to the worst, visible images beside infrared ones."""
    visible, infrared = (centers.numpy() for centers in labels.centers)
    match = match_clusters(visible, infrared, rule) if labels.match is None else labels.match
    kind = "one to one" if max(match.sum(0).max(), match.sum(1).max()) == 1 else "many to many"
    text = (
        f"{match.sum()} matches between the clusters of the two modalities, {kind}, from the best to the "
        "worst by the cosine of their centres, with the images nearest to each centre."
    )
    same = None
    if table.pids() is not None:
        pairs = zip(labels.sides.values(), table.images, strict=True)
        people = [measured.commonest(part.numpy(), images.identities()) for part, images in pairs]
        same = people[1][:, None] == people[0][None, :]
        share, chance = (match & same).sum() / match.sum(), same.mean()
        text += f" The commonest person is the same in {share:.0%} of them (of all pairs: {chance:.0%})."
    rows, lead = measured.match_rows(table, labels, infrared @ visible.T, match, same)
    return _sheet("Visible-infrared matches", text, folder / "pairs.png", rows, lead)


def _map_section(folder: Path, table: Embedded) -> Section:
    rows = np.linspace(0, len(table.features) - 1, min(MAPPED, len(table.features))).round().astype(int)
    pids, border = table.pids(), len(table.images[0])
    points, how = measured.flattened(table.features[torch.from_numpy(rows)].numpy())
    pictures.draw_map(folder / "map.png", points, rows >= border, None if pids is None else pids[rows])
    text = f"{len(rows)} images by {how}: images are close where their features are. A gap between the "
    text += "modalities is one that training has not closed."
    return Section("Map of the features", text, folder / "map.png")


def _data_rows(saved: SavedRun, dataset: Dataset | None) -> list[tuple]:
    if dataset is None:
        return list(saved.dataset.items())
    rows: list[tuple] = [("", "images", "identities", "cameras")]
    for name, count in ((name, count_images(images)) for name, images in dataset.splits().items()):
        cameras = ", ".join(f"{camera}: {number}" for camera, number in count["cameras"].items())
        people = "unknown" if count["identities"] is None else count["identities"]
        rows.append((name.replace("_", " "), count["images"], people, cameras or "unknown"))
    return rows
