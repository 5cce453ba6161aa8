"""CMC, mAP and mINP as published for SYSU-MM01, RegDB and LLCM, from distances.

The ranking of a query is the stable ascending order of its distances: **of equal distances the lower
gallery index comes first** (the published scripts leave ties to an unstable sort). Nothing is sorted here:
the rank of a positive is the number of gallery images ahead of it, and only positives need a rank.
Queries without a positive are left out of every mean.
"""

from collections.abc import Callable

import numpy as np
import torch

_BLOCK = 4_000_000  # distances at a time
Removed = Callable[[np.ndarray], np.ndarray]


def eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids, max_rank: int = 20):
    """SYSU-MM01: camera 3 queries ignore camera 2; CMC on the first image of each identity, mAP on all.

    distmat (Q, G) floats, smaller is nearer; the rest rows of integers; NumPy or torch. Returns
    (cmc, mAP, mINP): cmc (max_rank,) float64 and two floats, all between 0 and 1; beyond the last identity
    of the gallery the cmc keeps its last value. Raises ValueError for NaN distances, lengths that do not
    agree, or when no query has a match.
    """
    arrays = _checked(distmat, q_pids, g_pids, q_camids, g_camids)
    return summarise(sysu_scores(*arrays), max_rank)


def eval_regdb(distmat, q_pids, g_pids, max_rank: int = 20):
    """RegDB: nothing is ignored, the standard CMC.

    distmat (Q, G) floats, smaller is nearer; q_pids (Q,), g_pids (G,) integers; NumPy or torch. Returns
    (cmc, mAP, mINP) as `eval_sysu` does. Errors: those of `eval_sysu`.
    """
    return summarise(regdb_scores(*_checked(distmat, q_pids, g_pids)), max_rank)


def eval_llcm(distmat, q_pids, g_pids, q_camids, g_camids, max_rank: int = 20):
    """LLCM: gallery images of the query's identity *and* camera are ignored; CMC as in `eval_sysu`.

    distmat (Q, G) floats, smaller is nearer; the rest (Q,) and (G,) integers; NumPy or torch. Returns
    (cmc, mAP, mINP) as `eval_sysu` does. Errors: those of `eval_sysu`.
    """
    arrays = _checked(distmat, q_pids, g_pids, q_camids, g_camids)
    return summarise(llcm_scores(*arrays), max_rank)


def sysu_scores(distmat, q_pids, g_pids, q_camids, g_camids) -> np.ndarray:
    """The scores of each query under SYSU-MM01's rules, as `scores` gives them."""

    def removed(rows):
        return (q_camids[rows, None] == 3) & (g_camids == 2)

    return scores(distmat, q_pids, g_pids, removed, by_identity=True)


def regdb_scores(distmat, q_pids, g_pids, q_camids=None, g_camids=None) -> np.ndarray:
    """The scores of each query under RegDB's rules; cameras are not looked at."""
    return scores(distmat, q_pids, g_pids)


def llcm_scores(distmat, q_pids, g_pids, q_camids, g_camids) -> np.ndarray:
    """The scores of each query under LLCM's rules."""

    def removed(rows):
        return (q_pids[rows, None] == g_pids) & (q_camids[rows, None] == g_camids)

    return scores(distmat, q_pids, g_pids, removed, by_identity=True)


def scores(distmat, q_pids, g_pids, removed: Removed | None = None, by_identity: bool = False) -> np.ndarray:
    """(Q, 3) float64: rank of the first match, average precision, inverse negative penalty; NaN: no match.

    removed(rows) -> (n, G) bool marks what those queries ignore. by_identity: the first column is the rank
    among identities, each at its first image, instead of among images. Works on a block of queries at a
    time, so that its memory does not grow with their number.
    """
    result = np.full((len(q_pids), 3), np.nan)
    block = max(1, _BLOCK // max(1, len(g_pids)))
    for start in range(0, len(q_pids) if len(g_pids) else 0, block):
        rows = np.arange(start, min(start + block, len(q_pids)))
        distances = distmat[rows[0] : rows[-1] + 1]
        if removed is not None:
            distances = np.where(removed(rows), np.inf, distances)
        result[rows] = _block_scores(distances, q_pids[rows], g_pids, by_identity)
    return result


def _block_scores(distances: np.ndarray, q_pids, g_pids, by_identity: bool) -> np.ndarray:
    """`scores` of a few queries; what a query ignores lies at infinity."""
    columns = np.argsort(g_pids, kind="stable")
    ids, starts, sizes = np.unique(g_pids[columns], return_index=True, return_counts=True)
    place = np.searchsorted(ids, q_pids).clip(max=len(ids) - 1)
    held = np.where(ids[place] == q_pids, sizes[place], 0)
    offsets = np.arange(max(1, held.max()))
    positives = columns[(starts[place][:, None] + offsets).clip(max=len(columns) - 1)]
    bounds = np.where(offsets < held[:, None], np.take_along_axis(distances, positives, 1), np.inf)

    ranks = np.full(bounds.shape, np.inf)
    for column in offsets:
        ranks[:, column] = 1 + _ahead(distances, positives[:, column]).sum(1)
    ranks[np.isinf(bounds)] = np.inf
    ranks.sort(1)
    count = np.isfinite(ranks).sum(1)
    matched = count > 0
    count = np.maximum(count, 1)
    last = np.take_along_axis(ranks, count[:, None] - 1, 1)[:, 0]
    precision = ((offsets + 1) / ranks).sum(1) / count
    first = ranks[:, 0]
    if by_identity:
        nearest = np.take_along_axis(positives, bounds.argmin(1)[:, None], 1)[:, 0]
        ahead = _ahead(distances, nearest)[:, columns]
        first = 1 + np.logical_or.reduceat(ahead, starts, axis=1).sum(1)
    return np.where(matched[:, None], np.stack([first, precision, count / last], 1), np.nan)


def _ahead(distances: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(n, G) bool: ranked before column `target` of its row; ties go to the lower column."""
    bound = np.take_along_axis(distances, target[:, None], 1)
    tied_and_earlier = (distances == bound) & (np.arange(distances.shape[1]) < target[:, None])
    return (distances < bound) | tied_and_earlier


def summarise(values: np.ndarray, max_rank: int = 20):
    """(cmc, mAP, mINP) of the scores of all queries; ValueError when no query has a match."""
    matched = values[~np.isnan(values[:, 0])]
    if not len(matched):
        raise ValueError("no query has a match in the gallery: check q_pids, g_pids and the cameras")
    cmc = (matched[:, :1] <= np.arange(1, max_rank + 1)).mean(0)
    return cmc, float(matched[:, 1].mean()), float(matched[:, 2].mean())


def _checked(distmat, q_pids, g_pids, q_camids=None, g_camids=None) -> list[np.ndarray]:
    names = ("distmat", "q_pids", "g_pids", "q_camids", "g_camids")
    arrays = [_numpy(value) for value in (distmat, q_pids, g_pids, q_camids, g_camids) if value is not None]
    if arrays[0].ndim != 2 or arrays[0].dtype.kind not in "fiu":
        raise ValueError(
            f"distmat: expected (queries, gallery) numbers, not {arrays[0].dtype} {arrays[0].shape}"
        )
    for name, values, length in zip(names[1:], arrays[1:], arrays[0].shape * 2, strict=False):
        if values.shape != (length,):
            raise ValueError(
                f"{name}: expected {length} values for distmat {arrays[0].shape}, not {values.shape}"
            )
    if arrays[0].dtype.kind == "f" and not np.isfinite(arrays[0]).all():
        raise ValueError("distmat: holds NaN or infinite distances")
    return arrays


def _numpy(value) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
