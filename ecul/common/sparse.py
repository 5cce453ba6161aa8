"""Sparse matrices, some rows at a time: sums of weighted rows, and strips joined to plain CSR arrays."""

import contextlib
import warnings
from collections.abc import Iterator

import torch

from ecul.common import distributed

CSR = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # indptr, indices, values


@contextlib.contextmanager
def _beta_allowed() -> Iterator[None]:
    """Without torch's notice that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR", category=UserWarning)
        yield


def coalesced(
    rows: torch.Tensor,
    cols: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, ...],
    in_order: bool = False,
) -> torch.Tensor:
    """A COO matrix of these entries; those of one place are added up. in_order: they are so, none twice."""
    place = torch.stack([rows, cols])
    matrix = torch.sparse_coo_tensor(place, values, shape, check_invariants=False, is_coalesced=in_order)
    return matrix.coalesce()


def entries(near: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns and values of the entries with a weight, from (rows, k) columns and weights."""
    chosen = weights > 0
    return chosen.nonzero()[:, 0], near[chosen], weights[chosen]


def times(near: torch.Tensor, weights: torch.Tensor, matrix: CSR) -> torch.Tensor:
    """For each row the sum of the rows `near` of a CSR (N, N) float64 matrix, with weights: coalesced COO."""
    return product(*entries(near, weights.double()), len(near), matrix)


@_beta_allowed()
def product(
    rows: torch.Tensor, cols: torch.Tensor, weights: torch.Tensor, height: int, matrix: CSR
) -> torch.Tensor:
    """A sparse (height, N) matrix times a CSR (N, N) one, of which only rows that take part are touched."""
    indptr, indices, values = matrix
    named, cols = cols.unique(return_inverse=True)
    sizes = indptr.diff()[named]
    first = (indptr[named] - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
    place = first + torch.arange(len(first), device=first.device)
    owner = torch.arange(len(named), device=first.device).repeat_interleave(sizes)
    shape = len(named), len(indptr) - 1
    right = coalesced(owner, indices[place], values[place], shape, in_order=True)
    return torch.sparse.mm(coalesced(rows, cols, weights, (height, len(named))), right).coalesce()


def lengths(matrix: torch.Tensor) -> torch.Tensor:
    """Entries in each row of a COO matrix."""
    return matrix.indices()[0].bincount(minlength=len(matrix))


def stacked(parts: list[CSR], together: bool = False) -> CSR:
    """One CSR matrix of strips of rows, given as (entries in each row, columns, values).

    together: the other processes' strips come before and after this one's, in their order.
    """
    strip = [torch.cat(part) for part in zip(*parts, strict=True)]
    sizes, indices, values = map(distributed.join, strip) if together else strip
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), indices, values


def no_rows(like: torch.Tensor, dtype: torch.dtype) -> CSR:
    """A strip for `stacked` without rows, on the device of a tensor."""
    none = torch.empty(0, dtype=torch.int64, device=like.device)
    return none, none, none.to(dtype)
