"""What a report shows: features, clusters and how certain they are, and the rows of images for its sheets."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ecul import MODALITIES
from ecul.data.images import Images
from ecul.data.pack import Files
from ecul.evaluation.metrics import SCORING
from ecul.features import embed_pixels
from ecul.labels import Labels, assign_labels
from ecul.report import pictures
from ecul.report.pictures import HEIGHT, Cell, Row
from ecul.run.saved import SavedRun
from ecul.run.scores import silhouettes
from ecul.training import extract_exchanged
from ecul.trainset import TrainImages

MIXED = 0.1  # a cluster with a smaller mean silhouette looks mixed


@dataclass(frozen=True)
class Embedded:
    """Visible and infrared images, pixels uint8 (n, 3, H, W) each, and features (N, D), visible first."""

    images: tuple[Images, Images]
    pixels: tuple[torch.Tensor, torch.Tensor]
    features: torch.Tensor

    @classmethod
    def by(cls, model: Any, images: tuple[Images, Images], progress: bool) -> "Embedded":
        """Both modalities' images with their features by this model."""
        visible, infrared = (side.load(model.input_size, progress=progress) for side in images)
        pairs = zip((visible, infrared), MODALITIES, strict=True)
        features = torch.cat([embed_pixels(model, *pair, progress=progress).cpu() for pair in pairs])
        return cls(images, (visible, infrared), features)

    @property
    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The visible and the infrared features."""
        visible, infrared = self.features.tensor_split([len(self.images[0])])
        return visible, infrared

    def pids(self) -> np.ndarray | None:
        """(N,) identities, None where they are not known."""
        known = [images.pids for images in self.images if images.pids is not None]
        return np.concatenate(known) if len(known) == len(self.images) else None

    def cell(self, row: int, color: str | None = None, head: str = "", foot: str = "") -> Cell:
        """The image of this row with its camera between two lines; the default colour is the modality's.

        The image is that of the file, twice as high as in a sheet, and that of the pack if the file is gone.
        """
        side = int(row >= len(self.images[0]))
        images, place = self.images[side], row - side * len(self.images[0])
        camera = f"camera {images.camids[place]}" if images.camids[place] else ""
        caption = "\n".join(filter(None, (head, camera, foot)))
        shown, pixels = images.subset([place]), self.pixels[side][place]
        size = (2 * HEIGHT, max(1, round(2 * HEIGHT * pixels.shape[2] / pixels.shape[1])))
        if isinstance(shown.source, Files):
            shown = Images.from_paths(shown.source.paths(shown.rows), images.modality)
        with suppress(ValueError):
            pixels = shown.load(size, progress=False)[0]
        return Cell(pixels.permute(1, 2, 0).numpy(), caption, color or pictures.MODALITY[images.modality])


@dataclass(frozen=True)
class Clusters:
    """The clusters of one modality.

    members: the rows of each in the table, those nearest to its centre first. margins: their mean silhouettes
    (C,). separation and outliers: the mean silhouette of all images, and the share of outliers.
    """

    modality: str
    members: list[list[int]]
    margins: torch.Tensor
    separation: float
    outliers: float

    def told(self) -> str:
        """A judgement without identities: how far apart, how many look mixed, how many outliers."""
        count, mixed = len(self.members), int((self.margins < MIXED).sum())
        bad = "bad: " * (self.separation < 0.25 or 5 * mixed > count or self.outliers > 0.5)
        looks = f"{mixed or 'none'} look{'s' * (mixed == 1)} mixed"
        told = f"{bad}{counted(count, f'{self.modality} cluster')}, separation {self.separation:.2f}"
        return f"{told}, {looks}, {self.outliers:.0%} of the images are outliers"


def measure_clusters(features: torch.Tensor, labels: Labels) -> list[Clusters]:
    """The clusters of each modality by itself: a matched cluster of the other one may be the same person's.

    features: (N, D) unit rows, visible ones first.
    """
    found, offset = [], 0
    parts = features.tensor_split([labels.num_visible])
    for (name, own), rows, centers in zip(labels.sides.items(), parts, labels.centers, strict=True):
        values, outliers = silhouettes(rows, own, centers), float((own < 0).float().mean())
        nearest = (rows * centers[own]).sum(1).argsort(descending=True, stable=True)
        members = [nearest[own[nearest] == c] for c in range(len(centers))]
        margins = torch.stack([values[m].mean() for m in members])
        lists = [(m + offset).tolist() for m in members]
        found.append(Clusters(name, lists, margins, float(values.mean()), outliers))
        offset = labels.num_visible
    return found


def next_labels(table: Embedded, saved: SavedRun, model: Any) -> Labels:
    """The labels that the next epoch would learn from."""
    cameras = torch.cat([torch.as_tensor(images.camids) for images in table.images])
    images, config = TrainImages(table.pixels, cameras), saved.config
    stage = 2 if config.epochs_cross and len(saved.history) >= config.epochs_intra else 1
    exchanged = extract_exchanged(model, images, config, stage)
    return assign_labels(
        table.features, images, config, stage, None if exchanged is None else exchanged.cpu()
    )


def ranked_rows(
    table: Embedded, protocol: str | None, queries: int, top: int, kind: str
) -> tuple[str, list[Row]]:
    """Infrared queries and visible answers; what the protocol ignores is left out, as in evaluation."""
    (gallery, query), pids = table.images, table.pids()
    rows = []
    for index in choose_queries(query, queries):
        row = len(gallery) + index
        scores = table.sides[0] @ table.features[row]
        scores[torch.from_numpy(ignored(protocol, query, index, gallery))] = -torch.inf
        cells = [table.cell(row, pictures.INK)]
        for rank, found in enumerate(scores.topk(min(top, len(gallery))).indices.tolist(), 1):
            if scores[found] == -torch.inf:
                break
            color, mark = pictures.NEUTRAL, ""
            if pids is not None and pids[found] >= 0:
                color, mark = (pictures.RIGHT, " ✓") if pids[found] == pids[row] else (pictures.WRONG, " ✗")
            told = f"{rank}{mark}  {scores[found]:.3f}"
            cells.append(table.cell(found, color, told, pictures.short_name(gallery.names[found])))
        who = "" if pids is None else f"person {pids[row]}\n"
        rows.append(Row(who + pictures.short_path(query.names[index]), cells))
    colors = "Green ✓: the same person; red ✗: another; gray: a distractor."
    text = (
        f"{len(rows)} random infrared queries and their best answers among {len(gallery)} visible {kind} "
        f"images, best first. {'Identities are not known.' if pids is None else colors} Below each: rank, "
        f"cosine similarity{', camera' if gallery.camids.any() else ''}, file."
    )
    return text, rows


def choose_queries(images: Images, count: int) -> list[int]:
    """`count` random rows of images; of different people where identities are known."""
    drawn = np.random.default_rng(0).permutation(len(images))
    if images.pids is not None:
        drawn = drawn[images.pids[drawn] >= 0]  # without distractors
        drawn = drawn[np.sort(np.unique(images.pids[drawn], return_index=True)[1])]
    return drawn[:count].tolist()


def ignored(protocol: str | None, query: Images, row: int, gallery: Images) -> np.ndarray:
    """bool (len(gallery),): the answers that the protocol does not count for this query."""
    rule = SCORING[protocol].ignored if protocol else None
    if rule is None or query.pids is None or gallery.pids is None:
        return np.zeros(len(gallery), bool)
    return rule(query.pids[[row]], gallery.pids, query.camids[[row]], gallery.camids)[0]


def cluster_rows(
    table: Embedded, clusters: Sequence[Clusters], each: int = 3, most: int = 10
) -> tuple[str, list[Row]]:
    """The largest, the smallest and the least certain clusters, each once."""
    found = [
        (len(members), margin, side.modality, members)
        for side in clusters
        for members, margin in zip(side.members, side.margins.tolist(), strict=True)
    ]
    chosen: dict[int, list[str]] = {}
    for name, column, sign in (("largest", 0, -1), ("smallest", 0, 1), ("least certain", 1, 1)):
        for place in sorted(range(len(found)), key=lambda i: sign * found[i][column])[:each]:
            chosen.setdefault(place, []).append(name)
    rows = []
    for place, names in chosen.items():
        size, margin, modality, members = found[place]
        looks = ": looks mixed" * (margin < MIXED)
        label = f"{', '.join(names)}\n{size} {modality} images\nsilhouette {margin:.3f}{looks}"
        rows.append(Row(label, [table.cell(row) for row in spread(members, most)], bool(looks)))
    text = (
        f"{len(found)} clusters of the training images, each of one modality, by the features of the final "
        "weights, the nearest to their centre first. Blue frame: visible, orange: infrared. Silhouette: how "
        "much nearer the members are to their own centre than to the nearest other centre of their modality, "
        f"from -1 to 1, on average. A cluster looks mixed (red) if it is below {MIXED}. Other clusters can "
        "still hold several people."
    )
    return text, rows


def match_rows(
    table: Embedded, clusters: Sequence[Clusters], similarity: np.ndarray, match: np.ndarray,
    most: int = 6, images: int = 4,
) -> tuple[str, list[Row], int]:  # fmt: skip
    """Matches from the best to the worst, and how many images of each modality a row has, visible first.

    similarity: cosines of the centres, infrared x visible, (B, A); match: bool (B, A).
    """
    pairs = np.argwhere(match)[np.argsort(-similarity[match], kind="stable")].tolist()
    sides = [(clusters[0].members[a], clusters[1].members[b]) for b, a in pairs]
    shown = spread(list(range(len(pairs))), most)
    lead = min(images, *(len(side) for place in shown for side in sides[place]))
    rows = []
    for place in shown:
        cells = [table.cell(row) for side in sides[place] for row in side[:lead]]
        cosine = similarity[tuple(pairs[place])]
        rows.append(Row(f"match {place + 1} of {len(pairs)}\ncosine {cosine:.3f}", cells))
    kind = "one to one" if max(match.sum(0).max(), match.sum(1).max()) == 1 else "many to many"
    text = (
        f"{len(pairs)} matches between the clusters of the two modalities, {kind}, from the best to the "
        "worst by the cosine of their centres, with the images nearest to each centre."
    )
    if (pids := table.pids()) is not None:
        right = np.mean([commonest(pids[a]) == commonest(pids[b]) for a, b in sides])
        text += f" The commonest person is the same in {right:.0%} of them."
    return text, rows, lead


def commonest(pids: np.ndarray) -> int:
    """The identity that most of these images have, the smallest among equals."""
    people, counts = np.unique(pids, return_counts=True)
    return int(people[counts.argmax()])


def spread(values: list, most: int) -> list:
    """At most so many of these, from the first to the last."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[place] for place in places]


def counted(number: int, noun: str, of: int | None = None) -> str:
    """A number in words: "3 of 75 epochs" or "1 of 1 epoch"."""
    total = number if of is None else of
    return f"{number:,}{'' if of is None else f' of {of:,}'} {noun}{'s' * (total != 1)}"
