"""Scores of a clustering: its agreement with identities (a monitor), and its separation without them."""

import numpy as np
import torch
from numpy.typing import ArrayLike

from ecul.memory import cluster_means


def adjusted_rand(labels: ArrayLike, reference: ArrayLike) -> float:
    """Adjusted Rand index of labels (N,) with a reference (N,); images with -1 in either are left out.

    Equals `sklearn.metrics.adjusted_rand_score(reference[kept], labels[kept])`; NaN below two images.
    """
    labels, reference = np.asarray(labels), np.asarray(reference)
    kept = (labels >= 0) & (reference >= 0)
    if kept.sum() < 2:
        return float("nan")
    cells = np.stack([labels[kept], reference[kept]])
    sizes = [np.unique(rows, axis=-1, return_counts=True)[1] for rows in (cells, *cells)]
    both, in_a, in_b, total = (float(n @ (n - 1)) / 2 for n in (*sizes, np.array([kept.sum()])))
    expected = in_a * in_b / total
    highest = (in_a + in_b) / 2
    return 1.0 if highest == expected else (both - expected) / (highest - expected)


def separation(features: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor | None = None) -> float:
    """The mean of `silhouettes` over all images, in [-1, 1]; 0 without images."""
    return float(silhouettes(features, labels, centers).mean()) if len(labels) else 0.0


def silhouettes(
    features: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor | None = None
) -> torch.Tensor:
    """Simplified silhouette of each image: (b - a) / max(a, b), 0 for an outlier; (N,) float64.

    a: cosine distance to the image's own cluster centre; b: cosine distance to the nearest other centre.
    features: (N, D) unit rows; labels: (N,) int64, -1 = outlier; centers: (C, D), by default
    `cluster_means(features, labels)`. In [-1, 1]; 0 below two clusters.
    """
    if len(labels) == 0 or int(labels.max()) < 1:
        return torch.zeros(len(labels), dtype=torch.float64)
    if centers is None:
        centers = cluster_means(features, labels)
    found = []
    for x, y in zip(features.split(4096), labels.split(4096), strict=True):
        distance = 1 - x @ centers.T
        own = distance.gather(1, y.clamp(min=0)[:, None])[:, 0]
        other = distance.scatter(1, y.clamp(min=0)[:, None], torch.inf).amin(1)
        value = (other - own) / torch.maximum(own, other).clamp(min=1e-12)
        found.append(torch.where(y >= 0, value, 0).double())
    return torch.cat(found)
