"""What an epoch learns from: a stage is a list of terms, each one loss with its memory.

The loop computes every term's loss in the same way and updates every term in the same way. Stage 1 has a
cluster and an instance term per modality; stage 2 adds joint terms (ECUL), agnostic terms (united), or these
and the consistency constraint (MBCCM).

ECUL: https://arxiv.org/abs/2412.19134, MBCCM: https://arxiv.org/abs/2305.12673
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ecul import MODALITIES
from ecul.batches import Batch
from ecul.common import distributed
from ecul.config import Config
from ecul.labels import Labels, count_clusters
from ecul.losses import Bank, agreement_loss
from ecul.memory import ClusterMemory, InstanceMemory, cluster_means, random_members, tsmem


class Term(Protocol):
    """One loss of a batch's features x (2P + Q, D), times its weight, and what moves after the step."""

    @property
    def name(self) -> str:
        """What the log calls it."""

    def loss(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A scalar, with its weight."""

    def update(self, x: torch.Tensor, batch: Batch) -> None:
        """Move the memory towards these features, after the optimiser's step."""


@dataclass(frozen=True)
class Contrast:
    """Contrastive loss of one memory, summed over views: views times the mean over the labelled samples, so
    that a view of which fewer samples are labelled weighs less [R, where clusters may have no match].

    modality: whose positions of the batch take part, None for both. labels: (N,) the label of each training
    image in this memory; slots: (N,) the row that it moves, its cluster or its own. paired: a position counts
    as the image of this modality at its place in the matched pairs, None as its own image.
    """

    name: str
    weight: float
    memory: ClusterMemory | InstanceMemory
    modality: str | None
    labels: torch.Tensor
    slots: torch.Tensor
    paired: str | None = None
    generator: torch.Generator | None = None

    def loss(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        part, views = batch.part(self.modality)
        return self.weight * (views * self.memory(x[part], self.labels[self._images(batch)[part]]))

    def update(self, x: torch.Tensor, batch: Batch) -> None:
        part, _ = batch.part(self.modality)
        self.memory.update(x[part], self.slots[self._images(batch)[part]], self.generator)

    def _images(self, batch: Batch) -> torch.Tensor:
        return batch.rows if self.paired is None else batch.paired(self.paired)


@dataclass(frozen=True)
class Consistency:
    """MBCCM's consistency constraint between specific and agnostic memories, summed over the three views."""

    name: str
    weight: float
    specific: Sequence[Bank]
    agnostic: Sequence[Bank]

    def loss(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        losses = [agreement_loss(self.specific, self.agnostic, view) for view in x.split(batch.sizes)]
        return self.weight * torch.stack(losses).sum()

    def update(self, x: torch.Tensor, batch: Batch) -> None:
        """Nothing: the contrast terms move these memories."""


def make_terms(
    features: torch.Tensor,
    labels: Labels,
    config: Config,
    epoch: int,
    generator: torch.Generator | None = None,
) -> list[Term]:
    """The terms of this epoch; their memories start from its features (N, D) and labels.

    `generator` (of the CPU) draws random members, for the start of a memory and for its updates.
    """
    start, rule, momentum = "mean", config.update_rule, config.momentum
    if rule == "tsmem":
        start, rule, momentum = tsmem(epoch, config.tsmem_switch)

    own, border = labels.own, labels.num_visible
    parts = {"visible": slice(border), "infrared": slice(border, None), "joint": slice(None)}

    def cluster_term(kind: str, weight: float, table: torch.Tensor, means: torch.Tensor | None) -> Contrast:
        rows = means
        if rows is None:
            rows = random_members(features[parts[kind]], table[parts[kind]], generator)
        memory = ClusterMemory.from_clusters(rows, config.temp, momentum, rule)
        distributed.broadcast(memory.features)
        modality = None if kind == "joint" else kind
        return Contrast(f"cluster_{kind}", weight, memory, modality, table, table, generator=generator)

    def instance_term(kind: str, weight: float, table: torch.Tensor) -> Contrast:
        rows, labelled = features[parts[kind]], table[parts[kind]]
        memory = InstanceMemory.from_features(rows, labelled, config.temp, momentum)
        distributed.broadcast(memory.features)
        modality = None if kind == "joint" else kind
        slots = torch.arange(len(table), device=table.device) - (parts[kind].start or 0)
        return Contrast(f"instance_{kind}", weight, memory, modality, table, slots)

    contrasts: list[Contrast] = []
    for m, centers in zip(MODALITIES, labels.centers, strict=True):
        contrasts.append(cluster_term(m, 1.0, own, centers if start == "mean" else None))
        if config.weight_instance > 0:
            contrasts.append(instance_term(m, config.weight_instance, own))
    specific = [term for term in contrasts if isinstance(term.memory, ClusterMemory)]
    joint, weight = labels.joint, config.weight_joint
    if joint is not None and weight > 0 and count_clusters(joint) >= 2:
        groups = (torch.arange(len(own), device=own.device) >= border).long()
        means = cluster_means(features, joint, groups) if start == "mean" else None
        contrasts.append(cluster_term("joint", weight, joint, means))
        if config.weight_instance > 0:
            selected = joint if labels.selected is None else labels.selected
            contrasts.append(instance_term("joint", weight, selected))
    if labels.match is None or not config.reads_matches:
        return [*contrasts]
    agnostic = [
        _agnostic(term, config.weight_agnostic, labels.across(m) if labels.mutual else None)
        for term, m in zip(specific, MODALITIES, strict=True)
    ]
    terms: list[Term] = [*contrasts, *agnostic]
    if config.weight_consistency > 0:
        banks = [[term.memory for term in kind] for kind in (specific, agnostic)]
        terms.append(Consistency("consistency", config.weight_consistency, banks[0], banks[1]))
    return terms


def _agnostic(term: Contrast, weight: float, table: torch.Tensor | None) -> Contrast:
    """A term on a copy of this one's memory for the features of both modalities.

    They are labelled by the table (N,) of all training images, or by their pair in the batch (None).
    """
    memory, modality = copy.deepcopy(term.memory), term.modality
    shared = replace(term, name=f"agnostic_{modality}", weight=weight, memory=memory, modality=None)
    return replace(shared, paired=modality) if table is None else replace(shared, labels=table, slots=table)
