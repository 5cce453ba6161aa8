"""Sparse matrices: weighted sums of rows, and strips of rows, made in threads and joined to CSR arrays."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from scipy.sparse import csc_matrix
from torch import Tensor

from ecul.common import distributed

STRIP_ROWS = 8192  # rows of a sparse matrix that a thread makes at a time
STRIPS = 4  # threads at most: each needs memory for its strip
CSR = tuple[Tensor, Tensor, Tensor]  # indptr, indices, values


def product(
    rows: Tensor, cols: Tensor, weights: Tensor, height: int, matrix: CSR
) -> tuple[Tensor, Tensor, Tensor]:
    """A sparse (height, N) matrix times a CSR (N, N) one: rows, columns and values of its entries, in order.

    rows, cols, weights: the entries of the first, no place twice. The second is read where `cols` says.
    """
    indptr, indices, values = matrix
    used = cols.bincount(minlength=len(indptr) - 1) > 0
    named, cols = used.nonzero()[:, 0], (used.cumsum(0) - 1)[cols]
    place, owner = spans(indptr[named], indptr.diff()[named])
    left, right = torch.stack([rows, cols]), torch.stack([owner, indices[place]])
    left_shape, right_shape = (height, len(named)), (len(named), len(used))
    if values.is_cuda:
        one = torch.sparse_coo_tensor(left, weights, left_shape, check_invariants=False)
        other = torch.sparse_coo_tensor(
            right, values[place], right_shape, check_invariants=False, is_coalesced=True
        )
        found = torch.sparse.mm(one, other).coalesce()
        return *found.indices(), found.values()
    one = csc_matrix((weights.numpy(), left.numpy()), left_shape)
    other = csc_matrix((values[place].numpy(), right.numpy()), right_shape)
    found = (one @ other).tocsr()  # by columns: the change to rows puts the columns in order
    rows = torch.arange(height).repeat_interleave(torch.from_numpy(found.indptr).diff())
    return rows, torch.from_numpy(found.indices).long(), torch.from_numpy(found.data)


def spans(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The places start, start + 1, ... of each span, and the number of the span of each place."""
    owner = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    before = starts - (sizes.cumsum(0) - sizes)
    return before[owner] + torch.arange(len(owner), device=sizes.device), owner


def by_strips(work: Callable[[Tensor], Any], table: Tensor, together: bool = False) -> Iterator[Any]:
    """`map` over strips of row numbers of a table; on a CPU in threads, because SciPy multiplies in one.

    together: only over the rows that this process handles.
    """
    rows = torch.arange(len(table), device=table.device)
    strips = (rows[distributed.share(len(table))] if together else rows).split(STRIP_ROWS)
    if table.is_cuda:
        yield from map(work, strips)
    else:
        with ThreadPoolExecutor(min(STRIPS, torch.get_num_threads())) as pool:
            yield from pool.map(work, strips)


def stacked(parts: list[CSR], together: bool = False) -> CSR:
    """One CSR matrix from strips of rows, each (entries in each row, columns, values).

    together: every process gives its strips, and all get the whole, in the order of the processes.
    """
    strip = [torch.cat(part) for part in zip(*parts, strict=True)]
    sizes, indices, values = map(distributed.join, strip) if together else strip
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), indices, values
