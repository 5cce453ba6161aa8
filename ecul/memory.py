"""Memory banks and their losses, and TSMem, the two-step memory updating of ECUL.

A bank is a matrix of unit rows. Forward and backward never change it: a loss reads the rows, and `update`,
called after the optimiser's step, moves them.

ECUL: https://arxiv.org/abs/2412.19134, MBCCM: https://arxiv.org/abs/2305.12673
"""

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn

from ecul.common.arrays import as_tensor
from ecul.kernels import memory_contrast, momentum_update_
from ecul.kernels.contrast import check_temperature
from ecul.kernels.momentum import check_rule

Whole = torch.Tensor | ArrayLike  # whole numbers of any kind: a tensor, an array, a list


def consistency_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Symmetric KL divergence of two sets of logits (already divided by the temperature), batch mean.

        (F.kl_div(log_softmax(a), softmax(b)) + F.kl_div(log_softmax(b), softmax(a))) / 2

    a, b: (B, C) logits, both differentiable. Returns a scalar. Source: MBCCM, consistency constraint.
    """
    log_a, log_b = F.log_softmax(a.float(), dim=1), F.log_softmax(b.float(), dim=1)
    return 0.5 * ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(dim=1).mean()


def _each(name: str, values: torch.Tensor | ArrayLike, rows: torch.Tensor) -> torch.Tensor:
    """A number for each of these rows, on their device."""
    numbers = as_tensor(name, values, rows.device)
    if numbers.shape != rows.shape[:1]:
        raise ValueError(f"{name}: expected {len(rows)}, one a row, got {tuple(numbers.shape)}")
    return numbers


def _whole(name: str, values: Whole, rows: torch.Tensor) -> torch.Tensor:
    """int64 from whole numbers of any kind, one for each of these rows."""
    numbers = _each(name, values, rows)
    if numbers.numel() and (numbers.is_floating_point() or numbers.dtype == torch.bool):
        raise TypeError(f"{name} must be whole numbers, got {numbers.dtype}")
    return numbers.long()


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, in float32 at least: half precision overflows in a norm, and has no norm near 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


class _Memory(nn.Module):
    """A bank of unit rows, one per `num_samples`, with the label of each row."""

    _saves_labels = False  # labels that count from 0 need no place in a state dict

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.1,
        rule: str = "sequential",
        use_hard: bool = False,
    ):
        super().__init__()
        rule = "hard" if use_hard else rule
        check_temperature(temp)
        check_rule(momentum, rule)
        self.num_features, self.num_samples = num_features, num_samples
        self.temp, self.momentum, self.rule = temp, momentum, rule
        self.features: torch.Tensor
        self.labels: torch.Tensor
        self.register_buffer("features", torch.zeros(num_samples, num_features, dtype=torch.float32))
        self.register_buffer("labels", torch.arange(num_samples), persistent=self._saves_labels)

    def forward(
        self, x: torch.Tensor, labels: Whole, weights: torch.Tensor | ArrayLike | None = None, **others: Any
    ) -> torch.Tensor:
        """Mean contrastive loss of x: (B, D), normalised here, with labels: (B,), -1 = no loss.

        weights: (B,) a factor for each sample's loss. Errors: TypeError for any other argument.
        """
        if others:
            told = "a memory moves in update(x, labels, momentum=...) alone, weights= are per sample"
            raise TypeError(f"the loss takes x, labels and weights, not {', '.join(others)}: {told}")
        labels = _whole("labels", labels, x)
        loss = memory_contrast(_unit(x), self.features, self.labels, labels, self.temp)
        if weights is not None:
            loss = loss * _each("weights", weights, loss).to(loss.dtype)
        return loss.sum() / (labels >= 0).sum().clamp(min=1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`normalize(x) @ features.T / temp`: (B, num_samples), differentiable in x alone.

        In float32 at least, under autocast too: divided by the temperature, half precision is too coarse.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = _unit(x)
            return x @ self.features.to(x.dtype).T / self.temp

    @torch.no_grad()
    def update(
        self,
        x: torch.Tensor,
        labels: Whole,
        generator: torch.Generator | None = None,
        momentum: float | None = None,
    ) -> None:
        """Move the rows `labels` (B,), -1 = none, towards x: (B, D), normalised here, by the rule.

        generator: draws the member for the rule "instance"; momentum: in place of the memory's own.
        Source: ECUL and MBCCM.
        """
        labels = _whole("labels", labels, x)
        kept = self.momentum if momentum is None else momentum
        momentum_update_(self.features, _unit(x).float(), labels, kept, self.rule, generator=generator)


class ClusterMemory(_Memory):
    """A row per cluster; `memory(x, labels)` is the cluster-level contrastive loss.

        F.cross_entropy(normalize(x) @ memory.features.T / temp, labels, ignore_index=-1)

    num_features: D; num_samples: number of clusters C; rule: "sequential" (MBCCM and its ancestors),
    "instance", "mean" or "hard"; momentum is the part kept of the old row. Set `.features` (C, D) to the
    starting rows, or use `from_clusters`. Published memories move in `backward`; this one moves in
    `update(x, labels)` alone, so call that after every step of the optimiser.
    labels are whole numbers of any kind: a tensor, an array, a list. `use_hard=True` is the published name of
    rule="hard". Errors: ValueError for momentum, temp or rule out of range; TypeError for labels that are no
    whole numbers. Source: ECUL and MBCCM, cluster memories.
    """

    @classmethod
    def from_clusters(
        cls, rows: torch.Tensor, temp: float = 0.05, momentum: float = 0.1, rule: str = "sequential"
    ) -> "ClusterMemory":
        """A memory that starts from a copy of these rows (C, D), normalised here."""
        memory = cls(rows.shape[1], rows.shape[0], temp, momentum, rule).to(rows.device)
        memory.features.copy_(_unit(rows))
        return memory


class InstanceMemory(_Memory):
    """A row per training image; `memory(x, labels)` is the instance-level contrastive loss.

        s = normalize(x) @ memory.features.T / temp
        (logsumexp(s, 1) - logsumexp(s.masked_fill(memory.labels != labels[:, None], -inf), 1)).mean()

    All rows of a sample's cluster are positives, summed inside the logarithm. x: (B, num_features), labels:
    (B,) int64, -1 = no loss; num_samples: images N. `from_features` sets `.features` (N, num_features) and
    `.labels` (N,), and a state dict holds both. `update(x, index)` moves the rows of these images (not of
    their clusters). Kinds of labels and errors: as in `ClusterMemory`. Source: ECUL, instance-level contrast.
    """

    _saves_labels = True

    @classmethod
    def from_features(
        cls, features: torch.Tensor, labels: Whole, temp: float = 0.05, momentum: float = 0.1
    ) -> "InstanceMemory":
        """A memory that starts from features (N, D), normalised here, and their labels (N,).

        An outlier (-1) gets a label of its own: nobody's positive. Errors: as in `ClusterMemory`.
        """
        labels = _whole("labels", labels, features)
        memory = cls(features.shape[1], features.shape[0], temp, momentum).to(features.device)
        memory.features.copy_(_unit(features))
        memory.labels.copy_(torch.where(labels < 0, -2 - memory.labels, labels))
        return memory


def tsmem(epoch: int, switch: int) -> tuple[str, str, float]:
    """TSMem: how memories start and move in this epoch, as (start, rule, momentum).

    Step 1, epochs before `switch`, for diversity: a row starts as one random member of its cluster. Step 2,
    for generalisation: as the normalised mean. In both, one random member of the batch replaces the row.
    Source: ECUL (two steps, first diversity, later generalisation); the rules themselves are [R], read from
    its nearest relatives.
    """
    return "random" if epoch < switch else "mean", "instance", 0.0


def cluster_means(features: torch.Tensor, labels: Whole, groups: Whole | None = None) -> torch.Tensor:
    """Normalised mean of each cluster's members: `normalize(features[labels == c].mean(0))` for every c.

    features: (N, D); labels: (N,) int64 from 0 without gaps, -1 = left out; groups: (N,) int64 or None. With
    groups (modalities), the mean over groups present of the group means [R, the joint cluster centre].
    Returns (C, D) unit rows, float32 at least; none when every label is -1. Errors: ValueError for gaps.
    """
    labels, count = _numbered(labels, features)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    groups = _whole("groups", 0 * labels if groups is None else groups, features)
    means, present = features.new_zeros(count, features.shape[1]), features.new_zeros(count, 1)
    for group in groups[labels >= 0].unique():
        rows = ((groups == group) & (labels >= 0)).nonzero().flatten()
        rows = rows[labels[rows].argsort(stable=True)]
        sizes = torch.bincount(labels[rows], minlength=count)
        sums = torch.segment_reduce(features[rows], "sum", lengths=sizes, initial=0)  # in order on a GPU too
        means += sums / sizes.clamp(min=1)[:, None]
        present += (sizes > 0)[:, None]
    return F.normalize(means / present, dim=1)


def random_members(
    features: torch.Tensor, labels: Whole, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One random member of each cluster: (C, D) unit rows, drawn uniformly with `generator` (of the CPU).

    features, labels, errors: as in `cluster_means`.
    """
    labels, count = _numbered(labels, features)
    rows = torch.randperm(len(labels), generator=generator).to(labels.device)
    rows = rows[labels[rows] >= 0]
    rows = rows[labels[rows].argsort(stable=True)]
    sizes = torch.bincount(labels[rows], minlength=count)
    return _unit(features[rows[sizes.cumsum(0) - sizes]])


def _numbered(labels: Whole, features: torch.Tensor) -> tuple[torch.Tensor, int]:
    """int64 labels, and the number of clusters. Errors: ValueError where a number from 0 on is absent."""
    labels = _whole("labels", labels, features)
    present = labels[labels >= 0].unique()
    absent = (present != torch.arange(len(present), device=labels.device)).nonzero()
    if len(absent):
        told = f"{int(absent[0])} is absent; number the clusters anew"
        raise ValueError(f"labels must count from 0 without gaps: {told}")
    return labels, len(present)
