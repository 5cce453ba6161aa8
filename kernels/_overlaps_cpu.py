"""Pairs of sparse rows that overlap enough, in sparse products on the host."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.sparse import csr_matrix

from ._overlaps import UNIT, rare_first, rarity, share_of
from ._shortlist import largest_error, power_of_two, random_order, round_rows
from ._shortlist_cpu import COARSE, product_dtype

ROWS, PARTS = 256, 8  # so many rows are compared with one of so many parts at a time
BUCKETS = 512  # sums in a sketch
SKETCHED = 1  # a pair of sketches costs as much as so many products of two entries
SAMPLE = 16  # one row of so many tells how often first entries meet
PAIRS = 4096  # measured at a time
Candidates = Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]  # pairs (i, j) of a strip of rows i


def pairs_on_host(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    units: torch.Tensor,
    least: int,
    turn: int,
    turns: int,
) -> torch.Tensor:
    """The pairs (i, j), i < j, whose rows overlap by `least` units or more: (2, pairs) int64.

    indptr, indices, units: CSR (N, N); every `turns`-th strip of rows, from `turn` on.

    As min(a, b) <= sqrt(a b), the product of the square roots bounds every overlap from above: of the first
    entries, or, where these meet too often, of sketches, the sums of a row's values over 512 random sets of
    columns. The few pairs whose bound reaches `least` are measured.
    """
    size, device = len(indptr) - 1, indptr.device
    indptr, indices, units = indptr.cpu(), indices.cpu(), units.cpu()
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
        """The pairs with i among the rows from `start` on."""
        found = [np.empty((2, 0), np.int64)]
        for i, j in candidates(start):
            i, j = i[i < j], j[i < j]
            for part in range(0, len(i), PAIRS):
                one, other = i[part : part + PAIRS], j[part : part + PAIRS]
                overlap = np.asarray(encodings[one].minimum(encodings[other]).sum(axis=1)).ravel()
                found.append(np.stack([one, other])[:, overlap >= least])
        return np.concatenate(found, axis=1)

    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        found = [np.empty((2, 0), np.int64)]
        pairs = np.concatenate(found + list(pool.map(search, range(turn * ROWS, size, turns * ROWS))), axis=1)
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(pairs).to(device)


def _matrix(indptr: torch.Tensor, cols: torch.Tensor, units: torch.Tensor, size: int) -> csr_matrix:
    return csr_matrix((units.numpy(), cols.numpy(), indptr.numpy()), shape=(len(indptr) - 1, size))


def _meetings(encodings: csr_matrix, rank: torch.Tensor, least: int) -> float:
    """About how often two first entries share a column, judged by some of the rows."""
    size = encodings.shape[0]
    some = encodings[random_order(size)[: -(-size // SAMPLE)].numpy()]
    indptr, indices, units = map(torch.from_numpy, (some.indptr, some.indices, some.data))
    _, _, (_, columns, _) = rare_first(indptr, indices, units, rank, least)
    found = columns.bincount(minlength=size).double()
    share = some.shape[0] / size
    return float((found * (found - 1)).sum() / share**2 + found.sum() / share)


def _by_first_entries(left: csr_matrix, least: int) -> Candidates:
    """Pairs whose first entries may share enough: sparse products, with a part of the rows at a time."""
    size = left.shape[0]
    roots = left.astype(np.float32).sqrt()
    longest = int(np.diff(roots.indptr).max())
    reach = share_of(least) / (
        1 + (longest + 4) * 2**-23
    )  # what the bound may lack by its rounding in float32
    edges = np.linspace(0, size, PARTS + 1).astype(int)
    parts = [(a, b, roots[a:b].T.tocsr()) for a, b in zip(edges, edges[1:], strict=False) if a < b]

    def candidates(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first, last, columns in parts:
            if last > start:
                bound = roots[start : start + ROWS] @ columns
                likely = np.flatnonzero(bound.data >= reach)
                i = np.searchsorted(bound.indptr, likely, "right") - 1
                yield i + start, bound.indices[likely].astype(np.int64) + first

    return candidates


def _by_sketches(encodings: csr_matrix, least: int) -> Candidates:
    """Pairs whose sketches may share enough: a dense product, where rows share columns with most others."""
    size = encodings.shape[0]
    bucket = random_order(size).numpy() % BUCKETS
    sums = csr_matrix((encodings.data / UNIT, bucket[encodings.indices], encodings.indptr), (size, BUCKETS))
    sketches = np.empty((size, BUCKETS), np.float32)
    for start in range(0, size, ROWS):
        np.sqrt(sums[start : start + ROWS].toarray(), out=sketches[start : start + ROWS])
    dtype = product_dtype()
    rounded, *norms = round_rows(torch.from_numpy(sketches), torch.arange(size), dtype)
    margin = float(largest_error(norms, norms, BUCKETS, 2.0**-22).max())
    scale = float(power_of_two(torch.from_numpy(sketches)))
    reach = (least / UNIT * scale**2 - margin) * (1 - 2 * COARSE[dtype])

    def candidates(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        near = rounded[start : start + ROWS] @ rounded[start:].T >= reach
        i, j = near.nonzero().numpy().T
        yield i + start, j + start

    return candidates
