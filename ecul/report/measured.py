"""What a report shows: features and clusters of a run's images, and the rows of images for its sheets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ecul import MODALITIES
from ecul.data.decode import load_pixels
from ecul.data.images import Images
from ecul.data.pack import Files
from ecul.evaluation.metrics import SCORING
from ecul.features import embed_pixels
from ecul.labels import Labels, assign_labels
from ecul.report import pictures
from ecul.report.pictures import Cell, Row, short_name, spread
from ecul.run.saved import SavedRun
from ecul.run.scores import silhouettes
from ecul.training import extract_exchanged
from ecul.trainset import TrainImages


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

    def cell(self, row: int, color: str | None = None, caption: str | None = None) -> Cell:
        """The image of this row. By default the colour is the modality's, and the caption is the camera.

        An image in a file is read again, because the network may get fewer pixels than a sheet shows.
        """
        side = int(row >= len(self.images[0]))
        images, place = self.images[side], row - side * len(self.images[0])
        if isinstance(images.source, Files):
            (file,) = images.source.paths(images.rows[[place]])
            image = load_pixels(file, pictures.SIZE)
        else:
            image = self.pixels[side][place].permute(1, 2, 0).numpy()
        if caption is None:
            caption = f"camera {images.camids[place]}" if images.camids[place] else ""
        return Cell(image, caption, color or pictures.MODALITY[images.modality])


class Cluster(NamedTuple):
    """A cluster of one modality: its rows of the table, nearest to its centre first, its mean silhouette."""

    modality: str
    rows: list[int]
    silhouette: float


def measure_clusters(features: torch.Tensor, labels: Labels) -> list[Cluster]:
    """The visible clusters, then the infrared ones, in the order of their labels.

    A silhouette compares clusters of one modality: a near cluster of the other one may be the same person's.
    features: (N, D) unit rows, visible ones first.
    """
    found, offset = [], 0
    parts = features.tensor_split([labels.num_visible])
    for (name, own), rows, centers in zip(labels.sides.items(), parts, labels.centers, strict=True):
        values = silhouettes(rows, own, centers)
        nearest = (rows * centers[own]).sum(1).argsort(descending=True, stable=True)
        for cluster in range(len(centers)):
            members = nearest[own[nearest] == cluster]
            found.append(Cluster(name, (members + offset).tolist(), float(values[members].mean())))
        offset = len(rows)
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


def ranked_rows(table: Embedded, protocol: str | None, queries: int, top: int) -> tuple[str, list[Row]]:
    """Infrared queries and visible answers; what the protocol ignores is left out, as in evaluation."""
    (gallery, query), pids = table.images, table.pids()
    rule = SCORING[protocol].ignored if protocol else None
    rows: list[Row] = []
    for index in choose_queries(query, queries):
        row = len(gallery) + index
        scores = (table.sides[0] @ table.features[row]).numpy()
        counted = np.arange(len(gallery))
        if rule is not None and pids is not None:
            out = rule(pids[[row]], pids[: len(gallery)], query.camids[[index]], gallery.camids)
            counted = np.flatnonzero(~out[0])
        best = counted[np.argsort(-scores[counted], kind="stable")[:top]]
        cells = [table.cell(row, pictures.INK, "query"), None]
        for rank, found in enumerate(best.tolist(), 1):
            color, mark = pictures.NEUTRAL, ""
            if pids is not None and pids[found] >= 0:
                color, mark = (pictures.RIGHT, "✓") if pids[found] == pids[row] else (pictures.WRONG, "✗")
            caption = f"{rank} {mark} {scores[found]:.3f}\n{short_name(gallery.names[found])}"
            cells.append(table.cell(found, color, caption))
        rows.append((short_name(query.names[index], 24), cells))
    text = (
        f"{len(rows)} random infrared queries and their best answers among {len(gallery)} visible images. "
        "Green ✓: the same person; red ✗: another; gray: not known. Below: rank, cosine similarity, name."
    )
    return text, rows


def choose_queries(images: Images, count: int) -> list[int]:
    """`count` random rows of images; of different people where identities are known."""
    drawn = np.random.default_rng(0).permutation(len(images))
    if images.pids is not None:
        drawn = drawn[images.pids[drawn] >= 0]  # without distractors
        drawn = drawn[np.sort(np.unique(images.pids[drawn], return_index=True)[1])]
    return drawn[:count].tolist()


def cluster_rows(table: Embedded, clusters: Sequence[Cluster]) -> tuple[str, list[Row]]:
    """The three largest, smallest and least certain clusters, each once, with ten images at most."""
    sizes = np.array([len(cluster.rows) for cluster in clusters])
    certainty = np.array([cluster.silhouette for cluster in clusters])
    orders = {"largest": -sizes, "smallest": sizes, "least certain": certainty}
    chosen: dict[int, list[str]] = {}
    for name, values in orders.items():
        for place in np.argsort(values, kind="stable")[:3].tolist():
            chosen.setdefault(place, []).append(name)
    rows: list[Row] = []
    for place, names in chosen.items():
        modality, members, silhouette = clusters[place]
        label = f"{', '.join(names)}\n{len(members)} {modality} images\nsilhouette {silhouette:.3f}"
        rows.append((label, [table.cell(row) for row in spread(members, 10)]))
    text = (
        f"{len(clusters)} clusters of the training images, each of one modality, by the final weights. "
        "Images near the centre come first. Blue frame: visible, orange: infrared. Silhouette: how much "
        "nearer images are to their own centre than to the nearest other one, from -1 to 1, on average. A "
        "cluster near 0 looks mixed. Others can still hold several people."
    )
    return text, rows


def match_rows(
    table: Embedded, clusters: Sequence[Cluster], similarity: np.ndarray, match: np.ndarray
) -> tuple[str, list[Row]]:
    """Six matches from the best to the worst, with the images nearest to each centre, visible ones first.

    similarity: cosines of the centres, infrared x visible, (B, A); match: bool (B, A).
    """
    pairs = np.argwhere(match)[np.argsort(-similarity[match], kind="stable")].tolist()
    rows: list[Row] = []
    for place in spread(range(len(pairs)), 6):
        infrared, visible = pairs[place]
        sides = clusters[visible], clusters[match.shape[1] + infrared]
        left, right = ([table.cell(row) for row in side.rows[:4]] for side in sides)
        label = f"match {place + 1} of {len(pairs)}\ncosine {similarity[infrared, visible]:.3f}"
        rows.append((label, [*left, None, *right]))
    text = (
        f"{len(pairs)} matches between the clusters of the two modalities, from the best to the worst by the "
        "cosine of their centres, with the images nearest to each centre."
    )
    return text, rows
