"""Choose eps and k1 of a clustering without labels: clusters, outliers and score of each setting."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecul import MODALITIES
from ecul.clustering import dbscan, encode, extend_encodings, unit_rows
from ecul.common import logs
from ecul.common.arrays import as_tensor
from ecul.common.duplicates import distinct_rows
from ecul.common.neighbors import neighbors
from ecul.config import Config
from ecul.data.dataset import Dataset
from ecul.features import extract_sides
from ecul.labels import count_clusters
from ecul.report.pictures import Panel, draw_curves
from ecul.run.scores import separation

EPS = tuple(round(0.2 + 0.05 * step, 2) for step in range(13))  # 0.2, 0.25, ... 0.8


def tune(
    features: torch.Tensor,
    cameras: torch.Tensor | None = None,
    modalities: torch.Tensor | None = None,
    *,
    k1: int | Sequence[int] = (15, 30),
    k2: int = 6,
    k3: int | None = 12,
    eps: float | Sequence[float] = EPS,
    min_samples: int = 4,
) -> list[dict[str, Any]]:
    """`emcc` of these features for every k1 and eps, from one product of similarities, and its score.

    Returns a row for each setting: k1, eps, clusters, outliers and score.

        separation(features, emcc(features, cameras, modalities, k1=k1, eps=eps, ...))     # of each row

    The arguments are those of `emcc`. The score is the simplified silhouette of the clusters, in which an
    outlier counts 0. A small eps leaves outliers, a large one merges people; the score has its maximum
    between them. Where the maximum is flat, or its clusters are far from the expected number of people, the
    features cannot tell: look at the clusters. Errors: those of `emcc`.
    """
    sizes, distances = np.ravel(k1).tolist(), sorted(np.ravel(eps).tolist())
    points = unit_rows(as_tensor("features", features))
    found = neighbors(*distinct_rows(points), max(*sizes, k2, k3 or 0))
    rows = []
    with logs.progress(len(sizes) * len(distances), "tune", "setting") as bar:
        for size in sizes:
            encodings = extend_encodings(*encode(found, size), found.ranks, cameras, modalities, k2=k2, k3=k3)
            for distance in distances:
                labels = dbscan(*encodings, eps=distance, min_samples=min_samples)
                row = {"k1": size, "eps": distance, "clusters": count_clusters(labels)}
                row |= {"outliers": int((labels < 0).sum()), "score": separation(points, labels)}
                rows.append(row)
                bar.update()
    return rows


@dataclass(frozen=True)
class Settings:
    """The rows of `tune` for each clustering of a run, and those that they recommend."""

    rows: dict[str, list[dict[str, Any]]]

    @property
    def chosen(self) -> dict[str, dict[str, Any]]:
        """The recommended row of each clustering: visible and infrared share the best mean score's."""
        found: dict[str, dict[str, Any]] = {}
        for names in (MODALITIES, ("joint",)):
            scores = np.sum([[row["score"] for row in self.rows[name]] for name in names], axis=0)
            found |= {name: self.rows[name][scores.argmax()] for name in names}
        return found

    def __str__(self) -> str:
        lines, form = [], "{k1:4d}  {eps:4.2f}  {clusters:8d}  {outliers:8d}  {score:5.3f}"
        for name, chosen in self.chosen.items():
            lines += [name, "  k1   eps  clusters  outliers  score"]
            lines += [form.format(**row) + "  <- recommended" * (row is chosen) for row in self.rows[name]]
        ends = {"": self.chosen["visible"], "_joint": self.chosen["joint"]}
        told = [f"--set {name}{end}={row[name]}" for end, row in ends.items() for name in ("k1", "eps")]
        return "\n".join([*lines, f"recommended: {' '.join(told)}"])

    def draw(self, path: str | Path) -> None:
        """Write clusters, outliers and score of each clustering over eps as a PNG, a line for each k1."""
        panels = []
        for name, best in self.chosen.items():
            rows, told = self.rows[name], f"{name}: k1 {best['k1']}, eps {best['eps']} recommended"
            for kind in ("clusters", "outliers", "score"):
                curves = {}
                for k1 in sorted({row["k1"] for row in rows}):
                    line = [float(row[kind]) for row in rows if row["k1"] == k1]
                    curves[f"k1 {k1}"] = np.array([line])
                panels.append(Panel(told, kind, curves))
        draw_curves(path, panels, over=("eps", sorted({row["eps"] for row in rows})))


def tune_config(model: Any, dataset: Dataset, config: Config, eps: Sequence[float] = EPS) -> Settings:
    """`tune` for each clustering of a run: visible, infrared, and both jointly, k1 halved and doubled.

    model: what `extract` takes; dataset: its training images are embedded. Errors: those of `extract`.
    """
    rows, cameras, sides = extract_sides(model, [getattr(dataset, m) for m in MODALITIES])
    parts = [("visible", "", sides == 0), ("infrared", "", sides == 1), ("joint", "_joint", sides >= 0)]
    found = {}
    for name, ending, own in parts:
        k1, k2, k3 = (getattr(config, size + ending) for size in ("k1", "k2", "k3"))
        sizes = {"k1": (max(1, k1 // 2), k1, 2 * k1), "k2": k2, "k3": k3}
        both = sides if name == "joint" else None
        found[name] = tune(rows[own], cameras[own], both, **sizes, eps=eps, min_samples=config.min_samples)
    return Settings(found)
