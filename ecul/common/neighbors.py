"""The nearest points of every point, and the similarities of pairs: equal points are handled once."""

from typing import NamedTuple

import torch
from torch import Tensor

from ecul.common import distributed
from ecul.common.arrays import check_sizes
from ecul.common.duplicates import nearest_members
from ecul.kernels import pair_similarity
from ecul.kernels.neighbors import topk_together


class Neighbors(NamedTuple):
    """The nearest points of N points, of which `rows` are distinct."""

    points: Tensor  # (rows, D) float32, the distinct points
    group: Tensor  # (N,) int64, the row of each point there
    similar: Tensor  # (rows, k) float32, and
    near: Tensor  # (rows, k) int64: `topk_similarity(points, points, k)`
    ranks: Tensor  # (N, k) int64: `rank_neighbors`

    def similarity(self, rows: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The similarity of points rows[i] and j, (pairs,) float32; known ones are not computed again.

        rows: (some,) int64, numbers of distinct points. i, j: (pairs,) int64, a place in `rows` and a point.
        """
        near, order = self.near[rows].sort(dim=1)
        first = len(self.points) * torch.arange(len(rows) + 1, device=rows.device)
        keys, pairs = torch.cat([(first[:-1, None] + near).flatten(), first[-1:]]), first[i] + j
        place = torch.searchsorted(keys, pairs)
        similar = self.similar[rows].gather(1, order).flatten()
        found = torch.cat([similar, similar.new_empty(1)])[place]
        other = (keys[place] != pairs).nonzero()[:, 0]
        found[other] = pair_similarity(self.points, self.points, rows[i[other]], j[other]).float()
        return found


def neighbors(points: Tensor, group: Tensor, k: int, together: bool = False) -> Neighbors:
    """The k nearest points of every point; points and group from `distinct_rows`."""
    check_sizes(k=k)
    few, k = min(k, len(points)), min(k, len(group))
    similar, near = topk_together(points, points, few, False, distributed.team(together))
    ranks = near if len(points) == len(group) else nearest_members(similar, near, group, k)[group]
    itself = torch.arange(len(group), device=group.device)[:, None]
    others = ranks.gather(1, (ranks == itself).int().sort(dim=1, stable=True).indices)[:, : k - 1]
    return Neighbors(points, group, similar, near, torch.cat([itself, others], 1)[:, :k])
