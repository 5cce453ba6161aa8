"""CMC, mAP and mINP as published for SYSU-MM01, RegDB and LLCM, from distances.

The ranking of a query is the stable ascending order of its distances: **the lower gallery index comes first
among equal distances** (the published scripts use an unstable sort). Few positives are ranked without a sort:
the rank of a positive is the number of gallery images ahead of it.
Queries without a positive are left out of every mean. A negative identity marks a distractor: it is ranked
in the gallery but matches no query; as a query it is left out.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike as Array

from ecul.data.images import as_numpy

_BLOCK = 8_000_000  # distances at a time
_FEW = 32  # up to so many positives of a query, counting the images ahead of each is faster than sorting
Metrics = tuple[np.ndarray, float, float]


class Scoring(NamedTuple):
    """Whether the CMC ranks identities, each at its first image; the images that a query ignores, (Q, G)."""

    by_identity: bool
    ignored: Callable[..., np.ndarray] | None = None


SCORING = {
    "sysu": Scoring(True, lambda q_pid, g_pid, q_cam, g_cam: (q_cam[:, None] == 3) & (g_cam == 2)),
    "regdb": Scoring(False),
    "llcm": Scoring(
        True, lambda q_pid, g_pid, q_cam, g_cam: (q_pid[:, None] == g_pid) & (q_cam[:, None] == g_cam)
    ),
}


def eval_sysu(
    distmat: Array, q_pids: Array, g_pids: Array, q_camids: Array, g_camids: Array, max_rank: int = 20
) -> Metrics:
    """SYSU-MM01: camera 3 queries ignore camera 2; CMC on the first image of each identity, mAP on all.

    distmat: (Q, G) floats, smaller is nearer; q_pids, q_camids: (Q,) and g_pids, g_camids: (G,) integers;
    NumPy or torch. Returns (cmc, mAP, mINP): cmc (max_rank,) float64 and two floats, all between 0 and 1;
    after the last identity of the gallery the cmc keeps its last value. Raises ValueError for distances that
    are not finite, lengths that do not agree, or when no query has a match.
    """
    return _evaluate("sysu", max_rank, distmat, q_pids, g_pids, q_camids, g_camids)


def eval_regdb(distmat: Array, q_pids: Array, g_pids: Array, max_rank: int = 20) -> Metrics:
    """RegDB: nothing is ignored, the standard CMC.

    distmat (Q, G) floats, q_pids (Q,), g_pids (G,), the result and the errors: as for `eval_sysu`.
    """
    return _evaluate("regdb", max_rank, distmat, q_pids, g_pids)


def eval_llcm(
    distmat: Array, q_pids: Array, g_pids: Array, q_camids: Array, g_camids: Array, max_rank: int = 20
) -> Metrics:
    """LLCM: gallery images of the query's identity *and* camera are ignored; CMC as in `eval_sysu`.

    distmat (Q, G) floats, integers (Q,) and (G,), the result and the errors: as for `eval_sysu`.
    """
    return _evaluate("llcm", max_rank, distmat, q_pids, g_pids, q_camids, g_camids)


def _evaluate(protocol: str, max_rank: int, distmat: Array, *rows: Array) -> Metrics:
    """Check the arguments of one of the three `eval_*`, then score all queries."""
    names = ("q_pids", "g_pids", "q_camids", "g_camids")
    distances, arrays = as_numpy("distmat", distmat), list(map(as_numpy, names, rows))
    if distances.ndim != 2:
        raise ValueError(f"distmat: expected (queries, gallery) numbers, not {distances.shape}")
    for name, values, length in zip(names, arrays, distances.shape * 2, strict=False):
        if values.shape != (length,):
            told = f"expected {length} values for distmat {distances.shape}"
            raise ValueError(f"{name}: {told}, not {values.shape}")
    if not np.isfinite(distances).all():
        raise ValueError("distmat: holds NaN or infinite distances")
    return summarise(score_queries(protocol, distances.__getitem__, *arrays), max_rank)


def score_queries(
    protocol: str,
    distances: Callable[[slice], np.ndarray],
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    *camids: np.ndarray,
) -> np.ndarray:
    """(Q, 3) float64: rank of the first match, average precision, inverse negative penalty; NaN: no match.

    distances: a function from a slice of the queries to (n, G); it is called for one block at a time, so that
    memory does not grow with their number. camids: of queries and gallery, where the protocol uses them.
    """
    scoring, result = SCORING[protocol], np.full((len(q_pids), 3), np.nan)
    block = max(1, _BLOCK // max(1, len(g_pids)))
    for start in range(0, len(q_pids) if len(g_pids) else 0, block):
        rows = slice(start, start + block)
        counted = distances(rows)
        if scoring.ignored is not None:
            ignored = scoring.ignored(q_pids[rows], g_pids, camids[0][rows], camids[1])
            counted = np.where(ignored, np.inf, counted)
        result[rows] = _block_scores(counted, q_pids[rows], g_pids, scoring.by_identity)
    return result


def _block_scores(
    distances: np.ndarray, q_pids: np.ndarray, g_pids: np.ndarray, by_identity: bool
) -> np.ndarray:
    """`score_queries` of a few queries; ignored images have infinite distances."""
    columns = np.argsort(g_pids, kind="stable")
    ids, starts, sizes = np.unique(g_pids[columns], return_index=True, return_counts=True)
    place = np.searchsorted(ids, q_pids).clip(max=len(ids) - 1)
    held = np.where((ids[place] == q_pids) & (q_pids >= 0), sizes[place], 0)
    offsets = np.arange(max(1, held.max()))
    positives = columns[(starts[place][:, None] + offsets).clip(max=len(columns) - 1)]
    bounds = np.where(offsets < held[:, None], np.take_along_axis(distances, positives, 1), np.inf)

    ranks = _ranks(distances, positives)
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


def _ranks(distances: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(n, k) float64: the rank, from 1, of each of these columns (n, k) in its row."""
    if columns.shape[1] <= _FEW:
        counts = [_ahead(distances, target).sum(1) for target in columns.T]
        return 1.0 + np.stack(counts, 1)
    order = np.argsort(distances, axis=1, kind="stable")
    ranks = np.empty(distances.shape)
    np.put_along_axis(ranks, order, np.arange(1.0, distances.shape[1] + 1)[None], axis=1)
    return np.take_along_axis(ranks, columns, axis=1)


def _ahead(distances: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(n, G) bool: whether each column is ranked before column `target` of its row."""
    bound = np.take_along_axis(distances, target[:, None], 1)
    tied_and_earlier = (distances == bound) & (np.arange(distances.shape[1]) < target[:, None])
    return (distances < bound) | tied_and_earlier


def summarise(scores: np.ndarray, max_rank: int = 20) -> Metrics:
    """(cmc, mAP, mINP) of the scores of all queries; ValueError when no query has a match."""
    matched = scores[~np.isnan(scores[:, 0])]
    if not len(matched):
        raise ValueError("no query has a match in the gallery: check q_pids, g_pids and the cameras")
    cmc = (matched[:, :1] <= np.arange(1, max_rank + 1)).mean(0)
    return cmc, float(matched[:, 1].mean()), float(matched[:, 2].mean())
