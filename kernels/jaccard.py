"""Neighbours under the Jaccard distance of sparse encodings, without a matrix of all pairs.

Step 7 of EMCC (arXiv 2412.19134): d_ij = 1 - s / (2 - s), s = sum_l min(v_il, v_jl).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.sparse import csr_matrix

from ._checks import check_csr, check_device, check_vector
from ._shortlist import largest_error, random_order
from ._shortlist_cpu import COARSE, DTYPE, round_rows
from ._triton import jit, tl, triton, use_triton

UNIT = 2**30  # overlaps are whole numbers of units of 2**-30: no order of summation changes them
SHARE = 6  # this part of the overlap asked for must lie in the rows' first entries
ROWS, PARTS = 256, 8  # the reference compares this many rows with one of this many parts at a time
BUCKETS = 512  # sums in a sketch
SKETCHED = 1  # a pair of sketches costs as much as so many products of two entries
PAIRS = 4096  # and measures this many pairs at a time
STRIP = 2**25  # overlaps the kernel holds at a time
SORTED = 65536  # rows that the kernel's launcher sorts at a time
FOUND = 128  # pairs a row that the kernel has room for at first
BLOCK, WARPS = 256, 4
Candidates = Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]  # pairs (i, j) of a strip of rows i

# Rows that overlap by `least` or more share a good part of that in their first entries, in one order of the
# columns for all. Cut off the end of each row, as long as its values sum to `least - share` at most. Of two
# rows let i be the one whose last entry left comes first in that order: what they share later on lies in the
# end of i, and is `least - share` at most; the rest, `share` or more, lies in what is left of both. With rare
# columns first, what is left is short of partners. So only the first entries are compared, and the pairs that
# share enough there, few more than are wanted, are measured.


def jaccard_neighbors(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of rows with Jaccard distance d <= eps, as a graph.

    `s = torch.minimum(v[:, None], v[None]).sum(-1); (1 - s / (2 - s) <= eps).to_sparse_csr()` for the dense
    matrix `v` of the encodings, which never exists: memory grows with the entries and the pairs found.

    Args:
        indptr, indices, values: N encodings in CSR form: (N + 1,) int64, (nnz,) int64 and (nnz,) float32 or
            float64. Columns lie in 0..N-1 and none repeats within a row; values are not negative, and those
            of a row sum to 1 at most.
        eps: the largest distance kept, in (0, 1]. At eps = 1 every pair qualifies, N * N of them.

    Returns:
        indptr, indices, int64: row i lists the rows within eps of row i, ascending. The graph is symmetric,
        and every row lists itself.

    Values are rounded to multiples of 2**-30 and summed as integers: the result is the same on every device.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1]; got {eps}")
    check_vector("indptr", indptr)
    check_vector("indices", indices)
    check_vector("values", values, len(indices), dtypes=(torch.float32, torch.float64))
    check_device("indices", indices, indptr.device)
    check_device("values", values, indptr.device)
    search = _operator if torch.compiler.is_compiling() else _search
    return search(indptr, indices, values, eps)


def jaccard_neighbors_reference(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`jaccard_neighbors` in sparse products on the host: the specification and the CPU path."""
    return graph_of(_pairs_on_host(indptr, indices, values, eps, 0, 1), len(indptr) - 1)


def _pairs_on_host(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float, turn: int, turns: int
) -> torch.Tensor:
    """`jaccard_pairs` in sparse products.

    As min(a, b) <= sqrt(a b), the product of the square roots bounds every overlap from above: of the first
    entries, or, where these meet too often, of sketches, the sums of a row's values over 512 random sets of
    columns. The few pairs whose bound reaches what eps asks for are measured.
    """
    size, device = len(indptr) - 1, indptr.device
    if eps == 1 or size == 0:
        return torch.triu_indices(size, size, 1, device=device)[:, turn::turns]
    units = _units(values).cpu().numpy()
    encodings = csr_matrix((units, indices.cpu().numpy(), indptr.cpu().numpy()), shape=(size, size))
    least = _least_overlap(eps)
    encodings, left = _rare_first_on_host(encodings, least)
    sparse = (np.bincount(left.indices, minlength=size).astype(float) ** 2).sum() < SKETCHED * size**2
    candidates = (_by_first_entries if sparse else _by_sketches)(encodings, left, least)

    def search(start: int) -> np.ndarray:
        """The pairs (i, j) within eps, i < j, with i among the rows from `start` on."""
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


def _rare_first_on_host(encodings: csr_matrix, least: int) -> tuple[csr_matrix, csr_matrix]:
    """The encodings with their columns in the order of their frequency, and what is left of their rows."""
    rare_first = np.bincount(encodings.indices, minlength=encodings.shape[1]).argsort(kind="stable")
    encodings = encodings.tocsc()[:, rare_first].tocsr()
    sums = np.concatenate([[0], np.cumsum(encodings.data, dtype=np.int64)])
    rest = np.repeat(sums[encodings.indptr[1:]], np.diff(encodings.indptr)) - sums[:-1]  # from an entry on
    kept = rest > least - _share(least)
    indptr = np.concatenate([[0], np.cumsum(kept)])[encodings.indptr]
    return encodings, csr_matrix((encodings.data[kept], encodings.indices[kept], indptr), encodings.shape)


def _by_first_entries(_: csr_matrix, left: csr_matrix, least: int) -> Candidates:
    """Pairs whose first entries may share enough: sparse products, with a part of the rows at a time."""
    size = left.shape[0]
    roots = left.astype(np.float32).sqrt()
    longest = int(np.diff(roots.indptr).max())
    reach = _share(least) / (1 + (longest + 4) * 2**-23)  # what the bound may lack by its rounding in float32
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


def _by_sketches(encodings: csr_matrix, _: csr_matrix, least: int) -> Candidates:
    """Pairs whose sketches may share enough: a dense product, where rows share columns with most others."""
    size = encodings.shape[0]
    bucket = random_order(size).numpy() % BUCKETS
    sums = csr_matrix((encodings.data / UNIT, bucket[encodings.indices], encodings.indptr), (size, BUCKETS))
    sketches = np.empty((size, BUCKETS), np.float32)
    for start in range(0, size, ROWS):
        np.sqrt(sums[start : start + ROWS].toarray(), out=sketches[start : start + ROWS])
    rounded, *norms = round_rows(torch.from_numpy(sketches), DTYPE)
    margin = float(largest_error(norms, norms, BUCKETS, 2.0**-22).max())
    reach = (least / UNIT - margin) * (1 - 2 * COARSE[DTYPE])

    def candidates(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        near = rounded[start : start + ROWS] @ rounded[start:].T >= reach
        i, j = near.nonzero().numpy().T
        yield i + start, j + start

    return candidates


def _units(values: torch.Tensor) -> torch.Tensor:
    return torch.round(values * UNIT).to(torch.int32)


def _least_overlap(eps: float) -> int:
    """The smallest overlap, in units, whose distance is eps or less; every step of d is monotone in s."""
    return bisect_left(range(UNIT + 1), True, key=lambda s: 1 - (s / UNIT) / (2 - s / UNIT) <= eps)


def _share(least: int) -> int:
    """The overlap of first entries that a pair with an overlap of `least` has at least; some."""
    return max(1, least // SHARE)


def graph_of(pairs: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """CSR of the pairs (i, j), (j, i) and (i, i), given those with i < j: (2, pairs)."""
    i, j = pairs
    itself = torch.arange(size, device=i.device)
    keys = torch.cat([i * size + j, j * size + i, itself * (size + 1)]).sort().values
    degree = (keys // max(size, 1)).bincount(minlength=size)
    return torch.cat([degree.new_zeros(1), degree.cumsum(0)]), keys % max(size, 1)


def jaccard_pairs(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float, turn: int, turns: int
) -> torch.Tensor:
    """One part of the pairs (i, j) within eps, i < j, (2, pairs) int64; `turns` parts are all of them.

    Arguments as for `jaccard_neighbors`; strips of rows take turns, for the first rows have most partners.
    """
    check_csr(indptr, indices, values)
    if eps < 1 and len(indices) and use_triton(values):
        with torch.cuda.device_of(values):
            return _launch(indptr, indices, values, eps, turn, turns)
    return _pairs_on_host(indptr, indices, values, eps, turn, turns)


def _search(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return graph_of(jaccard_pairs(indptr, indices, values, eps, 0, 1), len(indptr) - 1)


_operator = torch.library.custom_op("ecul::jaccard_neighbors", _search, mutates_args=())


@_operator.register_fake
def _(indptr, indices, values, eps):
    pairs = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(indptr), indices.new_empty(pairs)


# The kernels. `place` puts the entries that are left of the rows into the order of their columns, rows
# ascending in each: an entry (i, l) finds behind its own place the entries (j, l) of all rows j > i, its
# column's inverted list. The first kernel adds min(v_il, v_jl) to the overlap of i and j, in a dense strip of
# a few rows i and all j; the second lists the pairs that share enough there; the third measures them on whole
# rows. The sums are integers, so atomic additions in any order give the same bits; sorting the pairs undoes
# their order. The host waits for the ends of the strips and for the number of pairs, never in between.


@jit
def _add_overlaps(
    strip, rows, cols, units, place, ends, list_rows, list_units, first, top, size, BLOCK: tl.constexpr
):
    entry = first + tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry) - top
    unit = tl.load(units + entry)
    start = tl.load(place + entry) + 1
    end = tl.load(ends + tl.load(cols + entry))
    for block in range(start, end, BLOCK):
        lane = block + tl.arange(0, BLOCK)
        within = lane < end
        other = tl.load(list_rows + lane, within, 0)
        smaller = tl.minimum(tl.load(list_units + lane, within, 0), unit)
        tl.atomic_add(strip + row * size + other, smaller, within, sem="relaxed")


@jit
def _list_pairs(strip, pairs, count, top, size, share, room, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    other = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    overlap = tl.load(strip + row * size + other, mask=other < size, other=0)
    likely = overlap >= share
    found = tl.sum(likely.to(tl.int32), 0)
    if found > 0:
        place = tl.atomic_add(count, found.to(tl.int64), sem="relaxed")
        place += tl.cumsum(likely.to(tl.int32), 0) - 1
        fits = likely & (place < room)
        tl.store(pairs + place, tl.zeros((BLOCK,), tl.int64) + row + top, mask=fits)
        tl.store(pairs + room + place, other.to(tl.int64), mask=fits)


@jit
def _measure(pairs, overlaps, indptr, cols, units, room, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    one, other = tl.load(pairs + pair), tl.load(pairs + room + pair)
    start, stop = tl.load(indptr + one), tl.load(indptr + one + 1)
    low, high = tl.load(indptr + other), tl.load(indptr + other + 1)
    overlap = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, stop, BLOCK):
        lane = block + tl.arange(0, BLOCK)
        column = tl.load(cols + lane, mask=lane < stop, other=-1)
        below, above = tl.zeros((BLOCK,), tl.int64) + low, tl.zeros((BLOCK,), tl.int64) + high
        for _ in range(STEPS):  # until below is the first entry whose column is not smaller
            middle = (below + above) // 2
            smaller = tl.load(cols + middle, mask=middle < high, other=2**31 - 1) < column
            below = tl.where(smaller & (below < above), middle + 1, below)
            above = tl.where(smaller, above, middle)
        shared = (lane < stop) & (below < high)
        shared &= tl.load(cols + below, mask=shared, other=-2) == column
        own = tl.load(units + lane, mask=shared, other=0)
        overlap += tl.minimum(own, tl.load(units + below, mask=shared, other=0))
    tl.store(overlaps + pair, tl.sum(overlap, 0))


def _rare_first(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, least: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Columns renumbered, rare ones first, and their units; of what is left the rows, columns and units.

    Some rows at a time: sorting takes several times the room of what is sorted.
    """
    size, device = len(indptr) - 1, indptr.device
    rank = torch.empty(size, dtype=torch.int64, device=device)
    rank[indices.bincount(minlength=size).argsort(stable=True)] = torch.arange(size, device=device)
    cols, units = (torch.empty(len(indices), dtype=torch.int32, device=device) for _ in range(2))
    tops = list(range(0, size, SORTED))
    edges, left = [*indptr[tops].tolist(), len(indices)], []
    for top, start, stop in zip(tops, edges, edges[1:], strict=False):
        strip, offsets = slice(start, stop), indptr[top : top + SORTED + 1] - start
        row = torch.arange(len(offsets) - 1, device=device).repeat_interleave(offsets.diff())
        keys, order = (row * size + rank[indices[strip]]).sort()
        cols[strip], units[strip] = keys % size, _units(values[strip])[order]
        sums = torch.cat([offsets.new_zeros(1), units[strip].cumsum(0, dtype=torch.int64)])
        kept = sums[offsets[1:]][row] - sums[:-1] > least - _share(least)
        left.append((row[kept] + top, cols[strip][kept], units[strip][kept]))
    rows, columns, parts = (torch.cat(part) for part in zip(*left, strict=True))
    return cols, units, (rows, columns, parts)


def _launch(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float, turn: int, turns: int
) -> torch.Tensor:
    size, device = len(indptr) - 1, indptr.device
    least = _least_overlap(eps)
    cols, units, first = _rare_first(indptr, indices, values, least)
    by_column = (first[1].long() * size + first[0]).argsort()
    place = torch.empty_like(by_column)
    place[by_column] = torch.arange(len(by_column), device=device)
    ends = first[1].bincount(minlength=size).cumsum(0)
    lists = first[0][by_column], first[2][by_column]
    height = max(1, min(size, STRIP // size))
    strip = torch.empty(height, size, dtype=torch.int32, device=device)
    tops = list(range(0, size, height))
    edges = [*torch.searchsorted(first[0], torch.tensor(tops, device=device)).tolist(), len(by_column)]
    room = FOUND * size
    while True:
        pairs = torch.empty(2, room, dtype=torch.int64, device=device)
        count = torch.zeros(1, dtype=torch.int64, device=device)
        for top, start, stop in list(zip(tops, edges, edges[1:], strict=False))[turn::turns]:
            if start == stop:
                continue
            strip.zero_()
            _add_overlaps[(stop - start,)](
                strip, *first, place, ends, *lists, start, top, size, BLOCK=BLOCK, num_warps=WARPS
            )
            _list_pairs[(min(height, size - top), triton.cdiv(size, 4 * BLOCK))](
                strip, pairs, count, top, size, _share(least), room, BLOCK=4 * BLOCK, num_warps=WARPS
            )
        found = int(count)
        if found <= room:
            break
        room = found
    overlaps = torch.empty(found, dtype=torch.int32, device=device)
    if found:
        steps = int(indptr.diff().max()).bit_length() + 1
        _measure[(found,)](
            pairs, overlaps, indptr, cols, units, room, STEPS=steps, BLOCK=BLOCK, num_warps=WARPS
        )
    return pairs[:, :found][:, overlaps >= least]
