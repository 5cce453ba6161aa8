"""Same person or not: the similarity to decide by, and how often it is wrong, without labels.

Images of different clusters nearly always show different people, however mixed the clusters are. The upper
tail of their similarities is close to a normal variable's, which reaches to the rare ones that a search among
thousands of images meets. Pairs of one camera are too much alike, so only others count where there are any.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from ecul import MODALITIES
from ecul.common.files import hash_file, read_json, reading, write_json
from ecul.common.pretrained import weights_file
from ecul.config import Config
from ecul.data.dataset import Dataset
from ecul.features import extract_sides
from ecul.labels import cluster

log = logging.getLogger("ecul")
FILE = "threshold.json"  # beside the model
SIDES = [(query, gallery) for query in MODALITIES for gallery in MODALITIES]
UNKNOWN = 0.1  # share of unknown people whose best answer reaches the threshold
TAIL = (0.1, 0.01)  # the normal variable has these shares of the pairs of different people in its tail
MOST = 1000  # queries that are compared
GALLERY = 1000  # images, of the table
NORMAL = NormalDist()


@dataclass(frozen=True)
class Threshold:
    """Thresholds of similarity for every pair of modalities.

    tails: by "query-gallery", the location and the scale of a normal variable whose upper tail is that of the
    similarities of different people. model_sha256: the hash of the weights that made the features, where they
    were read from a file. told: a table of the thresholds, for people.
    """

    tails: dict[str, tuple[float, float]]
    model_sha256: str | None = field(default=None, compare=False)
    told: str = field(default="", compare=False)

    def at(self, query: str, gallery: str, images: int) -> float:
        """The similarity that the best of so many images reaches for 10 % of unknown people.

        query, gallery: modalities; images: the size of the gallery.
        """
        location, scale = self.tails[f"{query}-{gallery}"]
        share = 1 - (1 - UNKNOWN) ** (1 / images)  # of pairs: 1 - (1 - share)^images = UNKNOWN
        return location - scale * NORMAL.inv_cdf(share)

    def save(self, model_path: str | os.PathLike) -> Path:
        """Write it beside the model, with the hash of the weights. Returns the file."""
        model = weights_file(model_path)
        pairs = {name: {"location": tail[0], "scale": tail[1]} for name, tail in self.tails.items()}
        sha256 = self.model_sha256 or hash_file(model)
        write_json(model.parent / FILE, {"pairs": pairs, "model_sha256": sha256})
        return model.parent / FILE

    @classmethod
    def load(cls, model_path: str | os.PathLike, sha256: str | None = None) -> "Threshold | None":
        """The thresholds beside a model; None where there are none, or those of another model's weights.

        sha256: that of the weights that were loaded (`model.sha256`), by default that of the file now.
        Errors: ValueError naming the file that is damaged.
        """
        model = weights_file(model_path)
        file = model.parent / FILE
        if not file.is_file():
            return None
        with reading(file):
            saved = read_json(file)
            tails = {name: (pair["location"], pair["scale"]) for name, pair in saved["pairs"].items()}
            if not np.isfinite([tails["-".join(sides)] for sides in SIDES]).all():
                raise ValueError("its numbers are not finite")
            found = cls(tails, saved["model_sha256"])
        if found.model_sha256 != (sha256 or hash_file(model)):
            log.warning("%s is of other weights than %s: nobody is marked; make it anew", FILE, model)
            return None
        return found


def measure_threshold(model: Any, dataset: Dataset, config: Config) -> Threshold:
    """`estimate_threshold` of a data set's test images, or of the training images where it has none.

    It reads identities where they are known, else the joint clusters that `config` makes, by a smaller eps
    where a modality has less than two of them. model: as for `extract`. Errors: those of `extract`.
    """
    held_out = dataset.test_visible is not None and dataset.test_infrared is not None
    images = [getattr(dataset, f"test_{m}" if held_out else m) for m in MODALITIES]
    rows, cameras, sides = extract_sides(model, images)
    if all(side.pids is not None for side in images):
        labels = torch.from_numpy(np.concatenate([side.identities() for side in images]))
        source = "identities"
    else:
        source = "clusters"
        for share in (1, 0.75, 0.5):  # one cluster can hold everybody where a network has learned little
            narrow = config.replace(eps_joint=share * config.eps_joint)
            labels = cluster(rows, cameras, sides, narrow, "_joint")
            if all(len(labels[(labels >= 0) & (sides == side)].unique()) > 1 for side in (0, 1)):
                break
    found = estimate_threshold(rows, labels, cameras, sides, source)
    return replace(found, model_sha256=getattr(model, "sha256", None))


def estimate_threshold(
    features: torch.Tensor, labels: torch.Tensor, cameras: torch.Tensor, modalities: torch.Tensor, source: str
) -> Threshold:
    """Thresholds from unit rows (N, D), labels (N,), -1 = left out, cameras (N,) and modalities (N,), 0 or 1.

    labels: joint clusters of both modalities (`emcc` with modalities) or identities, as `source` says. Images
    that the model was not trained on are the better ones. The table also counts the known people whose best
    image does not reach the threshold. By clusters they are too few: hard images are in no cluster.
    Errors: ValueError for fewer than two labels.
    """
    parts = {}
    for number, name in enumerate(MODALITIES):
        kept = (labels >= 0) & (modalities == number)
        parts[name] = [features[kept], labels[kept], cameras[kept]]
    measured = {sides: measure_pairs(parts[sides[0]], parts[sides[1]]) for sides in SIDES}
    found = Threshold({"-".join(sides): tail for sides, (tail, _) in measured.items()})
    lines = [f"similarity of the same person among {GALLERY:,} images, by {source}; known people missed"]
    for sides, (_, own) in measured.items():
        least = found.at(*sides, GALLERY)
        missed = int((own < least).sum())
        weak = ", of little use" if 2 * missed > len(own) else ""
        lines.append(f"{'-'.join(sides):17}  {least:.3f}  {missed} of {len(own)}{weak}")
    return replace(found, told="\n".join(lines))


def measure_pairs(
    query: Sequence[torch.Tensor], gallery: Sequence[torch.Tensor]
) -> tuple[tuple[float, float], torch.Tensor]:
    """The tail of queries and a gallery, as in `Threshold`, and (n,) each query's similarity to its person.

    query, gallery: features, labels and cameras. That similarity is the best one to another image of the same
    label. Pairs of two cameras count where there are any, else all pairs.
    """
    step = 1 + len(query[0]) // MOST
    x, labels, cameras = (part[::step] for part in query)
    y, y_labels, y_cameras = gallery
    cosines, same, counted = x @ y.T, labels[:, None] == y_labels, cameras[:, None] != y_cameras
    if not (counted & ~same).any():
        counted = torch.ones_like(same)
    between = cosines[counted & ~same].numpy()
    if not len(between):
        raise ValueError("threshold: needs images of two different people, or clusters, at least")
    own = counted & same
    if query is gallery:  # an image is no answer to itself
        rows = torch.arange(len(x))
        own[rows, step * rows] = False
    best = cosines.masked_fill(~own, -2).amax(1)[own.any(1)]
    low, high = np.quantile(between, [1 - share for share in TAIL]).tolist()
    at_low, at_high = (-NORMAL.inv_cdf(share) for share in TAIL)
    scale = max((high - low) / (at_high - at_low), 1e-6)
    return (low - scale * at_low, scale), best
