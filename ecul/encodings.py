"""The steps of `emcc` that work row by row: neighbours, encodings and their extension, some rows at a time.

`clustering.py` says what each computes and checks what it is given. Rows are handled by themselves, so that
processes can share them: with `together`, each handles its own and all get the whole.
ECUL, arXiv 2412.19134.
"""

import torch

from ecul.common import distributed
from ecul.common.exact import exp, on_grid
from ecul.common.sparse import CSR, coalesced, entries, lengths, no_rows, product, stacked, times
from ecul.kernels import pair_similarity, topk_similarity

ROWS = 8192  # rows handled at a time by the steps that need more than O(k) room a row


def rank_rows(points: torch.Tensor, k: int, together: bool = False) -> torch.Tensor:
    """`rank_neighbors` of rows on the grid."""
    itself = torch.arange(len(points), device=points.device)[:, None]
    k = min(k, len(points))
    if k <= 1:
        return itself[:, :k]
    if not together:
        return torch.cat([itself, topk_similarity(points, points, k - 1, exclude_self=True)[1]], 1)
    own = itself[distributed.share(len(points))]
    near = topk_similarity(points[own[:, 0]], points, k)[1]
    others = near.gather(1, (near == own).int().sort(dim=1, stable=True).indices)[:, : k - 1]
    return distributed.join(torch.cat([own, others], 1))


def encode(points: torch.Tensor, ranks: torch.Tensor, k1: int, together: bool = False) -> CSR:
    """`reciprocal_encodings` of rows on the grid."""
    near, mutual = _reciprocal(ranks, k1)
    near_half, mutual_half = _reciprocal(ranks, round(k1 / 2) + 1)
    half = stacked([(mutual_half.sum(1), near_half[mutual_half], mutual_half[mutual_half].double())])
    parts = [no_rows(points, torch.float64)]
    for rows in _strips(points, together):
        own = coalesced(*entries(near[rows], mutual[rows].double()), (len(rows), len(points)))
        inside = (times(near[rows], mutual[rows], half) * own).coalesce()  # |H(j) & R(i)| for j in R(i)
        i, j = inside.indices()
        grow = 3 * inside.values() > 2 * half[0].diff()[j]
        expanded = (own + product(i[grow], j[grow], grow[grow].double(), len(rows), half)).coalesce()
        i, j = expanded.indices()
        weights = on_grid(exp(2 * pair_similarity(points, points, rows[i], j) - 2))
        totals = weights.new_zeros(len(rows)).index_add_(0, i, weights)
        parts.append((lengths(expanded), j, on_grid(weights / totals[i])))
    return stacked(parts, together)


def extend(
    encodings: CSR,
    ranks: torch.Tensor,
    cameras: torch.Tensor,
    modalities: torch.Tensor,
    k2: int,
    k3: int | None,
    together: bool = False,
) -> CSR:
    """`extend_encodings`."""
    codes = 2 * cameras.unique(return_inverse=True)[1] + modalities
    if k3 is None:
        codes, k3 = torch.zeros_like(codes), k2
    indptr, indices, values = encodings
    parts = [no_rows(ranks, torch.float32)]
    for rows in _strips(ranks, together):
        near = ranks[rows, :k3]
        weights = on_grid(_member_weights(codes[near], k2))
        extended = times(near, weights, (indptr, indices, values.double()))
        parts.append((lengths(extended), extended.indices()[1], extended.values().float()))
    return stacked(parts, together)


def _strips(table: torch.Tensor, together: bool) -> list[torch.Tensor]:
    """The rows of the table that are this process's to handle, some at a time."""
    rows = torch.arange(len(table), device=table.device)
    rows = rows[distributed.share(len(table))] if together else rows
    return [strip for strip in rows.split(ROWS) if len(strip)]


def _reciprocal(ranks: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of each point, in ascending order, and which of them are mutual: they make R(i, k)."""
    near = ranks[:, :k].sort(dim=1).values
    itself = torch.arange(len(near), device=near.device)[:, None]
    return near, torch.cat([(near[near[i]] == itself[i, None]).any(2) for i in itself[:, 0].split(ROWS)])


def _member_weights(codes: torch.Tensor, k2: int) -> torch.Tensor:
    """Each neighbour's weight in the extension, (rows, k3) float64, 0 for those left out; a row sums to 1.

    A member counts 1 / (modalities present * cameras of its modality present * members of its camera). Codes
    tell cameras apart: even ones are visible, odd ones infrared.
    """
    codes, order = codes.sort(dim=1, stable=True)  # a run of equals for each camera
    modalities = codes % 2
    first = codes.diff(dim=1, prepend=codes[:, :1] - 1) != 0
    run = first.cumsum(1) - 1
    members = torch.zeros_like(codes).scatter_add_(1, run, torch.ones_like(codes)).gather(1, run)
    places = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
    place = places - torch.where(first, places, 0).cummax(1).values  # within the camera
    cameras_of = torch.stack([(first & (modalities == code)).sum(1) for code in (0, 1)], 1)
    shares = (cameras_of > 0).sum(1, keepdim=True) * cameras_of.gather(1, modalities) * members.clamp(max=k2)
    weights = (place < k2) / shares.double()
    return torch.empty_like(weights).scatter_(1, order, weights)
