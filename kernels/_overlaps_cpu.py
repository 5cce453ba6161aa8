"""Pairs of sparse rows that overlap by `least` or more: on the host.

Measuring every pair is slow, so only candidates are measured: pairs whose overlap has an upper bound of
`least` or more. Products of square roots give such bounds, because min(a, b) <= sqrt(a b). There are two ways
to find candidates, because each takes much longer on the data of the other:

- First entries: a sparse product of the first entries of the rows, rare columns first (see `_overlaps`). Its
  time grows with the number of pairs of entries in one column. It is fast if few rows share a column.
- Sketches: a dense product. A sketch holds the sums of a row over random sets of columns, the more the wider
  rows are spread. Its time does not depend on who shares columns, so it is fast for large clusters.
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
from ._shortlist import random_order, whole
from ._shortlist_cpu import product_dtype

COMPARED = 256  # rows that are compared with all others at a time
SPLIT = 8  # parts of the other rows, one sparse product each
WIDE = 4096  # other rows in a dense product
SUMS, MOST = 64, 1024  # sums in a sketch: a multiple of SUMS, at most MOST
SPREAD = 2.5  # sums for each column that a row is spread over, if neighbours share everything; else more
SKETCHED = 1 / 600  # time for one sum of a pair of sketches, if a pair of entries in one column takes 1
SAMPLE = 16  # one row in so many is read for the estimates
LOST = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-12}  # the share that rounding may take from a bound
MEASURED = 4096  # candidates whose overlaps are computed at a time
Candidates = Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]  # from the first of COMPARED rows


def pairs_on_host(csr: CSR, eps: float, groups: Groups, turn: int, turns: int) -> Iterator[Tensor]:
    """`jaccard_pairs` in sparse products, a strip of rows i in a thread at a time.

    Rows are shuffled, so that the first strips have rows of every group, and most groups are known early.
    """
    size, device, least = len(csr[0]) - 1, csr[0].device, least_overlap(eps)
    order = random_order(size).long().numpy()
    encodings = _matrix(csr[0].cpu(), csr[1].cpu(), in_units(csr[2]).cpu(), size)[order]
    indptr, indices, units = map(torch.from_numpy, (encodings.indptr, encodings.indices, encodings.data))
    rank = rarity(indices, size)
    meetings, sums = _estimates(encodings, rank, least)
    if meetings < SKETCHED * sums * size**2:
        cols, units, (rows, columns, parts) = rare_first(indptr, indices, units, rank, least)
        encodings = _matrix(indptr, cols, units, size)
        first = _matrix(torch.searchsorted(rows, torch.arange(size + 1)), columns, parts, size)
        candidates = _by_first_entries(first, least)
    else:
        candidates = _by_sketches(encodings, least, sums)

    def search(start: int) -> np.ndarray:
        found, group = [np.empty((2, 0), np.int64)], groups()
        group = np.arange(size) if group is None else group[order]
        for i, j in candidates(start):
            apart = (i < j) & (group[i] != group[j])
            i, j = i[apart], j[apart]
            for part in (slice(at, at + MEASURED) for at in range(0, len(i), MEASURED)):
                overlap = np.asarray(encodings[i[part]].minimum(encodings[j[part]]).sum(axis=1)).ravel()
                found.append(np.stack([i[part], j[part]])[:, overlap >= least])
        return np.sort(order[np.concatenate(found, axis=1)], axis=0)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        strips = (pool.submit(search, start) for start in range(turn * COMPARED, size, turns * COMPARED))
        waiting = deque(islice(strips, 2 * threads))
        while waiting:
            yield torch.from_numpy(waiting.popleft().result()).to(device)
            waiting.extend(islice(strips, 1))


def _matrix(indptr: Tensor, cols: Tensor, units: Tensor, size: int) -> csr_matrix:
    return csr_matrix((units.numpy(), cols.numpy(), indptr.numpy()), shape=(len(indptr) - 1, size))


def _estimates(encodings: csr_matrix, rank: Tensor, least: int) -> tuple[float, int]:
    """How many pairs of first entries share a column, and how many sums a sketch needs: from some rows.

    A row is spread over 1 / (sum of its squares) columns: n if it has n equal values, and one row in fifty is
    spread more. With too few sums even rows that share no column look alike.
    """
    size = encodings.shape[0]
    some = encodings[::SAMPLE]  # rows are shuffled
    indptr, indices, units = map(torch.from_numpy, (some.indptr, some.indices, some.data))
    columns = rare_first(indptr, indices, units, rank, least)[2][1]
    found, share = columns.bincount(minlength=size).double(), some.shape[0] / size
    meetings = (found * (found - 1)).sum() / share**2 + found.sum() / share
    squares = np.asarray((some.astype(float) / UNIT).power(2).sum(axis=1))
    spread = np.quantile(1 / np.append(squares[squares > 0], 1), 0.98)
    return float(meetings), min(MOST, whole(int(SPREAD * spread * UNIT / least), SUMS))


def _by_first_entries(first: csr_matrix, least: int) -> Candidates:
    """Pairs whose first entries may share enough, by sparse products."""
    size, roots = first.shape[0], first.astype(np.float32).sqrt()
    lost = (int(np.diff(roots.indptr).max()) + 4) * 2**-23  # the share of a bound that float32 may lose
    step = -(-size // SPLIT)
    parts = [(begin, roots[begin : begin + step].T.tocsr()) for begin in range(0, size, step)]

    def candidates(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin, columns in parts[start // step :]:
            bound = roots[start : start + COMPARED] @ columns
            likely = np.flatnonzero(bound.data >= share_of(least) / (1 + lost))
            i = np.searchsorted(bound.indptr, likely, "right") - 1
            yield i + start, bound.indices[likely].astype(np.int64) + begin

    return candidates


def _by_sketches(encodings: csr_matrix, least: int, count: int) -> Candidates:
    """Pairs whose sketches may share enough, by a dense product."""
    size, dtype = encodings.shape[0], product_dtype()
    reach = least / UNIT * (1 - LOST[dtype])  # all products are positive, so errors are shares of the sum
    bucket = random_order(size).numpy() % count
    sums = csr_matrix((encodings.data / UNIT, bucket[encodings.indices], encodings.indptr), (size, count))
    sketches = torch.empty(size, count, dtype=dtype)
    for start in range(0, size, COMPARED):
        sketches[start : start + COMPARED] = torch.from_numpy(sums[start : start + COMPARED].toarray()).sqrt()

    def candidates(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(start, size, WIDE):
            bound = sketches[start : start + COMPARED] @ sketches[first : first + WIDE].T
            likely = np.flatnonzero(bound >= reach)  # torch rounds `reach` to bfloat16 as it rounded `bound`
            i, j = np.divmod(likely, bound.shape[1])  # faster than nonzero()
            yield i + start, j + first

    return candidates
