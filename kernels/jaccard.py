"""Neighbours under the Jaccard distance of sparse encodings, without a matrix of all pairs.

Step 7 of EMCC (arXiv 2412.19134): d_ij = 1 - s / (2 - s), s = sum_l min(v_il, v_jl).
"""

from collections.abc import Callable

import torch

from ._checks import check_csr, check_device, check_vector
from ._overlaps import in_units, least_overlap, pairs_on_device
from ._overlaps_cpu import pairs_on_host
from ._triton import use_triton


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
    return graph_of(_pairs(pairs_on_host, indptr, indices, values, eps), len(indptr) - 1)


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
    if not use_triton(values):
        return _pairs(pairs_on_host, indptr, indices, values, eps, turn, turns)
    with torch.cuda.device_of(values):
        return _pairs(pairs_on_device, indptr, indices, values, eps, turn, turns)


def _pairs(
    find: Callable[..., torch.Tensor],
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    eps: float,
    turn: int = 0,
    turns: int = 1,
) -> torch.Tensor:
    size = len(indptr) - 1
    if eps == 1:
        return torch.triu_indices(size, size, 1, device=indptr.device)[:, turn::turns]
    if len(indices) == 0:
        return indices.new_empty(2, 0)
    return find(indptr, indices, in_units(values), least_overlap(eps), turn, turns)


def _search(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return graph_of(jaccard_pairs(indptr, indices, values, eps, 0, 1), len(indptr) - 1)


_operator = torch.library.custom_op("ecul::jaccard_neighbors", _search, mutates_args=())


@_operator.register_fake
def _(indptr, indices, values, eps):
    pairs = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(indptr), indices.new_empty(pairs)
