"""A run at a glance: PNGs, and one HTML page that holds them all and can be sent to anyone."""

import logging
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecul import MODALITIES
from ecul.common.distributed import choose_device
from ecul.common.files import write_file
from ecul.data.dataset import Dataset
from ecul.data.images import Images
from ecul.evaluation.metrics import SCORING
from ecul.evaluation.protocols import evaluate
from ecul.labels import Labels, assign_labels
from ecul.matching import match_clusters
from ecul.report import pictures
from ecul.report.embedded import Embedded, embed
from ecul.report.page import Section, render_page
from ecul.report.summary import MIXED, cluster_margins, counted, summary_rows, verdict
from ecul.report.views import match_rows, view_sections
from ecul.run.saved import SavedRun, read_run
from ecul.streams import load_model
from ecul.training import extract_exchanged
from ecul.trainset import TrainImages

log = logging.getLogger("ecul")
CURVES = (
    "Each loss is the mean of its epoch; stage 2 adds terms. Scores rate the weights without identities: "
    "separation of the clusters, mutual nearest neighbours across modalities, stability of the labels since "
    "the epoch before."
)


def report(
    run: str | Path, dataset: Dataset | None = None, *, model: Any = None, root: str | Path | None = None,
    options: dict | Iterable[tuple[str, Any]] = (), queries: int = 6, top: int = 10,
    device: str | torch.device | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Write `report/` in a run directory: PNGs and `index.html`, which has them inside. Returns its path.

    run: the directory that `train` wrote. dataset: the `Dataset` it was trained on, by default opened where
    it lay, or in `root`, with its options and these ones; where that cannot be, there are curves and settings
    alone. Its identities, where known, colour frames and give the accuracy of the test images, and are read
    for nothing else. model: the trained model where it is not a `TwoStreamResNet`, for instance
    `Backbone.from_pretrained(run, network)`. queries, top: size of the ranked lists. device: by default the
    GPU when there is one. Errors: ValueError for a directory that is no run, another data set, a model that
    cannot be read, too many images to draw, or pictures of an earlier report that could not be drawn again;
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
        raise ValueError(f"{folder} is a link, and would have its target written to; remove it")
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
    happened = summary_rows(saved.directory, saved.history, saved.config.epochs, dataset)
    pictures.draw_curves(folder / "curves.png", saved.history)
    sections = [Section("Curves", CURVES, folder / "curves.png")]
    if dataset is not None:
        model = model.to(choose_device(device))
        trained = tested = embed(model, (dataset.visible, dataset.infrared), progress)
        if dataset.test_visible is not None and dataset.test_infrared is not None:
            tested = embed(model, (dataset.test_visible, dataset.test_infrared), progress)
            features = dict(zip(MODALITIES, tested.by_modality(tested.features), strict=True))
            results, told = _accuracy(dataset, features)
            sections = [*told, *sections]
            happened += results
        kind = "training" if tested is trained else "test"
        sections.append(_ranked_section(folder, tested, dataset.protocol, queries, top, kind))
        labels = _labels(trained, saved, model)
        happened.append(("verdict", verdict(trained.features, labels)))
        sections += _cluster_sections(folder, trained, saved, labels)
        sections += view_sections(folder, tested, model)
    last, config = saved.history[-1], saved.config
    sections += [
        Section("Data", rows=_data_rows(saved, dataset)),
        Section("Last epoch", rows=list({**last, "epoch": last["epoch"] + 1}.items())),
        Section("Settings", rows=list(config.to_dict().items())),
    ]
    sections = [Section("What happened", rows=happened), *sections]
    done = counted(len(saved.history), "epoch", config.epochs)
    subtitle = f"{done} done, stage {last['stage']}; {saved.directory}"
    page = render_page(f"{config.method} on {saved.dataset['dataset']}", subtitle, sections)
    write_file(folder / "index.html", page.encode("utf-8", "replace"))
    return folder / "index.html"


def _accuracy(dataset: Dataset, features: dict) -> tuple[list[tuple], list[Section]]:
    """The protocol's figures, in short and whole; nothing where there is none or identities are not known."""
    if dataset.protocol is None or any(getattr(dataset, f"test_{m}").pids is None for m in MODALITIES):
        return [], []
    short: list[tuple] = []
    try:
        found = evaluate(None, dataset, features=features, progress=False)
        for row in found.rows:
            if row["mAP"] is None:
                continue
            figures = f"rank-1 {row['rank1']:.1f} %, mAP {row['mAP']:.1f} %"
            short.append((f"{row['mode']}, {row['direction']}", figures))
        told, rows = found.cells()
    except ValueError as e:  # queries without an answer, say: the rest of the report stands
        told, rows = f"Not to be had: {e}", []
    return short, [Section("Accuracy on the test images", f"{told}. Nothing was selected by it.", rows=rows)]


def _ranked_section(
    folder: Path, table: Embedded, protocol: str | None, queries: int, top: int, kind: str
) -> Section:
    """Infrared queries, visible answers; what the protocol ignores is left out, as in evaluation."""
    (gallery, query), pids = table.images, table.pids()
    rows = []
    for index in choose_queries(query, queries):
        row = len(gallery) + index
        scores = table.features[: len(gallery)] @ table.features[row]
        scores[torch.from_numpy(ignored(protocol, query, index, gallery))] = -torch.inf
        cells = [table.cell(row, pictures.INK)]
        for rank, found in enumerate(scores.topk(min(top, len(gallery))).indices.tolist(), 1):
            if scores[found] == -torch.inf:
                break
            color, mark = pictures.NEUTRAL, ""
            if pids is not None:
                same = pids[found] == pids[row]
                color, mark = (pictures.RIGHT, " ✓") if same else (pictures.WRONG, " ✗")
            name = pictures.short_name(gallery.names[found])
            cells.append(table.cell(found, color, f"{rank}{mark}  {scores[found]:.3f}", name))
        who = "" if pids is None else f"person {pids[row]}\n"
        rows.append((who + pictures.short_path(query.names[index]), cells))
    pictures.draw_sheet(folder / "ranked.png", rows, lead=1)
    text = (
        f"Infrared queries drawn at random ({len(rows)}), and their best answers among {len(gallery)} "
        f"visible {kind} images, best first. "
        + ("Identities are not known." if pids is None else "Green ✓: the same person; red ✗: another.")
        + f" Below each: rank, cosine similarity{', camera' if gallery.camids.any() else ''}, file."
    )
    return Section("Ranked lists", text, folder / "ranked.png")


def choose_queries(images: Images, count: int, seed: int = 0) -> list[int]:
    """Rows of `count` images drawn at random, of as many different people where identities are known."""
    drawn = np.random.default_rng(seed).permutation(len(images))
    if images.pids is not None:
        drawn = drawn[np.sort(np.unique(images.pids[drawn], return_index=True)[1])]
    return drawn[:count].tolist()


def ignored(protocol: str | None, query: Images, row: int, gallery: Images) -> np.ndarray:
    """bool (len(gallery),): the answers that the protocol does not count for this query."""
    rule = SCORING[protocol].ignored if protocol else None
    if rule is None or query.pids is None or gallery.pids is None:
        return np.zeros(len(gallery), bool)
    return rule(query.pids[[row]], gallery.pids, query.camids[[row]], gallery.camids)[0]


def _labels(table: Embedded, saved: SavedRun, model: Any) -> Labels:
    """The labels that the next epoch would learn from."""
    cameras = torch.cat([torch.as_tensor(images.camids) for images in table.images])
    images, config = TrainImages(table.pixels, cameras), saved.config
    stage = 2 if config.epochs_cross and len(saved.history) >= config.epochs_intra else 1
    exchanged = extract_exchanged(model, images, config, stage)
    return assign_labels(
        table.features, images, config, stage, None if exchanged is None else exchanged.cpu()
    )


def _cluster_sections(folder: Path, table: Embedded, saved: SavedRun, labels: Labels) -> list[Section]:
    """Clusters and matches by the final weights, where there are two clusters in each modality."""
    if not labels.enough:
        return []
    return [
        _mosaic_section(folder, table, labels.own, labels.joint),
        *_match_sections(folder, table, labels, saved.config.matching),
    ]


def _mosaic_section(
    folder: Path,
    table: Embedded,
    own: torch.Tensor,
    joint: torch.Tensor | None,
    each: int = 3,
    most: int = 12,
) -> Section:
    kind, labels = ("cross-modality", joint) if joint is not None else ("one-modality", own.clone())
    if joint is None:
        visible, infrared = table.by_modality(labels)
        infrared[infrared >= 0] += visible.max() + 1
    sizes, margins = torch.bincount(labels[labels >= 0]), cluster_margins(table.features, labels)
    chosen: dict[int, list[str]] = {}
    for name, order in (("largest", -sizes), ("smallest", sizes), ("least certain", margins)):
        for cluster in order.argsort(stable=True)[:each].tolist():
            chosen.setdefault(cluster, []).append(name)
    pids, mixed = table.pids(), []
    rows: list[tuple[str, list[pictures.Cell]]] = []
    for cluster, names in chosen.items():
        members = torch.nonzero(labels == cluster)[:, 0].numpy()
        seen = int((members < len(table.images[0])).sum())
        label = "\n".join(textwrap.wrap(", ".join(names), 24))
        label += f"\n{seen} visible, {len(members) - seen} infrared\nmargin {float(margins[cluster]):.3f}"
        if margins[cluster] < MIXED:
            mixed.append(len(rows))
            label += ": looks mixed"
        if pids is not None:
            people = np.unique(pids[members], return_counts=True)[1]
            label += f"\npurity {people.max() / len(members):.0%}, persons {len(people)}"
        spread = np.linspace(0, len(members) - 1, min(most, len(members))).round().astype(int)
        rows.append((label, [table.cell(row) for row in members[spread].tolist()]))
    pictures.draw_sheet(folder / "clusters.png", rows, bad=mixed)
    text = (
        f"{len(sizes)} {kind} clusters of the training images, {int((labels < 0).sum())} outliers, by the "
        "features of the final weights. Blue frame: visible, orange: infrared. Margin: how much more similar "
        "the members are to their own centre than to the nearest other one, on average; below "
        f"{MIXED} a cluster looks mixed (red)."
    )
    return Section("Clusters", text, folder / "clusters.png")


def _match_sections(folder: Path, table: Embedded, labels: Labels, rule: str) -> list[Section]:
    visible, infrared = (centers.numpy() for centers in labels.centers)
    match = match_clusters(visible, infrared, rule) if labels.match is None else labels.match
    kind = "one to one" if max(match.sum(0).max(), match.sum(1).max()) == 1 else "many to many"
    same, text = None, f"{int(match.sum())} matches between the clusters of the two modalities, {kind}."
    if table.pids() is not None:
        pairs = zip(labels.sides.values(), table.images, strict=True)
        people = [commonest(part.numpy(), images.identities()) for part, images in pairs]
        same = people[1][:, None] == people[0][None, :]
        text += f" In {(match & same).sum() / match.sum():.0%} of them the commonest person is the same"
        text += f" (of all pairs: {same.mean():.0%})."
        text += " The diagonal is the best one-to-one assignment, the most similar pairs first."
    pictures.draw_matches(folder / "matches.png", infrared @ visible.T, match, same)
    pictures.draw_sheet(folder / "pairs.png", *match_rows(table, labels, infrared @ visible.T, match, same))
    told = (
        "Visible clusters and the infrared ones they are matched with: best, middle and worst by the cosine "
    )
    told += "of their centres, each with the images nearest to its centre."
    return [
        Section("Visible-infrared matches", told, folder / "pairs.png"),
        Section("All matches", text, folder / "matches.png"),
    ]


def commonest(labels: np.ndarray, pids: np.ndarray) -> np.ndarray:
    """(C,): the identity that most members of each cluster have, the smallest among equals."""
    groups = [np.unique(pids[labels == c], return_counts=True) for c in range(labels.max() + 1)]
    return np.array([people[counts.argmax()] for people, counts in groups])


def _data_rows(saved: SavedRun, dataset: Dataset | None) -> list[tuple]:
    if dataset is None:
        return list(saved.dataset.items())
    rows: list[tuple] = [("", "images", "identities", "cameras")]
    for name, images in dataset.splits().items():
        people = "unknown" if images.pids is None else len(np.unique(images.pids))
        cameras, counts = np.unique(images.camids, return_counts=True)
        named = ", ".join(f"{c}: {n}" for c, n in zip(cameras, counts, strict=True) if c) or "unknown"
        rows.append((name.replace("_", " "), len(images), people, named))
    return rows
