"""A run at a glance: PNGs, and one HTML page that holds them all and can be sent to anyone."""

import json
import logging
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ecul import MODALITIES
from ecul.batches import identity
from ecul.common.distributed import choose_device
from ecul.common.files import write_file
from ecul.config import Config
from ecul.data.dataset import open_dataset
from ecul.data.images import Images
from ecul.evaluation.protocols import evaluate
from ecul.features import embed_pixels
from ecul.matching import match_clusters
from ecul.memory import cluster_means
from ecul.model import TwoStreamResNet
from ecul.report import pictures
from ecul.report.page import Section, page, plain_rows
from ecul.report.pictures import Cell
from ecul.stages import assign_labels, usable

log = logging.getLogger("ecul")
CURVES = (
    "Each loss is the mean of its epoch; stage 2 adds terms. Scores rate the weights without identities: "
    "separation of the clusters, mutual nearest neighbours across modalities, stability of the labels since "
    "the epoch before."
)


@dataclass(frozen=True)
class Saved:
    """What a run directory says of itself: its configuration, its log, and its data set."""

    directory: Path
    config: Config
    history: list
    dataset: dict


@dataclass(frozen=True)
class Pile:
    """Images with their pixels uint8 (N, 3, H, W) and their unit features (N, D), both on the CPU."""

    images: Images
    pixels: torch.Tensor
    features: torch.Tensor

    def thumbnail(self, row):
        """One image as uint8 (H, W, 3)."""
        return self.pixels[row].permute(1, 2, 0).numpy()


def read_run(directory):
    """Read a run directory. Errors: ValueError for a directory that `train` did not write."""
    directory = Path(directory)
    try:
        saved = json.loads((directory / "resume.json").read_text())
        history = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        about = {"root": saved.get("root"), "options": saved.get("options", {}), **saved["dataset"]}
        config = Config.from_dict(saved["config"])
        if not all({"epoch", "stage"} <= row.keys() for row in history):
            raise KeyError("a row without epoch or stage")
    except OSError as e:
        raise ValueError(f"{directory} is no run directory ({e.filename}: {e.strerror})") from e
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise ValueError(f"{directory}: its resume.json or log.jsonl is damaged ({e!r})") from e
    if not history:
        raise ValueError(f"{directory}: the run has not finished an epoch yet")
    return Saved(directory, config, history, about)


def report(
    run, dataset=None, *, model=None, root=None, options=(), queries=6, top=10, device=None, progress=True
):
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
    if min(queries, top) < 1 or queries * (top + 1) > pictures.MOST:
        most = f"at most {pictures.MOST} images in all"
        raise ValueError(f"queries and top must be at least 1, with {most}, got {queries} and {top}")
    saved, given = read_run(run), dataset is not None or root is not None
    try:
        dataset = dataset if dataset is not None else reopen(saved, root, options)
        _require_same(saved, dataset)
        model = model or TwoStreamResNet.from_pretrained(saved.directory)
    except (ValueError, FileNotFoundError) as e:
        if given:
            raise
        if (saved.directory / "report" / "ranked.png").exists():
            raise ValueError(f"{e}; for curves alone remove the earlier report, which has pictures") from e
        log.warning("curves and settings alone: %s", e)
        dataset = None
    folder = saved.directory / "report"
    folder.mkdir(exist_ok=True)
    pictures.draw_curves(folder / "curves.png", saved.history)
    sections = [Section("Curves", CURVES, folder / "curves.png")]
    if dataset is not None:
        model = model.to(choose_device(device))
        piles = {m: _embed(model, getattr(dataset, m), progress) for m in MODALITIES}
        tested = piles
        if dataset.test_visible is not None and dataset.test_infrared is not None:
            tested = {m: _embed(model, getattr(dataset, f"test_{m}"), progress) for m in MODALITIES}
            sections = [*_accuracy(dataset, {m: tested[m].features for m in MODALITIES}), *sections]
        sections += [
            _ranked_section(folder, tested, dataset.protocol, queries, top, tested is not piles),
            *_cluster_sections(folder, piles, saved),
        ]
    write_file(folder / "index.html", _html(saved, dataset, sections).encode("utf-8", "replace"))
    return folder / "index.html"


def reopen(saved, root=None, options=()):
    """The data set of a run, from where it lay or from `root`. Errors: ValueError where it is no more."""
    known = saved.dataset
    if known["root"] is None:
        raise ValueError("the images were in memory; in Python, report(run, dataset) takes them")
    if root is None and not Path(known["root"]).is_dir():
        raise ValueError(f"the images are no longer at {known['root']}; --root (root=) names their folder")
    return open_dataset(known["dataset"], root or known["root"], **{**known["options"], **dict(options)})


def _accuracy(dataset, features):
    """The protocol's figures; nothing where there is none or identities are not known."""
    if dataset.protocol is None or any(getattr(dataset, f"test_{m}").pids is None for m in MODALITIES):
        return []
    try:
        told, rows = evaluate(None, dataset, features=features, progress=False).cells()
    except ValueError as e:  # queries without an answer, say: the rest of the report stands
        told, rows = f"Not to be had: {e}", []
    return [Section("Accuracy on the test images", f"{told}. Nothing was selected by it.", rows=rows)]


def _require_same(saved, dataset):
    differs = [
        f"{name} is {value!r}, in training it was {saved.dataset[name]!r}"
        for name, value in identity(dataset).items()
        if saved.dataset.get(name, value) != value
    ]
    if differs:
        raise ValueError(f"dataset: not the one that {saved.directory} was trained on: {'; '.join(differs)}")


def _embed(model, images, progress):
    pixels = images.load(model.input_size, progress=progress)
    features = embed_pixels(model, pixels, images.modality, progress=progress).cpu()
    return Pile(images, pixels, features)


def _ranked_section(folder, piles, protocol, queries, top, held_out):
    """Infrared queries, visible answers; what the protocol ignores is left out, as in evaluation."""
    query, gallery = piles["infrared"], piles["visible"]
    known = query.images.pids is not None and gallery.images.pids is not None
    rows = []
    for row in choose_queries(query.images, queries):
        scores = gallery.features @ query.features[row]
        scores[torch.from_numpy(ignored(protocol, query.images, row, gallery.images))] = -torch.inf
        cells = [Cell(query.thumbnail(row), _camera(query.images, row), pictures.ASKED)]
        for rank, found in enumerate(scores.topk(min(top, len(scores))).indices.tolist(), 1):
            if scores[found] == -torch.inf:
                break
            color, mark = pictures.PLAIN, ""
            if known:
                right = gallery.images.pids[found] == query.images.pids[row]
                color, mark = (pictures.GOOD, " ✓") if right else (pictures.BAD, " ✗")
            name = pictures.short_name(gallery.images.names[found])
            lines = (f"{rank}{mark}  {scores[found]:.3f}", _camera(gallery.images, found), name)
            cells.append(Cell(gallery.thumbnail(found), "\n".join(filter(None, lines)), color))
        who = f"person {query.images.pids[row]}\n" if known else ""
        rows.append((who + pictures.short_path(query.images.names[row]), cells))
    pictures.draw_sheet(folder / "ranked.png", rows, lead=1)
    text = (
        f"Infrared queries drawn at random ({len(rows)}), and their best answers among "
        f"{len(gallery.images)} visible {'test' if held_out else 'training'} images, best first."
    )
    text += " Green ✓: the same person; red ✗: another." if known else " Identities are not known."
    cameras = ", camera" if gallery.images.camids.any() else ""
    text += f" Below each: rank, cosine similarity{cameras}, file."
    return Section("Ranked lists", text, folder / "ranked.png")


def choose_queries(images, count, seed=0):
    """Rows of `count` images drawn at random, of as many different people where identities are known."""
    drawn = np.random.default_rng(seed).permutation(len(images))
    if images.pids is not None:
        drawn = drawn[np.sort(np.unique(images.pids[drawn], return_index=True)[1])]
    return drawn[:count].tolist()


def ignored(protocol, query, row, gallery):
    """bool (len(gallery),): the answers that the protocol does not count for this query."""
    camera = query.camids[row]
    if protocol == "sysu":
        return (gallery.camids == 2) & (camera == 3)
    if protocol == "llcm" and query.pids is not None and gallery.pids is not None:
        return (gallery.camids == camera) & (gallery.pids == query.pids[row])
    return np.zeros(len(gallery), bool)


def _cluster_sections(folder, piles, saved):
    features = {m: piles[m].features for m in MODALITIES}
    cameras = {m: torch.as_tensor(piles[m].images.camids) for m in MODALITIES}
    labels = assign_labels(features, cameras, saved.config, len(saved.history) > saved.config.epochs_intra)
    if not usable(labels.own):
        return []
    return [
        _mosaic_section(folder, piles, labels),
        _match_section(folder, piles, labels, saved.config.matching),
    ]


def _mosaic_section(folder, piles, labels, each=3, most=12):
    kind = "cross-modality" if labels.joint is not None else "one-modality"
    values = list((labels.joint or labels.own).values())
    if labels.joint is None:
        values[1] = torch.where(values[1] >= 0, values[1] + values[0].max() + 1, -1)
    members = torch.cat(values)
    features = torch.cat([piles[m].features for m in MODALITIES])
    sizes, margins = torch.bincount(members[members >= 0]), cluster_margins(features, members)
    chosen: dict[int, list] = {}
    for name, order in (("largest", -sizes), ("smallest", sizes), ("least certain", margins)):
        for cluster in order.argsort(stable=True)[:each].tolist():
            chosen.setdefault(cluster, []).append(name)
    rows = [
        _mosaic_row(", ".join(names), c, piles, members, float(margins[c]), most)
        for c, names in chosen.items()
    ]
    pictures.draw_sheet(folder / "clusters.png", rows)
    text = (
        f"{len(sizes)} {kind} clusters of the training images, {int((members < 0).sum())} outliers, by the "
        "features of the final weights. Blue frame: visible, orange: infrared. Margin: how much more similar "
        "the members are to their own centre than to the nearest other one, on average; it is smallest for "
        "the least certain ones."
    )
    return Section("Clusters", text, folder / "clusters.png")


def cluster_margins(features, labels):
    """Mean over each cluster's members of (cosine to the own centre - cosine to the nearest other one).

    features: (N, D) unit rows; labels: (N,) int64, -1 = outlier, contiguous from 0. Returns (C,) float32;
    with one cluster alone the other cosine is taken as -1.
    """
    kept = labels >= 0
    cosines = features[kept] @ cluster_means(features, labels).T
    own = labels[kept][:, None]
    other = cosines.scatter(1, own, -1.0).amax(1)
    margins = cosines.gather(1, own)[:, 0] - other
    return torch.zeros(cosines.shape[1]).index_add_(0, own[:, 0], margins) / torch.bincount(own[:, 0])


def _mosaic_row(name, cluster, piles, members, margin, most):
    """A cluster's members, both modalities in proportion, at most `most`."""
    rows = torch.nonzero(members == cluster)[:, 0].tolist()
    count = len(piles["visible"].images)
    places = [("visible", r) if r < count else ("infrared", r - count) for r in rows]
    shown = [places[i] for i in np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)]
    cells = [
        Cell(piles[m].thumbnail(row), _camera(piles[m].images, row), pictures.MODALITY[m]) for m, row in shown
    ]
    sides = [sum(m == side for m, _ in places) for side in MODALITIES]
    label = "\n".join(textwrap.wrap(name, 24))
    label += f"\n{sides[0]} visible, {sides[1]} infrared\nmargin {margin:.3f}"
    if all(piles[m].images.pids is not None for m in MODALITIES):
        people = np.unique([piles[m].images.pids[row] for m, row in places], return_counts=True)[1]
        label += f"\npurity {people.max() / len(places):.0%}, persons {len(people)}"
    return label, cells


def _match_section(folder, piles, labels, rule):
    centers = [cluster_means(piles[m].features, labels.own[m]).numpy() for m in MODALITIES]
    match = match_clusters(centers[0], centers[1], rule)
    same, text = None, f"{int(match.sum())} matches between the clusters of the two modalities, many to many."
    if all(piles[m].images.pids is not None for m in MODALITIES):
        visible, infrared = (commonest(labels.own[m].numpy(), piles[m].images.pids) for m in MODALITIES)
        same = infrared[:, None] == visible[None, :]
        text += f" In {(match & same).sum() / match.sum():.0%} of them the commonest person is the same"
        text += f" (of all pairs: {same.mean():.0%})."
        text += " The diagonal is the best one-to-one assignment, the most similar pairs first."
    pictures.draw_matches(folder / "matches.png", centers[1] @ centers[0].T, match, same)
    return Section("Visible-infrared matches", text, folder / "matches.png")


def commonest(labels, pids):
    """(C,): the identity that most members of each cluster have, the smallest among equals."""
    groups = [np.unique(pids[labels == c], return_counts=True) for c in range(labels.max() + 1)]
    return np.array([people[counts.argmax()] for people, counts in groups])


def _camera(images, row):
    return f"camera {images.camids[row]}" if images.camids[row] else ""


def _html(saved, dataset, sections):
    """The page: what the run is, its pictures, its data, its last epoch and its settings."""
    last = saved.history[-1]
    title = f"{saved.config.method} on {saved.dataset['dataset']}"
    subtitle = (
        f"{len(saved.history)} of {saved.config.epochs} epochs done, stage {last['stage']}; {saved.directory}"
    )
    settled = [
        Section("Data", rows=_data_rows(saved, dataset)),
        Section("Last epoch", rows=plain_rows({**last, "epoch": last["epoch"] + 1})),
        Section("Settings", rows=plain_rows(saved.config.to_dict())),
    ]
    return page(title, subtitle, [*sections, *settled])


def _data_rows(saved, dataset):
    if dataset is None:
        return plain_rows(saved.dataset)
    rows: list[tuple] = [("", "images", "identities", "cameras")]
    for name, images in dataset.splits().items():
        people = "unknown" if images.pids is None else len(np.unique(images.pids))
        cameras, counts = np.unique(images.camids, return_counts=True)
        named = ", ".join(f"{c}: {n}" for c, n in zip(cameras, counts, strict=True) if c) or "unknown"
        rows.append((name.replace("_", " "), len(images), people, named))
    return rows
