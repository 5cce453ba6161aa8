"""Pairs of sparse rows that overlap by `least` or more: on the host.

Measuring every pair is slow, so only candidates are measured: pairs whose overlap has an upper bound of
`least` or more. Products of square roots give such bounds, because min(a, b) <= sqrt(a b). There are two ways
to find candidates, because each is slow on the data of the other. With only one of them, clustering took up
to twice as long.

- First entries: a sparse product of the first entries of the rows, rare columns first (see `_overlaps`). Its
  time grows with the number of pairs of entries in one column. It is fast if most columns belong to few rows.
- Sketches: a dense product. A sketch holds the sums of a row over 512 random sets of columns. The time
  depends only on the number of rows. It is fast if rows share columns with many others (large clusters).
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from ._overlaps import CSR, UNIT, Groups, in_units, least_overlap, rare_first, rarity, share_of
from ._shortlist import random_order
from ._shortlist_cpu import product_dtype

COMPARED = 256  # rows that are compared with all others at a time
SPLIT = 8  # parts of the other rows, one sparse product each
BUCKETS = 512  # sums in a sketch
SKETCHED = 1  # cost of comparing two sketches, in pairs of entries: decides which way is used
SAMPLE = 16  # every so many-th row, at random, estimates how many entries share columns
LOST = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-12}  # the share that rounding may take from a bound
MEASURED = 4096  # candidates whose overlaps are computed at a time
Candidates = Callable[[int, np.ndarray | None], Iterator[np.ndarray]]  # pairs (i, j) of COMPARED rows i


def pairs_on_host(csr: CSR, eps: float, groups: Groups, turn: int, turns: int) -> Iterator[Tensor]:
    """`jaccard_pairs` in sparse products, a strip of rows i in a thread at a time."""
    size, device, least = len(csr[0]) - 1, csr[0].device, least_overlap(eps)
    indptr, indices, units = csr[0].cpu(), csr[1].cpu(), in_units(csr[2]).cpu()
    rank = rarity(indices, size)
    encodings = _matrix(indptr, indices, units, size)
    if _meetings(encodings, rank, least) < SKETCHED * size**2:
        cols, units, (rows, columns, parts) = rare_first(indptr, indices, units, rank, least)
        encodings = _matrix(indptr, cols, units, size)
        first = _matrix(torch.searchsorted(rows, torch.arange(size + 1)), columns, parts, size)
        candidates = _by_first_entries(first, least)
    else:
        candidates = _by_sketches(encodings, least)

    def search(start: int) -> np.ndarray:
        found, group = [np.empty((2, 0), np.int64)], groups()
        for pairs in candidates(start, group):
            pairs = pairs[:, pairs[0] < pairs[1]]
            for part in range(0, pairs.shape[1], MEASURED):
                i, j = pairs[:, part : part + MEASURED]
                overlap = np.asarray(encodings[i].minimum(encodings[j]).sum(axis=1)).ravel()
                found.append(pairs[:, part : part + MEASURED][:, overlap >= least])
        return np.concatenate(found, axis=1)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        strips = (pool.submit(search, start) for start in range(turn * COMPARED, size, turns * COMPARED))
        waiting = deque(islice(strips, 2 * threads))
        while waiting:
            yield torch.from_numpy(waiting.popleft().result()).to(device)
            waiting.extend(islice(strips, 1))


def _matrix(indptr: Tensor, cols: Tensor, units: Tensor, size: int) -> csr_matrix:
    return csr_matrix((units.numpy(), cols.numpy(), indptr.numpy()), shape=(len(indptr) - 1, size))


def _meetings(encodings: csr_matrix, rank: Tensor, least: int) -> float:
    """How many pairs of first entries share a column: an estimate from some of the rows."""
    size = encodings.shape[0]
    some = encodings[random_order(size)[: -(-size // SAMPLE)].numpy()]
    indptr, indices, units = map(torch.from_numpy, (some.indptr, some.indices, some.data))
    columns = rare_first(indptr, indices, units, rank, least)[2][1]
    found, share = columns.bincount(minlength=size).double(), some.shape[0] / size
    return float((found * (found - 1)).sum() / share**2 + found.sum() / share)


def _by_first_entries(first: csr_matrix, least: int) -> Candidates:
    """Pairs whose first entries may share enough, by sparse products."""
    size, roots = first.shape[0], first.astype(np.float32).sqrt()
    lost = (int(np.diff(roots.indptr).max()) + 4) * 2**-23  # the share of a bound that float32 may lose
    edges = np.linspace(0, size, SPLIT + 1).astype(int)
    parts = [(a, b, roots[a:b].T.tocsr()) for a, b in zip(edges, edges[1:], strict=False) if a < b]

    def candidates(start: int, group: np.ndarray | None) -> Iterator[np.ndarray]:
        for begin, end, columns in parts:
            if end > start:
                bound = roots[start : start + COMPARED] @ columns
                likely = np.flatnonzero(bound.data >= share_of(least) / (1 + lost))
                i = np.searchsorted(bound.indptr, likely, "right") - 1 + start
                j = bound.indices[likely].astype(np.int64) + begin
                yield np.stack([i, j])[:, ... if group is None else group[i] != group[j]]

    return candidates


def _by_sketches(encodings: csr_matrix, least: int) -> Candidates:
    """Pairs whose sketches may share enough, by a dense product."""
    size, dtype = encodings.shape[0], product_dtype()
    reach = least / UNIT * (1 - LOST[dtype])  # all products are positive, so errors are shares of the sum
    bucket = random_order(size).numpy() % BUCKETS
    sums = csr_matrix((encodings.data / UNIT, bucket[encodings.indices], encodings.indptr), (size, BUCKETS))
    sketches = torch.empty(size, BUCKETS, dtype=dtype)
    for start in range(0, size, COMPARED):
        sketches[start : start + COMPARED] = torch.from_numpy(sums[start : start + COMPARED].toarray()).sqrt()

    def candidates(start: int, group: np.ndarray | None) -> Iterator[np.ndarray]:
        likely = sketches[start : start + COMPARED] @ sketches[start:].T >= reach
        if group is not None:
            likely &= torch.from_numpy(group[start : start + COMPARED, None] != group[start:])
        yield likely.nonzero().numpy().T + start

    return candidates
