"""Same person or not: from which similarity on, and how often that is wrong, without labels.

How alike two images of different people are is told by images of different clusters: nearly all of them show
different people, however mixed the clusters are. The upper end of these similarities is close to a normal
variable's, which reaches to the rare ones that a search among thousands of images meets.
"""

import logging
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from ecul import MODALITIES
from ecul.common.files import hash_file, read_json, reading, write_json
from ecul.common.pretrained import weights_file
from ecul.config import Config
from ecul.data.dataset import Dataset
from ecul.data.images import check_modality
from ecul.features import extract, require_model
from ecul.labels import cluster

log = logging.getLogger("ecul")
FILE = "threshold.json"  # beside the model
TAIL = (0.1, 0.01)  # the shares of pairs of different people that the normal variable is laid through
MOST = 1000  # queries that are compared


@dataclass(frozen=True)
class Pairs:
    """Of a pair of modalities: the normal variable of different people, and of each query's own person.

    own: the quantiles 0, 5, ... 100 % of a query's best similarity to another image of its own person, empty
    where there were none.
    """

    location: float
    scale: float
    own: tuple[float, ...] = ()


@dataclass(frozen=True)
class Threshold:
    """Thresholds of similarity for every pair of modalities.

    source: "clusters" or "identities". model_sha256: the hash of the weights that made the features, where
    they were read from a file.
    """

    pairs: dict[str, Pairs]
    source: str
    model_sha256: str | None = field(default=None, compare=False)

    def at(self, query: str, gallery: str, images: int, unknown: float = 0.1) -> float:
        """The similarity that the best of so many images reaches for a share `unknown` of unknown people.

        query, gallery: modalities; images: size of the gallery. Errors: ValueError for a share not in (0, 1).
        """
        if not 0 < unknown < 1:
            raise ValueError(f"unknown must be a share between 0 and 1, got {unknown}")
        found = self._of(query, gallery)
        share = -np.expm1(np.log1p(-unknown) / max(1, images))  # of pairs: 1 - (1 - share)^images = unknown
        return float(found.location + found.scale * norm.isf(share))

    def false_matches(self, query: str, gallery: str, threshold: float) -> float:
        """The estimated share of pairs of different people that reach this similarity."""
        found = self._of(query, gallery)
        return float(norm.sf((threshold - found.location) / found.scale))

    def missed(self, query: str, gallery: str, threshold: float) -> float | None:
        """The share of queries none of whose own images reach it; by clusters, whose hard images are not in
        them, it is at least this; None where nothing is known."""
        own = self._of(query, gallery).own
        return float(np.interp(threshold, own, np.linspace(0, 1, len(own)))) if own else None

    def _of(self, query: str, gallery: str) -> Pairs:
        check_modality(query)
        check_modality(gallery)
        return self.pairs[f"{query}-{gallery}"]

    def table(self, unknown: float = 0.1) -> str:
        """Plain text: the thresholds for galleries of several sizes, and what they miss; "none" beyond 1."""
        head = f"similarity that {unknown:.0%} of unknown people reach, by {self.source}; known people missed"
        lines = [head, "query-gallery        100 images      1,000 images     10,000 images"]
        for name in self.pairs:
            sides, cells = name.split("-"), []
            for images in (100, 1000, 10_000):
                found = self.at(sides[0], sides[1], images, unknown)
                missed = self.missed(sides[0], sides[1], found)
                least = "" if self.source == "identities" else "≥ "
                told = "unknown" if missed is None else f"{least}{missed:.0%}"
                cells.append(f"{f'{found:.3f}' if found <= 1 else 'none '} ({told})".ljust(18))
            lines.append(f"{name:20} {''.join(cells)}".rstrip())
        return "\n".join(lines)

    def save(self, model_path: str | os.PathLike) -> Path:
        """Write it beside the model, whose hash goes with it. Returns the file."""
        file = weights_file(model_path)
        pairs = {name: asdict(found) for name, found in self.pairs.items()}
        sha256 = self.model_sha256 or hash_file(file)
        about = {"source": self.source, "model_sha256": sha256, "pairs": pairs}
        write_json(file.parent / FILE, about)
        return file.parent / FILE

    @classmethod
    def load(cls, model_path: str | os.PathLike, sha256: str | None = None) -> "Threshold | None":
        """The thresholds beside a model; None where there are none, or those of another model's weights.

        sha256: that of the weights that were loaded (`model.sha256`), by default that of the file now.
        Errors: ValueError naming the file that is damaged.
        """
        model = weights_file(model_path)
        if not (model.parent / FILE).is_file():
            return None
        with reading(model.parent / FILE):
            saved = read_json(model.parent / FILE)
            told = {f"{q}-{g}": saved["pairs"][f"{q}-{g}"] for q in MODALITIES for g in MODALITIES}
            pairs = {k: Pairs(p["location"], p["scale"], tuple(p["own"])) for k, p in told.items()}
            if not all(np.isfinite([p.location, p.scale, *p.own]).all() for p in pairs.values()):
                raise ValueError("its numbers are not finite")
            found = cls(pairs, str(saved["source"]), saved["model_sha256"])
        if found.model_sha256 != (sha256 or hash_file(model)):
            log.warning("%s is of other weights than %s: nobody is marked; make it anew", FILE, model)
            return None
        return found


def measure_threshold(model: Any, dataset: Dataset, config: Config) -> Threshold:
    """`estimate_threshold` of a data set's test images, or of all where it has none; by identities where they
    are known, else by the joint clusters that `config` makes.

    model: what `extract` takes. Errors: those of `extract`.
    """
    require_model(model)
    held_out = dataset.test_visible is not None and dataset.test_infrared is not None
    images = {m: getattr(dataset, f"test_{m}" if held_out else m) for m in MODALITIES}
    features = {}
    for m, side in images.items():
        features[m] = extract(model, side, m)
    if all(side.pids is not None for side in images.values()):
        labels, source = {m: images[m].pids for m in MODALITIES}, "identities"
    else:
        counts = [len(side) for side in images.values()]
        sides = torch.arange(2).repeat_interleave(torch.tensor(counts))
        cameras = torch.from_numpy(np.concatenate([side.camids for side in images.values()]))
        joint = cluster(torch.cat([*features.values()]), cameras, sides, config, "_joint")
        labels, source = dict(zip(MODALITIES, joint.split(counts), strict=True)), "clusters"
    found = estimate_threshold(features, labels, source)
    return replace(found, model_sha256=getattr(model, "sha256", None))


def estimate_threshold(features: dict[str, torch.Tensor], labels: dict[str, Any], source: str) -> Threshold:
    """Thresholds from unit rows (N, D) by modality and their labels (N,), -1 = left out.

    labels: joint clusters of both modalities (`emcc` with modalities) or identities, as `source` says. Images
    that the model was not trained on are the better ones. Errors: ValueError for fewer than two labels.
    """
    rows, found = {}, {}
    for m in MODALITIES:
        given = torch.as_tensor(labels[m]).cpu()
        rows[m] = features[m].float().cpu()[given >= 0], given[given >= 0]
    for query in MODALITIES:
        for gallery in MODALITIES:
            found[f"{query}-{gallery}"] = _compare(*rows[query], *rows[gallery], query == gallery)
    return Threshold(found, source)


def _compare(
    x: torch.Tensor, x_labels: torch.Tensor, y: torch.Tensor, y_labels: torch.Tensor, itself: bool
) -> Pairs:
    step = 1 + len(x) // MOST
    cosines = x[::step] @ y.T
    same = x_labels[::step, None] == y_labels
    between = cosines[~same].numpy()
    if not len(between):
        raise ValueError("threshold: needs images of two different people, or clusters, at least")
    if itself:  # an image is no answer to itself
        rows = torch.arange(len(cosines))
        same[rows, rows * step] = False
    own = cosines.masked_fill(~same, -2).amax(1)[same.any(1)].numpy()
    low, high = (float(np.quantile(between, 1 - share)) for share in TAIL)
    scale = max(float((high - low) / (norm.isf(TAIL[1]) - norm.isf(TAIL[0]))), 1e-6)
    quantiles = tuple(np.quantile(own, np.linspace(0, 1, 21)).tolist()) if len(own) else ()
    return Pairs(low - scale * float(norm.isf(TAIL[0])), scale, quantiles)
