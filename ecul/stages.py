"""What an epoch learns from: a stage is a list of terms, each one loss with its memory.

The loop treats every term alike: `loss` of a batch's features x (2V + R, D), a scalar times its weight, then
`update` of its memory, after the optimiser's step. Stage 1 has a cluster and an instance term per modality.
Stage 2 adds joint terms (ECUL), agnostic terms (united), or agnostic and consistency terms (MBCCM).

ECUL: https://arxiv.org/abs/2412.19134, MBCCM: https://arxiv.org/abs/2305.12673
"""

import copy
from dataclasses import dataclass, replace

import torch

from ecul.batches import Batch
from ecul.common import distributed
from ecul.config import Config
from ecul.labels import Labels, count_clusters
from ecul.memory import ClusterMemory, InstanceMemory, cluster_means, consistency_loss, random_members, tsmem


@dataclass(frozen=True)
class Contrast:
    """Contrastive loss of one memory, summed over views: the number of views times the mean over the labelled
    samples [R, where clusters may have no match].

    modality: whose positions of the batch take part; None for both. labels: (N,) the label of each training
    image in this memory. slots: (N,) the row that each image moves: its cluster's, or its own. paired: None:
    a position counts as its own image; else as the image of this modality in its matched pair.
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
        return self.weight * (views * self.memory(x[part], self.labels[batch.images(self.paired)[part]]))

    def update(self, x: torch.Tensor, batch: Batch) -> None:
        part, _ = batch.part(self.modality)
        self.memory.update(x[part], self.slots[batch.images(self.paired)[part]], self.generator)


@dataclass(frozen=True)
class Consistency:
    """MBCCM's consistency constraint, summed over the three views: a modality's specific and agnostic
    memories must give the same soft assignment. banks: the two memories of each modality."""

    name: str
    weight: float
    banks: list[tuple[ClusterMemory | InstanceMemory, ClusterMemory | InstanceMemory]]

    def loss(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        views = x.split(batch.sizes)
        losses = [consistency_loss(s.logits(view), a.logits(view)) for view in views for s, a in self.banks]
        return self.weight * torch.stack(losses).sum()

    def update(self, x: torch.Tensor, batch: Batch) -> None:
        """Nothing: the contrast terms move these memories."""


Term = Contrast | Consistency


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
    own, joint, border = labels.own, labels.joint, labels.num_visible
    instance, both = config.weight_instance, config.weight_joint
    sides = [  # name, images, then weights and labels of the cluster and the instance term
        ("visible", slice(border), 1.0, instance, own, own),
        ("infrared", slice(border, None), 1.0, instance, own, own),
    ]
    if joint is not None and both > 0 and count_clusters(joint) >= 2:
        selected = joint if labels.selected is None else labels.selected
        sides.append(("joint", slice(None), both, both if instance > 0 else 0.0, joint, selected))
    start, rule, momentum = "mean", config.update_rule, config.momentum
    if rule == "tsmem":
        start, rule, momentum = tsmem(epoch, config.tsmem_switch)

    contrasts = []
    index = torch.arange(len(own), device=own.device)
    for kind, part, weight, weight_instance, clusters, images in sides:
        x, y, modality = features[part], clusters[part], None if kind == "joint" else kind
        if start == "random":
            rows = random_members(x, y, generator)
        else:
            rows = cluster_means(x, y, groups=(index[part] >= border).long())
        memory = ClusterMemory.from_clusters(rows, config.temp, momentum, rule)
        contrasts.append(
            Contrast(f"cluster_{kind}", weight, memory, modality, clusters, clusters, generator=generator)
        )
        if weight_instance > 0:
            bank = InstanceMemory.from_features(x, images[part], config.temp, momentum)
            slots = index - index[part][0]
            contrasts.append(Contrast(f"instance_{kind}", weight_instance, bank, modality, images, slots))
    for term in contrasts:
        distributed.broadcast(term.memory.features)
    if labels.match is None or not config.reads_matches:
        return [*contrasts]
    specific = [term for term in contrasts if term.name in ("cluster_visible", "cluster_infrared")]
    agnostic = [_agnostic(term, config.weight_agnostic, labels) for term in specific]
    terms: list[Term] = [*contrasts, *agnostic]
    if config.weight_consistency > 0:
        banks = [(a.memory, b.memory) for a, b in zip(specific, agnostic, strict=True)]
        terms.append(Consistency("consistency", config.weight_consistency, banks))
    return terms


def _agnostic(term: Contrast, weight: float, labels: Labels) -> Contrast:
    """A term on a copy of this one's memory for both modalities, labelled as `Labels.mutual` says."""
    modality, memory = str(term.modality), copy.deepcopy(term.memory)
    shared = replace(term, name=f"agnostic_{modality}", weight=weight, memory=memory, modality=None)
    if labels.pairing is not None:
        return replace(shared, paired=modality)
    table = labels.across(modality)
    return replace(shared, labels=table, slots=table)
