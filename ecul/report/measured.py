"""The figures of a report: features, clusters and how certain they are, and what answers a query."""

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
from ecul.report.pictures import HEIGHT, MODALITY, Cell, Row
from ecul.run.saved import SavedRun
from ecul.run.scores import silhouettes
from ecul.training import extract_exchanged
from ecul.trainset import TrainImages

MIXED = 0.1  # a cluster with a smaller mean silhouette looks mixed
STRUCTURE = ((0.7, "far apart"), (0.5, "apart"), (0.25, "partly apart"), (-1, "hardly apart"))
# Words for silhouettes: Kaufman and Rousseeuw, Finding Groups in Data (1990)


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
        return Cell(pixels.permute(1, 2, 0).numpy(), caption, color or MODALITY[images.modality])


@dataclass(frozen=True)
class Clusters:
    """The clusters of one modality: labels (n,), and the mean silhouette of each, (C,), and of all images."""

    modality: str
    labels: torch.Tensor
    margins: torch.Tensor
    separation: float

    def told(self) -> str:
        """A judgement without identities: how far apart, how many look mixed, how many outliers."""
        mixed, outliers = int((self.margins < MIXED).sum()), float((self.labels < 0).float().mean())
        words = next(word for least, word in STRUCTURE if self.separation >= least)
        bad = "bad: " * (self.separation < 0.25 or 5 * mixed > len(self.margins) or outliers > 0.5)
        found = f"{bad}{counted(len(self.margins), f'{self.modality} cluster')} {words}"
        looks = f"{mixed or 'none'} look{'s' * (mixed == 1)} mixed"
        return (
            f"{found} (separation {self.separation:.2f}), {looks}, {outliers:.0%} of the images are outliers"
        )


def measure_clusters(features: torch.Tensor, labels: Labels) -> list[Clusters]:
    """The clusters of each modality by itself: a matched cluster of the other one may be the same person's.

    features: (N, D) unit rows, visible ones first.
    """
    found, parts = [], features.tensor_split([labels.num_visible])
    for (name, own), rows in zip(labels.sides.items(), parts, strict=True):
        values, sizes = silhouettes(rows, own), torch.bincount(own[own >= 0])
        sums = values.new_zeros(len(sizes)).index_add_(0, own.clamp(min=0), values)  # an outlier's is 0
        found.append(Clusters(name, own, sums / sizes, float(values.mean())))
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


def commonest(labels: np.ndarray, pids: np.ndarray) -> np.ndarray:
    """(C,): the identity that most members of each cluster have, the smallest among equals."""
    groups = [np.unique(pids[labels == c], return_counts=True) for c in range(labels.max() + 1)]
    return np.array([people[counts.argmax()] for people, counts in groups])


def match_rows(
    table: Embedded, labels: Labels, similarity: np.ndarray, match: np.ndarray, same: np.ndarray | None,
    most: int = 6, images: int = 4,
) -> tuple[list[Row], int]:  # fmt: skip
    """Rows of a sheet, and its lead: the number of images of each modality.

    similarity: (B, A) cosines of the centres; match: bool (B, A); same: bool (B, A), one person, or None.
    """
    pairs = np.argwhere(match)
    pairs = pairs[np.argsort(-similarity[tuple(pairs.T)], kind="stable")]
    places = np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int)
    members = [
        [torch.nonzero(side == c)[:, 0] for c in range(int(side.max()) + 1)] for side in labels.sides.values()
    ]
    lead = min(images, *(min(len(members[0][a]), len(members[1][b])) for b, a in pairs[places]))
    rows = []
    for place, (b, a) in zip(places, pairs[places], strict=True):
        cells, offset = [], 0
        for side, cluster, centers in zip(members, (a, b), labels.centers, strict=True):
            own = side[cluster] + offset
            nearest = (table.features[own] @ centers[cluster]).argsort(descending=True, stable=True)
            cells += [table.cell(row) for row in own[nearest[:lead]].tolist()]
            offset = labels.num_visible
        told = "" if same is None else "\nsame person" if same[b, a] else "\nanother person"
        rows.append(Row(f"match {place + 1} of {len(pairs)}\ncosine {similarity[b, a]:.3f}{told}", cells))
    return rows, lead


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


def flattened(rows: np.ndarray) -> tuple[np.ndarray, str]:
    """Points (n, 2) of features (n, D), and how: t-SNE if scikit-learn is installed, else two components."""
    centred = rows - rows.mean(0)
    points = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return points, "principal components"
    if len(rows) < 8:  # too few for neighbourhoods
        return points, "principal components"
    start = (points / max(points[:, 0].std(), 1e-9) * 1e-4).astype(np.float32)
    tsne = TSNE(perplexity=min(30.0, (len(rows) - 1) / 3), init=start, random_state=0)
    return tsne.fit_transform(rows), "t-SNE"


def counted(number: int, noun: str, of: int | None = None) -> str:
    """A number in words: "3 of 75 epochs" or "1 of 1 epoch"."""
    total = number if of is None else of
    return f"{number:,}{'' if of is None else f' of {of:,}'} {noun}{'s' * (total != 1)}"
