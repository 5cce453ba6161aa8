"""Neighbours under the Jaccard distance of sparse encodings, without a matrix of all pairs.

Step 7 of EMCC (arXiv 2412.19134): d_ij = 1 - s / (2 - s), s = sum_l min(v_il, v_jl).
"""

from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.sparse import csr_matrix

from ._checks import check_device, check_vector
from ._triton import jit, tl, use_triton

UNIT = 2**30  # overlaps are whole numbers of units of 2**-30: no order of summation changes them
ROWS = 1024  # the reference compares this many rows with as many at a time
PAIRS = 4096  # and measures this many pairs at a time
STRIP = 2**25  # overlaps the kernel holds at a time
BLOCK, WARPS = 256, 4


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
    """`jaccard_neighbors` in sparse products on the host: the specification and the CPU path.

    As min(a, b) <= sqrt(a b), the product of the square roots bounds every overlap from above. It is taken
    block by block of rows; the few pairs whose bound reaches the overlap that eps asks for are measured.
    """
    size, device = len(indptr) - 1, indptr.device
    if eps == 1:
        everyone = torch.arange(size, device=device)
        return torch.arange(size + 1, device=device) * size, everyone.repeat(size)
    units = _units(values).cpu().numpy()
    encodings = csr_matrix((units, indices.cpu().numpy(), indptr.cpu().numpy()), shape=(size, size))
    encodings.sort_indices()
    starts = range(0, size, ROWS)
    roots = [encodings[start : start + ROWS].astype(np.float32).sqrt() for start in starts]
    least = _least_overlap(eps)
    longest = int(np.diff(encodings.indptr).max(initial=0))
    reach = least / (1 + (longest + 4) * 2**-23)  # what the bound may lack by its rounding in float32

    def search(second: int) -> np.ndarray:
        """The pairs (i, j) within eps, i < j, with j in one block of rows."""
        columns, found = roots[second].T.tocsr(), []
        for first in range(second + 1):
            bound = (roots[first] @ columns).tocoo()
            likely = bound.data >= reach
            i, j = bound.row[likely] + starts[first], bound.col[likely] + starts[second]
            i, j = i[i < j], j[i < j]
            for part in range(0, len(i), PAIRS):
                one, other = i[part : part + PAIRS], j[part : part + PAIRS]
                overlap = np.asarray(encodings[one].minimum(encodings[other]).sum(axis=1)).ravel()
                found.append(np.stack([one, other])[:, overlap >= least])
        return np.concatenate([np.empty((2, 0), np.int64), *found], axis=1)

    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        blocks = list(pool.map(search, reversed(range(len(starts)))))
    finally:
        pool.shutdown(cancel_futures=True)
    pairs = np.concatenate([np.empty((2, 0), np.int64), *blocks], axis=1)
    return _graph(torch.from_numpy(pairs).to(device), size)


def _units(values: torch.Tensor) -> torch.Tensor:
    return torch.round(values * UNIT).to(torch.int32)


def _least_overlap(eps: float) -> int:
    """The smallest overlap, in units, whose distance is eps or less; every step of d is monotone in s."""
    return bisect_left(range(UNIT + 1), True, key=lambda s: 1 - (s / UNIT) / (2 - s / UNIT) <= eps)


def _graph(pairs: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """CSR of the pairs (i, j), (j, i) and (i, i), given those with i < j: (2, pairs)."""
    i, j = pairs
    itself = torch.arange(size, device=i.device)
    keys = torch.cat([i * size + j, j * size + i, itself * (size + 1)]).sort().values
    degree = (keys // max(size, 1)).bincount(minlength=size)
    return torch.cat([degree.new_zeros(1), degree.cumsum(0)]), keys % max(size, 1)


def _search(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_matrix(indptr, indices, values)
    if eps < 1 and len(indices) and use_triton(values):
        return _launch(indptr, indices, values, eps)
    return jaccard_neighbors_reference(indptr, indices, values, eps)


_operator = torch.library.custom_op("ecul::jaccard_neighbors", _search, mutates_args=())


@_operator.register_fake
def _(indptr, indices, values, eps):
    pairs = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(indptr), indices.new_empty(pairs)


def _check_matrix(indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    if len(indptr) == 0:
        raise ValueError("indptr must hold N + 1 offsets, a single 0 for no rows; got none")
    if indptr[0] != 0 or indptr[-1] != len(indices) or (indptr.diff() < 0).any():
        raise ValueError(f"indptr must rise from 0 to the number of entries, {len(indices)}, and never fall")
    if len(indices) == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= len(indptr) - 1:
        raise ValueError(f"indices must lie in 0..{len(indptr) - 2}, the rows; got {low}..{high}")
    most = torch.segment_reduce(values, "sum", offsets=indptr).max()
    if not ((values >= 0).all() and most <= 1.001):
        raise ValueError(
            f"values must not be negative or NaN and sum to 1 at most in a row; got a sum of {most}"
        )


# The kernel. `place` puts the entries into the order of their columns, rows ascending in each column, so an
# entry (i, l) finds behind its own place the entries (j, l) of all rows j > i: its column's inverted list. It
# adds min(v_il, v_jl) to the overlap of i and j, which lies in a dense strip of a few rows i and all j. The
# sums are integers, so atomic additions in any order give the same bits.


@jit
def _add_overlaps(
    strip, rows, cols, units, place, ends, list_rows, list_units, first, height, size, BLOCK: tl.constexpr
):
    entry = first + tl.program_id(0)
    row = tl.load(rows + entry) % height
    unit = tl.load(units + entry)
    start = tl.load(place + entry) + 1
    end = tl.load(ends + tl.load(cols + entry))
    for block in range(start, end, BLOCK):
        lane = block + tl.arange(0, BLOCK)
        within = lane < end
        other = tl.load(list_rows + lane, within, 0)
        smaller = tl.minimum(tl.load(list_units + lane, within, 0), unit)
        tl.atomic_add(strip + row * size + other, smaller, within, sem="relaxed")


def _launch(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size, device = len(indptr) - 1, indptr.device
    units = _units(values)
    rows = torch.arange(size, device=device).repeat_interleave(indptr.diff())
    by_column = (indices * size + rows).argsort()
    place = torch.empty_like(by_column)
    place[by_column] = torch.arange(len(by_column), device=device)
    ends = indices.bincount(minlength=size).cumsum(0)
    list_rows, list_units = rows[by_column], units[by_column]
    least = _least_overlap(eps)
    height = max(1, min(size, STRIP // size))
    strip = torch.empty(height, size, dtype=torch.int32, device=device)
    tops = list(range(0, size, height))
    edges = [*indptr[tops].tolist(), len(indices)]
    found = []
    for top, first, last in zip(tops, edges, edges[1:], strict=False):
        if first == last:
            continue
        strip.zero_()
        with torch.cuda.device_of(strip):
            _add_overlaps[(last - first,)](
                strip, rows, indices, units, place, ends, list_rows, list_units, first, height, size,
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        found.append((strip >= least).nonzero() + torch.tensor([top, 0], device=device))
    empty = torch.empty(0, 2, dtype=torch.int64, device=device)
    return _graph(torch.cat([empty, *found]).T, size)
