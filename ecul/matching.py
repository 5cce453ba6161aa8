"""Correspondences across the modalities: clusters with clusters, images with images.

MBCCM: https://arxiv.org/abs/2305.12673, ECUL: https://arxiv.org/abs/2412.19134
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ecul.common.arrays import same_kind
from ecul.kernels import topk_similarity


@same_kind
def match_clusters(visible: torch.Tensor, infrared: torch.Tensor, rule: str = "bilateral") -> torch.Tensor:
    """Which infrared cluster belongs with which visible cluster: a bool matrix (B infrared, A visible).

        D = 2 - 2 * infrared @ visible.T
        match[i] |= D[i] <= D[i, j]          for (i, j) of the one-to-one assignment
        match[:, j] |= D[:, j] <= D[i, j]    for (i, j) of the assignment that covers the bigger side

    Rows are infrared and columns visible. Where a code base wants one match of each cluster, the nearest one:

        near = np.where(match, infrared @ visible.T, -np.inf)     # of unit rows
        r2i = dict(enumerate(near.argmax(0)))    # the infrared cluster of each visible one
        i2r = dict(enumerate(near.argmax(1)))    # the visible cluster of each infrared one

    visible: (A, D) and infrared: (B, D) cluster centres, tensors or arrays; rows are normalised here.
    rule: "bilateral", as above; every row and every column has a match. "mutual" [R]: pairs that are each
    other's nearest after the mean centre of each side is subtracted; a row or column has one match at most.
    With "mutual", visible may be (W, A, D): W views of the clusters, each with its own mean, and the most
    similar view counts.
    Returns a tensor on the device of `visible`, or an array where both are arrays. Not symmetric when A != B.
    Errors: ValueError for an empty side, sizes that differ, zero or non-finite rows, an unknown rule.
    Source: MBCCM section 3.2 and its published code.
    """
    if rule not in ("bilateral", "mutual"):
        raise ValueError(f"rule must be bilateral or mutual, got {rule!r}")
    several = rule == "mutual" and visible.ndim == 3 and len(visible) > 0
    views = [_unit_rows("visible", view) for view in (visible if several else visible[None])]
    across = _unit_rows("infrared", infrared)
    if views[0].shape[1] != across.shape[1]:
        sizes = f"{views[0].shape[1]} and {across.shape[1]}"
        raise ValueError(f"visible and infrared must have as many features as each other, got {sizes}")
    if rule == "mutual":
        across, *views = map(_without_mean, [across, *views])
    distance = np.minimum.reduce([2 - 2 * across @ view.T for view in views])
    matched = _bilateral(distance) if rule == "bilateral" else _mutual(distance)
    return torch.from_numpy(matched).to(visible.device)


def _bilateral(distance: np.ndarray) -> np.ndarray:
    matched = np.zeros(distance.shape, dtype=bool)
    one_to_one, covering = _assign(distance)
    for i, j in zip(*one_to_one, strict=True):
        matched[i] |= distance[i] <= distance[i, j]
    for i, j in zip(*covering, strict=True):
        matched[:, j] |= distance[:, j] <= distance[i, j]
    return matched


def _mutual(distance: np.ndarray) -> np.ndarray:
    matched, rows = np.zeros(distance.shape, dtype=bool), np.arange(len(distance))
    columns = distance.argmin(1)
    matched[rows, columns] = distance.argmin(0)[columns] == rows
    return matched


def _without_mean(rows: np.ndarray) -> np.ndarray:
    """Each row minus the mean row, as a unit row; a row equal to the mean becomes zero."""
    apart = rows - rows.mean(0)
    return apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-12)


def _assign(distance: np.ndarray) -> list[tuple]:
    """Minimum-cost pairs (rows, columns): one-to-one, and with every cluster of the bigger side once."""
    if distance.shape[0] > distance.shape[1]:
        return [pairs[::-1] for pairs in _assign(distance.T)]
    small, big = distance.shape
    tiled = np.tile(distance, (big // small + 1, 1))
    rows, columns = linear_sum_assignment(tiled)
    return [linear_sum_assignment(distance), (rows % small, columns)]


def _unit_rows(name: str, centers: torch.Tensor) -> np.ndarray:
    rows = centers.detach().cpu().double().numpy()
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise ValueError(
            f"{name} must be a (clusters, features) matrix of at least one cluster, got {rows.shape}; "
            "a modality without clusters cannot be matched: raise eps or lower min_samples"
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        raise ValueError(
            f"{name} centres must be finite and not zero, got row {bad[0]} = {rows[bad[0], :4]}..."
        )
    return rows / norms


def select_instances(
    visible: torch.Tensor,
    infrared: torch.Tensor,
    labels_visible: torch.Tensor,
    labels_infrared: torch.Tensor,
    k: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inter-modality instance selection: keep the joint labels that a neighbour across modalities confirms.

    Image i keeps its label if some image j of the other modality has the same label, j is among the k nearest
    of i there, and i is among the k nearest of j.

    visible: (A, D), infrared: (B, D) unit features, one or more each; labels: (A,), (B,) int64 joint labels,
    -1 = outlier; k is clamped to the sizes. Returns both, with -1 for every image that is not confirmed.
    Source: ECUL selects images across modalities; this rule is our reconstruction [R].
    """
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
