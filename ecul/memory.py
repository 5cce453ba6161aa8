"""Memory banks and TSMem, the two-step memory updating of ECUL.

A bank is a matrix of unit rows. Neither forward nor backward changes it: the loss reads a snapshot and
`update` is an explicit call after the optimiser's step.

ECUL: https://arxiv.org/abs/2412.19134
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn

from ecul.kernels import momentum_update_
from ecul.losses import contrastive_loss

RULES = ("sequential", "instance", "mean", "hard")
IDLE = 1000  # losses without an update after which a memory says so
Whole = torch.Tensor | ArrayLike  # whole numbers of any kind: a tensor, an array, a list
Function = TypeVar("Function", bound=Callable[..., Any])


def _also(**published: str) -> Callable[[Function], Function]:
    """Let keyword arguments have the names that published memories give them: `inputs="x"`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            for old, name in published.items():
                if old in options and name in options:
                    raise TypeError(f"{old} is called {name} here: give one of the two")
            return function(*args, **{published.get(name, name): value for name, value in options.items()})

        return cast(Function, wrapper)

    return decorate


def _whole(name: str, values: Whole, device: torch.device) -> torch.Tensor:
    """int64 on this device, from whole numbers of any kind. Errors: TypeError for other numbers."""
    numbers = torch.as_tensor(values, device=device)
    if len(numbers) and (numbers.is_floating_point() or numbers.dtype == torch.bool):
        raise TypeError(f"{name} must be whole numbers, got {numbers.dtype}")
    return numbers.long()


class _Memory(nn.Module):
    """A bank of unit rows, one per `num_samples`, with the label of each row."""

    _saves_labels = False  # those that count from 0 need no place in a state dict

    @_also(use_hard="rule")
    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.1,
        rule: str | bool = "sequential",
    ):
        super().__init__()
        if isinstance(rule, bool):  # the published use_hard
            rule = "hard" if rule else "sequential"
        if num_features < 1 or num_samples < 1:
            raise ValueError(
                f"num_features and num_samples must be at least 1, got {num_features} and {num_samples}"
            )
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not temp > 0:
            raise ValueError(f"temp must be above 0, got {temp}")
        self.num_features, self.num_samples = num_features, num_samples
        self.temp, self.momentum, self.rule = temp, momentum, rule
        self.features: torch.Tensor
        self.labels: torch.Tensor
        self.register_buffer("features", torch.zeros(num_samples, num_features, dtype=torch.float32))
        self.register_buffer("labels", torch.arange(num_samples), persistent=self._saves_labels)
        self._idle = 0  # losses since the last update

    @_also(inputs="x", targets="labels")
    def forward(self, x: torch.Tensor, labels: Whole) -> torch.Tensor:
        """Mean contrastive loss of x: (B, D), normalised here, with labels: (B,), -1 = no loss."""
        labels = _whole("labels", labels, x.device)
        if x.requires_grad and not torch.compiler.is_compiling():
            self._idle += 1
            if self._idle == IDLE:
                warnings.warn(
                    f"this {type(self).__name__} has given {IDLE:,} losses without an update: call its "
                    "update after each step of the optimiser, since backward moves no row here",
                    stacklevel=2,
                )
        return contrastive_loss(F.normalize(x, dim=1), self.features, self.labels, labels, self.temp)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`normalize(x) @ features.T / temp`: (B, num_samples), differentiable in x alone.

        In float32 at least, under autocast too: divided by the temperature, half precision is too coarse.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return F.normalize(x, dim=1) @ self.features.to(x.dtype).T / self.temp

    @_also(inputs="x", targets="labels", indexes="labels")
    @torch.no_grad()
    def update(self, x: torch.Tensor, labels: Whole, generator: torch.Generator | None = None) -> None:
        """Move the rows `labels` (B,), -1 = none, towards x: (B, D), normalised here, by the rule.

        `generator` draws the member for the rule "instance". Source: ECUL and MBCCM.
        """
        self._idle = 0
        labels = _whole("labels", labels, self.features.device)
        x = F.normalize(x.detach().float(), dim=1)
        momentum_update_(self.features, x, labels, self.momentum, self.rule, generator=generator)

    def extra_repr(self) -> str:
        sizes = f"{self.num_samples}, {self.num_features}"
        return f"{sizes}, temp={self.temp}, momentum={self.momentum}, rule={self.rule!r}"


class ClusterMemory(_Memory):
    """A row per cluster; `memory(x, labels)` is the cluster-level contrastive loss.

        F.cross_entropy(normalize(x) @ memory.features.T / temp, labels, ignore_index=-1)

    num_features: D; num_samples: number of clusters C; rule: "sequential" (MBCCM and its ancestors),
    "instance", "mean" or "hard"; momentum is the part kept of the old row. Set `.features` (C, D) to the
    starting rows, or use `from_clusters`. `update(x, labels)` after the optimiser's step moves the rows.
    labels are whole numbers of any kind: a tensor, an array, a list. Published names are understood:
    `memory(inputs=x, targets=labels)`, and `use_hard=True` for rule="hard".
    Errors: ValueError for sizes, momentum, temp or rule out of range; TypeError for labels that are no whole
    numbers. A memory that gave 1,000 losses without an update warns.
    Source: ECUL and MBCCM, cluster memories.
    """

    @classmethod
    def from_clusters(
        cls, rows: torch.Tensor, temp: float = 0.05, momentum: float = 0.1, rule: str = "sequential"
    ) -> "ClusterMemory":
        """A memory whose storage is a copy of these starting rows (C, D)."""
        memory = cls(rows.shape[1], rows.shape[0], temp, momentum, rule).to(rows.device)
        memory.features.copy_(F.normalize(rows, dim=1))
        return memory


class InstanceMemory(_Memory):
    """A row per training image; `memory(x, labels)` is the instance-level contrastive loss.

        s = normalize(x) @ memory.features.T / temp
        (logsumexp(s, 1) - logsumexp(s.masked_fill(memory.labels != labels[:, None], -inf), 1)).mean()

    All rows of a sample's cluster are positives, summed inside the logarithm. x: (B, num_features), labels:
    (B,) int64, -1 = no loss; num_samples: images N. `from_features` sets `.features` (N, num_features) and
    `.labels` (N,), and a state dict holds both. `update(x, index)` moves the rows of these images (not of
    their clusters). Names and kinds of labels, errors and the warning: as in `ClusterMemory`.
    Errors: ValueError for sizes, momentum, temp or rule out of range. Source: ECUL, instance-level contrast.
    """

    _saves_labels = True

    @classmethod
    def from_features(
        cls, features: torch.Tensor, labels: Whole, temp: float = 0.05, momentum: float = 0.1
    ) -> "InstanceMemory":
        """A memory that starts from features (N, D), normalised here, and their labels (N,), -1 = outlier."""
        memory = cls(features.shape[1], features.shape[0], temp, momentum).to(features.device)
        memory.features.copy_(F.normalize(features, dim=1))
        memory.assign(labels)
        return memory

    def assign(self, labels: Whole) -> None:
        """Give each row its cluster label; an outlier (-1) gets a label of its own: nobody's positive.

        Errors: ValueError for another number of labels than rows.
        """
        labels = _whole("labels", labels, self.features.device)
        if labels.shape != self.labels.shape:
            raise ValueError(f"labels: expected {self.num_samples}, one a row, got {tuple(labels.shape)}")
        own = -2 - torch.arange(self.num_samples, device=self.features.device)
        self.labels.copy_(torch.where(labels < 0, own, labels))


def tsmem(epoch: int, switch: int) -> tuple[str, str, float]:
    """TSMem: how memories start and move in this epoch, as (start, rule, momentum).

    Step 1, epochs before `switch`, for diversity: rows start as one random member. Step 2, for
    generalisation: as normalised means. In both, one random member of the batch replaces a row.
    Source: ECUL (two steps, first diversity, later generalisation); the rules themselves are [R], read from
    its nearest relatives.
    """
    return "random" if epoch < switch else "mean", "instance", 0.0


def cluster_means(features: torch.Tensor, labels: Whole, groups: Whole | None = None) -> torch.Tensor:
    """Normalised mean of each cluster's members: `normalize(features[labels == c].mean(0))` for every c.

    features: (N, D); labels: (N,) int64, -1 = left out, contiguous from 0; groups: (N,) int64 or None. With
    groups (modalities), the mean over groups present of the group means [R, the joint cluster centre].
    Returns (C, D) unit rows; none when every label is -1.
    """
    labels = _whole("labels", labels, features.device)
    if len(labels) == 0 or int(labels.max()) < 0:
        return features.new_empty(0, features.shape[1])
    if groups is None:
        return F.normalize(_means(features, labels)[0], dim=1)
    groups = _whole("groups", groups, features.device)
    parts = [_means(features, torch.where(groups == g, labels, -1), labels) for g in groups.unique()]
    means, present = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return F.normalize(means / present, dim=1)


def _means(
    features: torch.Tensor, labels: torch.Tensor, all_labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    count = int((labels if all_labels is None else all_labels).max()) + 1
    order = labels.argsort(stable=True)
    order = order[labels[order] >= 0]
    sizes = torch.bincount(labels[order], minlength=count)
    sums = torch.segment_reduce(features[order], "sum", lengths=sizes, initial=0)  # in order, also on a GPU
    return sums / sizes.clamp(min=1)[:, None], (sizes > 0).to(features.dtype)[:, None]


def random_members(
    features: torch.Tensor, labels: Whole, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One random member of each cluster: (C, D) rows of `features`, drawn uniformly with `generator`."""
    labels = _whole("labels", labels, features.device)
    shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
    shuffled = shuffled[labels[shuffled] >= 0]
    chosen = torch.empty(int(labels.max()) + 1, dtype=torch.int64, device=labels.device)
    first = torch.full_like(chosen, len(labels)).scatter_reduce_(
        0, labels[shuffled], torch.arange(len(shuffled), device=labels.device), "amin"
    )
    return F.normalize(features[shuffled[first]], dim=1)
