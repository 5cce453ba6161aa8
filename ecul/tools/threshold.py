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
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import norm

from ecul import MODALITIES
from ecul.common.files import hash_file, read_json, reading, write_json
from ecul.common.pretrained import weights_file
from ecul.config import Config
from ecul.data.dataset import Dataset
from ecul.data.images import check_modality
from ecul.features import extract
from ecul.labels import cluster

log = logging.getLogger("ecul")
FILE = "threshold.json"  # beside the model
SIDES = [(query, gallery) for query in MODALITIES for gallery in MODALITIES]
TAIL = (0.1, 0.01)  # the normal variable has these shares of the pairs of different people in its tail
MOST = 1000  # queries that are compared
GALLERIES = (100, 1000, 10_000)  # images, of the table


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

    def at(self, query: str, gallery: str, images: int, unknown: float = 0.1) -> float:
        """The similarity that the best of so many images reaches for a share `unknown` of unknown people.

        query, gallery: modalities; images: size of the gallery. Errors: ValueError for another modality, or a
        share that is not between 0 and 1.
        """
        check_modality(query)
        check_modality(gallery)
        if not 0 < unknown < 1:
            raise ValueError(f"unknown must be a share between 0 and 1, got {unknown!r}")
        location, scale = self.tails[f"{query}-{gallery}"]
        share = -np.expm1(np.log1p(-unknown) / max(1, images))  # of pairs: 1 - (1 - share)^images = unknown
        return float(location + scale * norm.isf(share))

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
            pairs = {name: saved["pairs"][name] for name in map("-".join, SIDES)}
            tails = {name: (pair["location"], pair["scale"]) for name, pair in pairs.items()}
            if not np.isfinite([*tails.values()]).all():
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
    images = {m: getattr(dataset, f"test_{m}" if held_out else m) for m in MODALITIES}
    features = {m: extract(model, side, m) for m, side in images.items()}
    cameras = {m: torch.from_numpy(side.camids) for m, side in images.items()}
    if all(side.pids is not None for side in images.values()):
        labels = {m: torch.from_numpy(side.identities()) for m, side in images.items()}
        source = "identities"
    else:
        counts = [len(side) for side in images.values()]
        sides = torch.arange(2).repeat_interleave(torch.tensor(counts))
        rows, codes = torch.cat([*features.values()]), torch.cat([*cameras.values()])
        for share in (1, 0.75, 0.5):  # one cluster can hold everybody where a network has learned little
            narrow = config.replace(eps_joint=share * config.eps_joint)
            joint = cluster(rows, codes, sides, narrow, "_joint").split(counts)
            if all(len(part[part >= 0].unique()) > 1 for part in joint):
                break
        labels, source = dict(zip(MODALITIES, joint, strict=True)), "clusters"
    found = estimate_threshold(features, labels, cameras, source)
    return replace(found, model_sha256=getattr(model, "sha256", None))


def estimate_threshold(
    features: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    cameras: dict[str, torch.Tensor],
    source: str,
) -> Threshold:
    """Thresholds from unit rows (N, D) by modality, their labels (N,), -1 = left out, and their cameras (N,).

    labels: joint clusters of both modalities (`emcc` with modalities) or identities, as `source` says. Images
    that the model was not trained on are the better ones. Pairs of two cameras count where there are any,
    else all pairs. Errors: ValueError for fewer than two labels.
    """
    rows = {m: [part[m][labels[m] >= 0] for part in (features, labels, cameras)] for m in MODALITIES}
    pairs = {sides: measure_pairs(*(rows[m] for m in sides)) for sides in SIDES}
    found = Threshold({"-".join(sides): pair.tail for sides, pair in pairs.items()})
    return replace(found, told=thresholds_table(found, pairs, source))


class Pairs(NamedTuple):
    """Queries of one modality and a gallery of another, or of the same.

    tail: as in `Threshold`. own: (n,) each query's best similarity to another image of its own person. apart:
    whether all pairs are of two cameras.
    """

    tail: tuple[float, float]
    own: np.ndarray
    apart: bool


def measure_pairs(query: Sequence[torch.Tensor], gallery: Sequence[torch.Tensor]) -> Pairs:
    """The statistics of queries and a gallery, each given as features, labels and cameras."""
    (x, x_labels, x_cameras), (y, y_labels, y_cameras) = query, gallery
    step = 1 + len(x) // MOST
    cosines = x[::step] @ y.T
    same = x_labels[::step, None] == y_labels
    apart = x_cameras[::step, None] != y_cameras
    known = bool((apart & ~same).any())
    counted = apart if known else torch.ones_like(apart)
    between = cosines[counted & ~same].numpy()
    if not len(between):
        raise ValueError("threshold: needs images of two different people, or clusters, at least")
    if query is gallery:  # an image is no answer to itself
        rows = torch.arange(len(cosines))
        same[rows, rows * step] = False
    own = cosines.masked_fill(~(same & counted), -2).amax(1)[(same & counted).any(1)].numpy()
    low, high = (float(np.quantile(between, 1 - share)) for share in TAIL)
    scale = max(float((high - low) / (norm.isf(TAIL[1]) - norm.isf(TAIL[0]))), 1e-6)
    return Pairs((low - scale * float(norm.isf(TAIL[0])), scale), own, known)


def thresholds_table(found: Threshold, pairs: dict[tuple[str, str], Pairs], source: str) -> str:
    """The thresholds and the known people missed for galleries of several sizes, and cautions.

    "none" stands for a threshold above 1, which no image reaches. By clusters the share of people missed is a
    lower bound, because hard images are in no cluster.
    """
    lines = [f"similarity that 10% of unknown people reach, by {source}; known people missed"]
    lines.append("query-gallery        100 images      1,000 images     10,000 images")
    least, weak = "" if source == "identities" else "≥ ", []
    for sides, pair in pairs.items():
        cells = []
        for images in GALLERIES:
            reached = found.at(*sides, images)
            missed = float((pair.own < reached).mean()) if len(pair.own) else None
            told = "unknown" if missed is None else f"{least}{missed:.0%}"
            cells.append(f"{f'{reached:.3f}' if reached <= 1 else 'none '} ({told})".ljust(18))
            weak += ["-".join(sides)] * (images == GALLERIES[1] and (reached > 1 or (missed or 0) > 0.5))
        lines.append(f"{'-'.join(sides):20} {''.join(cells)}".rstrip())
    if weak:
        lines.append(f"of little use: most known people are missed among 1,000 images: {', '.join(weak)}")
    if same := ["-".join(sides) for sides, pair in pairs.items() if not pair.apart]:
        lines.append(f"of one camera, or cameras are not known; others miss more: {', '.join(same)}")
    return "\n".join(lines)
