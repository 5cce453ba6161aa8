"""Equal rows are handled once, so that repeated or blank images cost memory linear in their number."""

import torch
from torch import Tensor

from ecul.common.exact import FEATURE_ROWS
from ecul.common.sparse import CSR, spans
from ecul.kernels._overlaps import in_units, least_overlap


def first_equal(table: Tensor) -> Tensor:
    """For each row of a table (N, D) the first row that is equal to it: (N,) int64."""
    weights = torch.randint(2**20, table.shape[1:], generator=torch.Generator().manual_seed(0))
    weights = weights.double().to(table.device)
    codes = torch.cat([rows.double() @ weights for rows in table.split(FEATURE_ROWS)])  # exact sums
    group, itself = codes.unique(return_inverse=True)[1], torch.arange(len(codes), device=codes.device)
    first = torch.full_like(itself, len(codes)).scatter_reduce(0, group, itself, "amin")[group]
    for rows in (first != itself).nonzero()[:, 0].split(FEATURE_ROWS):
        other = rows[(table[rows] != table[first[rows]]).any(1)]
        first[other] = other
    return first


def distinct_rows(points: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of points (N, D) on the grid, equal ones once; and (N,) int64, for each point its row there.

    The rows stay in the order of their first points.
    """
    rows, group = first_equal(points).unique(return_inverse=True)
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


def without_repeats(encodings: CSR, ranks: Tensor, k: int, codes: Tensor, eps: float) -> tuple[CSR, Tensor]:
    """The extended encodings, repeated ones empty; and (N,) int64, the row that stands for each row.

    A point that no other point lists as a neighbour encodes itself alone, in a column that no other row has.
    Such points of one camera whose k nearest are the same otherwise differ in their own columns only. They
    have the same neighbours, and are neighbours of each other if their other entries sum to enough for eps.

    ranks: (N, k or more) from `rank_neighbors`, all that the encodings were made with. k: how many of them
    the extension reads. codes: (N,) int64 >= 0, a number for each camera.
    """
    indptr, indices, values = encodings
    sizes, itself = indptr.diff(), torch.arange(len(ranks), device=ranks.device)
    alone = ranks.flatten().bincount(minlength=len(ranks)) == 1
    listed = torch.cat([torch.where(alone, -1 - codes, itself)[:, None], ranks[:, 1:k]], 1)
    first = first_equal(listed)
    stays = first == itself
    repeats = (~stays).nonzero()[:, 0]
    if len(repeats) == 0:
        return encodings, first
    place, owner = spans(indptr[repeats], sizes[repeats])
    units = in_units(values[place]).long() * (indices[place] != repeats[owner])
    apart = repeats[torch.zeros_like(repeats).index_add_(0, owner, units) < least_overlap(eps)]
    first[apart] = apart  # they have no neighbours
    kept, sizes = stays.repeat_interleave(sizes), sizes * stays
    return (torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), indices[kept], values[kept]), first
