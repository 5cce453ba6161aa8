"""CMC, mAP and mINP as published for SYSU-MM01, RegDB and LLCM, from distances.

The ranking of a query is the stable ascending order of its distances: **of equal distances the lower
gallery index comes first** (the published scripts leave ties to an unstable sort). Nothing is sorted here:
the rank of a positive is the number of gallery images ahead of it, and only positives need a rank.
Queries without a positive are left out of every mean.
"""

from collections.abc import Callable

import numpy as np
import torch

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
    """RegDB: nothing is ignored, the standard CMC; arguments and result as in `eval_sysu`."""
    return summarise(regdb_scores(*_checked(distmat, q_pids, g_pids)), max_rank)


def eval_llcm(distmat, q_pids, g_pids, q_camids, g_camids, max_rank: int = 20):
    """LLCM: gallery images of the query's identity *and* camera are ignored; CMC as in `eval_sysu`."""
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
    among identities, each at its first image, instead of among images.
    """
    result = np.full((len(q_pids), 3), np.nan)
    columns = np.argsort(g_pids, kind="stable")
    ids, starts = np.unique(g_pids[columns], return_index=True)
    ends = np.append(starts[1:], len(columns))
    queries = np.argsort(q_pids, kind="stable")
    for rows in np.split(queries, np.flatnonzero(np.diff(q_pids[queries])) + 1):
        place = np.searchsorted(ids, q_pids[rows[0]]) if len(rows) else len(ids)
        if place == len(ids) or ids[place] != q_pids[rows[0]]:
            continue
        distances = distmat[rows]
        if removed is not None:
            distances = np.where(removed(rows), np.inf, distances)
        positives = columns[starts[place] : ends[place]]
        first, precision, penalty = _group_scores(distances, positives)
        if by_identity:
            nearest = positives[np.argmin(distances[:, positives], axis=1)]
            ahead = _ahead(distances, nearest)[:, columns]
            first = 1 + np.logical_or.reduceat(ahead, starts, axis=1).sum(1)
        matched = np.isfinite(distances[:, positives]).any(1)
        result[rows[matched]] = np.stack([first, precision, penalty], 1)[matched]
    return result


def _group_scores(distances: np.ndarray, positives: np.ndarray):
    """Queries of one identity: `positives` are its gallery columns, ignored ones at infinity."""
    ranks = np.empty((len(distances), len(positives)))
    for column, positive in enumerate(positives):
        ranks[:, column] = 1 + _ahead(distances, positive).sum(1)
    ranks[np.isinf(distances[:, positives])] = np.inf
    ranks.sort(1)
    count = np.isfinite(ranks).sum(1)
    last = ranks[np.arange(len(ranks)), np.maximum(count, 1) - 1]
    precision = (np.arange(1, len(positives) + 1) / ranks).sum(1) / np.maximum(count, 1)
    return ranks[:, 0], precision, count / last


def _ahead(distances: np.ndarray, target) -> np.ndarray:
    """(n, G) bool: ranked before column `target` (one, or one a row); ties go to the lower column."""
    target = np.broadcast_to(target, len(distances))
    bound = distances[np.arange(len(distances)), target][:, None]
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
