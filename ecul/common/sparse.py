"""Sparse matrices: weighted sums of rows, and strips of rows joined to CSR arrays."""

import warnings

import torch
from torch import Tensor

from ecul.common import distributed

STRIP_ROWS = 8192  # rows of a sparse matrix that are made at a time
CSR = tuple[Tensor, Tensor, Tensor]  # indptr, indices, values


def coalesced(
    rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, ...], in_order: bool = False
) -> Tensor:
    """A COO matrix; entries at one place are added. in_order: they are sorted, and no place occurs twice."""
    place = torch.stack([rows, cols])
    matrix = torch.sparse_coo_tensor(place, values, shape, check_invariants=False, is_coalesced=in_order)
    return matrix.coalesce()


def entries(near: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the positive weights, from (rows, k) columns and their weights."""
    chosen = weights > 0
    return chosen.nonzero()[:, 0], near[chosen], weights[chosen]


def times(near: Tensor, weights: Tensor, matrix: CSR) -> Tensor:
    """For each row the weighted sum of the rows `near` of a CSR (N, N) float64 matrix, as coalesced COO."""
    return product(*entries(near, weights.double()), len(near), matrix)


def product(rows: Tensor, cols: Tensor, weights: Tensor, height: int, matrix: CSR) -> Tensor:
    """A sparse (height, N) matrix times a CSR (N, N) one; only the rows that it names are read."""
    indptr, indices, values = matrix
    named, cols = cols.unique(return_inverse=True)
    place, owner = spans(indptr[named], indptr.diff()[named])
    shape = len(named), len(indptr) - 1
    right = coalesced(owner, indices[place], values[place], shape, in_order=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR", category=UserWarning)  # "is in beta"
        return torch.sparse.mm(coalesced(rows, cols, weights, (height, len(named))), right).coalesce()


def spans(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The places start, start + 1, ... of each span, and the number of the span of each place."""
    owner = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    before = starts - (sizes.cumsum(0) - sizes)
    return before[owner] + torch.arange(len(owner), device=sizes.device), owner


def lengths(matrix: Tensor) -> Tensor:
    """Entries in each row of a COO matrix."""
    return matrix.indices()[0].bincount(minlength=len(matrix))


def stacked(parts: list[CSR], together: bool = False) -> CSR:
    """One CSR matrix from strips of rows, each (entries in each row, columns, values).

    together: every process gives its strips, and all get the whole, in the order of the processes.
    """
    strip = [torch.cat(part) for part in zip(*parts, strict=True)]
    sizes, indices, values = map(distributed.join, strip) if together else strip
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), indices, values
