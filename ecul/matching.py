"""Correspondences across the modalities: clusters with clusters, images with images.

MBCCM: https://arxiv.org/abs/2305.12673, ECUL: https://arxiv.org/abs/2412.19134
"""

from typing import TypeVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ecul.kernels import topk_similarity

RULES = ("bilateral", "nearest", "mutual")
Rows = TypeVar("Rows", torch.Tensor, np.ndarray)


def match_clusters(visible: Rows, infrared: Rows, rule: str = "bilateral") -> Rows:
    """Which infrared cluster belongs with which visible one: two assignments, each widened, united.

        D = 2 - 2 * infrared @ visible.T
        match[i] |= D[i] <= D[i, j]          for (i, j) of the one-to-one assignment
        match[:, j] |= D[:, j] <= D[i, j]    for (i, j) of the assignment that covers the bigger side

    visible: (A, D) and infrared: (B, D) cluster centres, tensors or arrays; rows are normalised here.
    rule: "bilateral", as above; "nearest": each cluster with its nearest one, a baseline for ablations;
    "mutual" [R]: those that are each other's nearest once the mean centre of each side is taken off, where
    visible may be (W, A, D), W views of the clusters with a mean each, of which the most similar one counts.
    Returns a bool (B, A) of the kind given (a tensor on the input's device, or an array). Every row and
    every column has a match, or with "mutual" at most one. The result is not symmetric when A != B.
    Errors: ValueError for an empty side, sizes that differ, zero or non-finite rows, an unknown rule.
    Source: MBCCM section 3.2 and its published code.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    views: list[Rows] = list(visible) if rule == "mutual" and visible.ndim == 3 else [visible]
    if not views:
        raise ValueError("visible must be at least one view of the clusters, got none")
    sides = [*(_unit_rows(view, "visible") for view in views), _unit_rows(infrared, "infrared")]
    if len({side.shape[1] for side in sides}) > 1:
        sizes = f"{sides[0].shape[1]} and {sides[-1].shape[1]}"
        raise ValueError(f"visible and infrared must have as many features as each other, got {sizes}")
    if rule == "mutual":
        sides = [_without_mean(side) for side in sides]
    distance = np.minimum.reduce([2 - 2 * sides[-1] @ view.T for view in sides[:-1]])
    matched = {"bilateral": _bilateral, "nearest": _nearest, "mutual": _mutual}[rule](distance)
    if isinstance(visible, torch.Tensor):
        return torch.from_numpy(matched).to(visible.device)
    return matched


def _bilateral(distance: np.ndarray) -> np.ndarray:
    matched = np.zeros(distance.shape, dtype=bool)
    one_to_one, covering = _assign(distance)
    for i, j in zip(*one_to_one, strict=True):
        matched[i] |= distance[i] <= distance[i, j]
    for i, j in zip(*covering, strict=True):
        matched[:, j] |= distance[:, j] <= distance[i, j]
    return matched


def _nearest(distance: np.ndarray) -> np.ndarray:
    return (distance == distance.min(0)) | (distance == distance.min(1, keepdims=True))


def _mutual(distance: np.ndarray) -> np.ndarray:
    matched, rows = np.zeros(distance.shape, dtype=bool), np.arange(len(distance))
    columns = distance.argmin(1)
    matched[rows, columns] = distance.argmin(0)[columns] == rows
    return matched


def _without_mean(rows: np.ndarray) -> np.ndarray:
    """Unit rows of what sets each one apart from their mean; zero where nothing does."""
    apart = rows - rows.mean(0)
    return apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-12)


def _assign(distance: np.ndarray) -> list[tuple]:
    """Minimum-cost pairs (rows, columns): one-to-one, and with each cluster of the bigger side once."""
    if distance.shape[0] > distance.shape[1]:
        return [pairs[::-1] for pairs in _assign(distance.T)]
    small, big = distance.shape
    tiled = np.tile(distance, (big // small + 1, 1))
    rows, columns = linear_sum_assignment(tiled)
    return [linear_sum_assignment(distance), (rows % small, columns)]


def _unit_rows(centers: torch.Tensor | np.ndarray, name: str) -> np.ndarray:
    rows = np.asarray(
        centers.detach().cpu().double() if isinstance(centers, torch.Tensor) else centers, dtype=np.float64
    )
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise ValueError(
            f"{name} must be a (clusters, features) matrix of at least one cluster, got {rows.shape}; "
            "a modality without clusters cannot be matched: loosen eps or min_samples"
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        bad = int(np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))[0])
        raise ValueError(f"{name} centres must be finite and not zero, got row {bad} = {rows[bad, :4]}...")
    return rows / norms


def select_instances(
    visible: torch.Tensor,
    infrared: torch.Tensor,
    labels_visible: torch.Tensor,
    labels_infrared: torch.Tensor,
    k: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inter-modality instance selection: joint labels that a mutual neighbour across modalities confirms.

        keeps its label <=> some j of the k nearest of the other modality has the same joint label
                            and counts the image among its own k nearest across

    visible: (A, D), infrared: (B, D) unit features; labels: (A,), (B,) int64 joint labels, -1 = outlier; k is
    clamped to the sizes. Returns both label vectors with -1 for every image that is not confirmed.
    Source: ECUL (that images are selected across modalities); the rule is our reconstruction [R].
    """
    if len(visible) == 0 or len(infrared) == 0:
        return torch.full_like(labels_visible, -1), torch.full_like(labels_infrared, -1)
    nearest_v = topk_similarity(visible, infrared, min(k, len(infrared)))[1]
    nearest_r = topk_similarity(infrared, visible, min(k, len(visible)))[1]
    kept_v = _confirmed(nearest_v, nearest_r, labels_visible, labels_infrared)
    kept_r = _confirmed(nearest_r, nearest_v, labels_infrared, labels_visible)
    return torch.where(kept_v, labels_visible, -1), torch.where(kept_r, labels_infrared, -1)


def _confirmed(
    nearest: torch.Tensor, nearest_back: torch.Tensor, labels: torch.Tensor, labels_across: torch.Tensor
) -> torch.Tensor:
    own = torch.arange(len(nearest), device=nearest.device)[:, None, None]
    mutual = (nearest_back[nearest] == own).any(dim=2)
    return (mutual & (labels_across[nearest] == labels[:, None])).any(dim=1) & (labels >= 0)
