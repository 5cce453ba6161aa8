"""DBSCAN from portions of pairs, in memory linear in the points."""

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ecul.common import distributed


class Density:
    """DBSCAN of points whose pairs of neighbours come in portions.

    A point with enough neighbours among the pairs so far is a core point. Only the groups that core points
    form are kept, not the pairs between them. So every point that is no core point keeps all of its pairs,
    fewer than `min_samples`.

    weights: (N,) how many equal points, all neighbours of each other, a point stands for.
    groups: (N,) for each point the smallest point of its group, None before there are any. Two points of one
        group need no pair.
    """

    def __init__(self, weights: np.ndarray, min_samples: int):
        self.weights, self.counts, self.min_samples = weights, weights.astype(float), min_samples
        self.itself = np.arange(len(weights))
        self.groups: np.ndarray | None = None
        self.pairs, self.kept = np.empty((2, 0), np.int64), 0

    def add(self, pairs: np.ndarray) -> None:
        """Pairs (i, j) of neighbours, (2, some), each once and in one direction."""
        for one, other in (pairs, pairs[::-1]):
            self.counts += np.bincount(one, self.weights[other], minlength=len(self.counts))
        self.pairs = np.concatenate([self.pairs, pairs], axis=1)
        if self.pairs.shape[1] > 2 * self.kept + len(self.itself) // 4:  # memory and time stay linear
            self._group()

    def _group(self) -> None:
        groups = self.itself if self.groups is None else self.groups
        inner = (self.counts >= self.min_samples)[self.pairs].all(axis=0)
        i, j = np.concatenate([self.pairs[:, inner], [self.itself, groups]], axis=1)
        links = csr_matrix((np.ones(len(i), bool), (i, j)), shape=(len(self.itself),) * 2)
        component = connected_components(links, directed=False)[1]
        _, smallest, which = np.unique(component, return_index=True, return_inverse=True)
        self.groups, self.pairs = smallest[which], self.pairs[:, ~inner]
        self.kept = self.pairs.shape[1]

    def join(self, device: torch.device) -> None:
        """Add what the other processes have found, from pairs of which each has a part."""
        self._group()
        found = np.concatenate([self.pairs, [self.itself, self.groups]], axis=1)
        counts = torch.from_numpy(self.counts - self.weights).to(device)
        self.counts = self.weights + distributed.join(counts[None]).sum(0).cpu().numpy()
        self.pairs = distributed.join(torch.from_numpy(found.T).to(device)).T.cpu().numpy()

    def labels(self) -> Tensor:
        """(N,) int64: clusters in the order of their smallest core points, -1 for outliers."""
        self._group()
        core, size = self.counts >= self.min_samples, len(self.counts)
        labels = np.full(size, -1)
        labels[core] = np.unique(np.asarray(self.groups)[core], return_inverse=True)[1]
        reached = np.full(size, size)
        for one, other in (self.pairs, self.pairs[::-1]):
            border = ~core[one] & core[other]
            np.minimum.at(reached, one[border], labels[other[border]])
        return torch.from_numpy(np.where(reached < size, reached, labels))
