"""Equal rows are handled once, so that repeated or blank images cost memory linear in their number."""

from collections.abc import Callable

import torch
from torch import Tensor

from ecul.common.distributed import join, share
from ecul.common.exact import FEATURE_ROWS
from ecul.common.sparse import CSR, STRIP_ROWS, spans
from ecul.kernels._overlaps import in_units, least_overlap


def distinct_rows(points: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of points (N, D) on the grid, equal ones once; and (N,) int64, for each point its row there.

    The rows stay in the order of their first points.
    """
    weights = _random(2**20, points.shape[1], points.device).double()
    codes = torch.cat([rows.double() @ weights for rows in points.split(FEATURE_ROWS)])  # exact sums
    first = _first_of(codes, lambda rows, firsts: (points[rows] == points[firsts]).all(1))
    rows, group = first.unique(return_inverse=True)
    return points[rows] if len(rows) < len(points) else points, group


def nearest_members(values: Tensor, groups: Tensor, group: Tensor, k: int) -> Tensor:
    """The k nearest points of each row, (rows, k) int64, given its nearest groups of equal points.

    values, groups: (rows, few), the similarity of these groups and their numbers. group: (N,) the group of
    each point, from `distinct_rows`. Ties go to the point of lower index.
    """
    members, sizes = group.argsort(stable=True), group.bincount()
    starts, sizes, found = sizes.cumsum(0) - sizes, sizes.clamp(max=k), []
    for similar, near in zip(values.split(FEATURE_ROWS), groups.split(FEATURE_ROWS), strict=True):
        place, entry = spans(starts[near].flatten(), sizes[near].flatten())
        order = members[place].argsort(stable=True)
        for key in (-similar.flatten()[entry], entry // near.shape[1]):  # by row, similarity, index
            order = order[key[order].argsort(stable=True)]
        counts = sizes[near].sum(1, keepdim=True)
        best = counts.cumsum(0) - counts + torch.arange(k, device=near.device)
        found.append(members[place[order[best]]])
    return torch.cat(found)


def distinct_encodings(encodings: CSR, eps: float, together: bool = False) -> tuple[CSR, Tensor]:
    """The encodings with equal rows kept once, the others empty; and (N,) the row that stands for each row.

    No pair within eps < 1 is lost. Entries in a column that no other row has overlap with nothing: they are
    removed first. Rows that are then equal have equal neighbours, and are neighbours of each other. A row
    whose sum is too small for any neighbour stands for itself and becomes empty.
    together: all processes call with equal arguments and share the work.
    """
    indptr, indices, values = encodings
    size, itself = len(indptr) - 1, torch.arange(len(indptr) - 1, device=indptr.device)
    kept, weights = (indices.bincount(minlength=size) > 1)[indices], _random(2**62, size, indices.device)
    totals = itself.new_zeros(size, 3)
    for rows in itself[share(size) if together else slice(None)].split(STRIP_ROWS):
        place, owner = spans(indptr[rows], indptr.diff()[rows])
        place, owner = place[kept[place]], rows[owner[kept[place]]]
        units = in_units(values[place]).long()
        parts = units * weights[indices[place]], units, torch.ones_like(units)  # codes are modulo 2**64
        totals.index_add_(0, owner, torch.stack(parts, 1))
    codes, sums, sizes = (join(totals[share(size)]) if together else totals).unbind(1)
    indices, values = indices[kept], values[kept]
    starts = sizes.cumsum(0) - sizes

    def same(rows: Tensor, firsts: Tensor) -> Tensor:
        equal = sizes[rows] == sizes[firsts]
        place, owner = spans(starts[rows], sizes[rows] * equal)
        other = place + (starts[firsts] - starts[rows])[owner]
        equal[owner[(indices[place] != indices[other]) | (values[place] != values[other])]] = False
        return equal

    first = torch.where(sums < least_overlap(eps), itself, _first_of(codes, same))
    stays = (first == itself) & (sums >= least_overlap(eps))
    kept, sizes = stays.repeat_interleave(sizes), sizes * stays
    return (torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), indices[kept], values[kept]), first


def _first_of(codes: Tensor, same: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """For each row the first row of the same code, if same(rows, firsts) confirms it, else the row itself."""
    group, itself = codes.unique(return_inverse=True)[1], torch.arange(len(codes), device=codes.device)
    first = torch.full_like(itself, len(codes)).scatter_reduce(0, group, itself, "amin")[group]
    for rows in (first != itself).nonzero()[:, 0].split(FEATURE_ROWS):
        other = rows[~same(rows, first[rows])]
        first[other] = other
    return first


def _random(below: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(0)).to(device)
