"""k-reciprocal re-ranking (Zhong et al., Re-ranking Person Re-identification, CVPR 2017), and its relative
that is aware of modalities."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix

from ecul.clustering import extend_encodings, rank_neighbors, reciprocal_encodings

_LIMIT = 20_000


def k_reciprocal_distances(
    query: torch.Tensor, gallery: torch.Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> np.ndarray:
    """`(1 - weight) * jaccard + weight * squared Euclidean` between unit rows, as (Q, G) float32.

    query (Q, D), gallery (G, D) float tensors of unit rows. As in the published code the Euclidean
    distances are divided by the largest of each column of the joint matrix. Dense over Q + G rows:
    ValueError beyond 20,000.
    """
    total = len(query) + len(gallery)
    if total > _LIMIT:
        raise ValueError(
            f"rerank: {total} images together make a dense {total} x {total} matrix; at most {_LIMIT}"
        )
    points = torch.cat([query, gallery]).float()
    squared = (2 - 2 * (points @ points.T)).clamp_(min=0)
    scaled = (squared / squared.max(0).values.clamp_min(1e-12)).T.contiguous()
    order = torch.sort(scaled, dim=1, stable=True).indices[:, : k1 + 1].numpy()
    original = scaled.numpy()
    encoded = _encode(original, order, k1)
    if k2 > 1:
        encoded = np.stack([encoded[near].mean(0) for near in order[:, :k2]])
    return (1 - weight) * _jaccard(encoded, len(query)) + weight * original[: len(query), len(query) :]


def _reciprocal(order: np.ndarray, row: int, k: int) -> np.ndarray:
    near = order[row, : k + 1]
    return near[(order[near, : k + 1] == row).any(1)]


def _encode(original: np.ndarray, order: np.ndarray, k1: int) -> np.ndarray:
    """Softmax weights over the expanded k-reciprocal set of each row, zero elsewhere."""
    half = [_reciprocal(order, row, round(k1 / 2)) for row in range(len(order))]
    encoded = np.zeros_like(original)
    for row in range(len(order)):
        core = _reciprocal(order, row, k1)
        fits = [half[j] for j in core if np.isin(half[j], core).sum() > 2 / 3 * len(half[j])]
        members = np.unique(np.concatenate([core, *fits]))
        weights = np.exp(-original[row, members])
        encoded[row, members] = weights / weights.sum()
    return encoded


def _jaccard(encoded: np.ndarray, queries: int) -> np.ndarray:
    gallery = encoded[queries:]
    distances = np.empty((queries, len(gallery)), np.float32)
    for row in range(queries):
        held = np.flatnonzero(encoded[row])
        shared = np.minimum(encoded[row, held], gallery[:, held]).sum(1)
        distances[row] = 1 - shared / (2 - shared)
    return distances


def modality_distances(
    query: torch.Tensor, gallery: torch.Tensor, k1: int = 20, k2: int = 6, k3: int = 20, weight: float = 0.3
) -> np.ndarray:
    """`(1 - weight) * jaccard + weight * (1 - cosine)` between unit rows of two modalities, (Q, G) float32.

    query (Q, D), gallery (G, D) float tensors of unit rows. The encodings are EMCC's: averaged over the k2
    nearest of each modality among the k3 nearest, so that the crowd of one's own modality counts no more than
    the few of the other. Memory is that of the encodings and of the result.
    Source: ECUL for the encodings; their use in re-ranking is ours.
    """
    points = torch.cat([query, gallery]).float().cpu()
    sides = torch.arange(len(points)) >= len(query)
    ranks = rank_neighbors(points, max(k1, k3))
    encoded = reciprocal_encodings(points, ranks, k1)
    indptr, indices, values = extend_encodings(*encoded, ranks, None, sides.long(), k2, k3)
    rows = csr_matrix((values.numpy(), indices.numpy(), indptr.numpy()), shape=(len(points),) * 2)
    columns = rows[len(query) :].tocsc()
    distances = (weight * (1 - query.float().cpu() @ gallery.float().cpu().T)).numpy()
    for row in range(len(query)):
        held = columns[:, rows[row].indices]
        held.data = np.minimum(held.data, np.repeat(rows[row].data, np.diff(held.indptr)))
        shared = np.asarray(held.sum(1))[:, 0]
        distances[row] += (1 - weight) * (1 - shared / (2 - shared))
    return distances


class Reranking(NamedTuple):
    """Distances (Q, G) from unit rows of queries and gallery, and their settings in words."""

    distances: Callable[[torch.Tensor, torch.Tensor], np.ndarray]
    settings: str


RERANKINGS = {
    "k-reciprocal": Reranking(k_reciprocal_distances, "k1=20, k2=6, lambda=0.3"),
    "modality": Reranking(modality_distances, "k1=20, k2=6, k3=20, lambda=0.3"),
}
