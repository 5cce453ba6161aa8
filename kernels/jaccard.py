"""Neighbours under the Jaccard distance of sparse encodings, without a matrix of all pairs.

Step 7 of EMCC (arXiv 2412.19134): d_ij = 1 - s / (2 - s), s = sum_l min(v_il, v_jl).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ._checks import LABELS, WEIGHTS, check_csr, check_device, check_number, check_tensor
from ._overlaps import CSR, Groups, ascending, pairs_on_device
from ._overlaps_cpu import pairs_on_host
from ._triton import use_triton


def jaccard_neighbors(indptr: Tensor, indices: Tensor, values: Tensor, eps: float) -> tuple[Tensor, Tensor]:
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
    check_number("eps", eps)
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1]; got {eps}")
    check_tensor("indptr", indptr, None, dtypes=LABELS)
    check_tensor("indices", indices, None, dtypes=LABELS)
    check_tensor("values", values, len(indices), dtypes=WEIGHTS)
    check_device(indptr.device, indices=indices, values=values)
    return _jaccard_neighbors(indptr, indices, values.detach(), float(eps))


def jaccard_neighbors_reference(
    indptr: Tensor, indices: Tensor, values: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`jaccard_neighbors` in sparse products on the host: the specification and the CPU path."""
    return _graph(jaccard_pairs((indptr, indices, values), eps, find=pairs_on_host), indptr)


def jaccard_pairs(
    csr: CSR, eps: float, groups: Groups = lambda: None, turn: int = 0, turns: int = 1, find=None
) -> Iterator[Tensor]:
    """The pairs (i, j), i < j, of `jaccard_neighbors` in portions, (2, some) int64.

    groups: gives each row's group, an array (N,), or None. Portions ask anew, and omit pairs within a group.
    turn, turns: give one part of `turns`, which take strips of rows in turn. find: on which device to search.
    """
    check_csr(*csr)
    size = len(csr[0]) - 1
    if eps == 1:
        yield torch.triu_indices(size, size, 1, device=csr[0].device)[:, turn::turns]
    elif len(csr[1]):
        with torch.cuda.device_of(csr[2]):
            find = find or (pairs_on_device if use_triton(csr[2]) else pairs_on_host)
            yield from find(csr, eps, groups, turn, turns)


def _graph(portions: Iterable[Tensor], indptr: Tensor) -> tuple[Tensor, Tensor]:
    """CSR of the pairs (i, j), (j, i) and (i, i), given those with i < j in portions (2, some)."""
    size, rows = len(indptr) - 1, torch.arange(len(indptr), device=indptr.device)
    i, j = torch.cat([rows.new_empty(2, 0), *portions], 1)
    keys = ascending(torch.cat([i * size + j, j * size + i, rows[:-1] * (size + 1)]))
    return torch.searchsorted(keys, rows * size), keys.remainder_(max(size, 1))


@torch.library.custom_op("ecul::jaccard_neighbors", mutates_args=())
def _jaccard_neighbors(indptr: Tensor, indices: Tensor, values: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _graph(jaccard_pairs((indptr, indices, values), eps), indptr)


@_jaccard_neighbors.register_fake
def _(indptr, indices, values, eps):
    pairs = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(indptr), indices.new_empty(pairs)
