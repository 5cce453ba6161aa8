"""What an epoch learns from: labels, then memories with their losses, then batches.

A stage is data: a list of terms. A term is one memory with its weight and the labels that the batch's
images have in it; the loop computes every term's loss in the same way and updates every memory in the
same way. Stage 1 has a cluster and an instance term per modality; stage 2 adds joint terms (ECUL),
agnostic terms (MBCCM), or both (united).
"""

import copy
from dataclasses import dataclass

import torch

from ecul import MODALITIES
from ecul.clustering import emcc
from ecul.common import distributed
from ecul.matching import match_clusters, select_instances
from ecul.memory import ClusterMemory, InstanceMemory, cluster_means, random_members, tsmem
from ecul.sampling import Clusters, independent_batches, joint_batches, matched_batches

VIEWS = {"visible": 2, "infrared": 1}  # views of each image in a batch


@dataclass(frozen=True)
class Labels:
    """Pseudo labels of one epoch; each is a dict modality -> (N,) int64, -1 = outlier.

    joint (one numbering over both modalities) and selected (joint labels after instance selection) are None
    where the stage has no joint terms, match (B infrared, A visible) is None without matched pairs.
    """

    own: dict
    joint: dict | None = None
    selected: dict | None = None
    match: object = None

    def counts(self):
        """Clusters and outliers by name, for the log."""
        named = {**self.own, **({"joint": torch.cat(list(self.joint.values()))} if self.joint else {})}
        row = {f"clusters_{m}": _count(v) for m, v in named.items()}
        return row | {f"outliers_{m}": int((v < 0).sum()) for m, v in named.items()}


@dataclass(frozen=True)
class Term:
    """One memory, its weight, and how a batch's images are labelled in it.

    labels, rows: dict modality of the features -> (modality whose image gives the label, per-image int64).
    The two modalities differ only in matched pairs, where an infrared image also has its partner's label.
    rows are what `update` moves: the cluster, or the image's own slot.
    """

    name: str
    weight: float
    memory: ClusterMemory | InstanceMemory
    labels: dict
    rows: dict

    def loss(self, features, index):
        """Contrastive loss summed over views: views times the mean over labelled samples."""
        x = torch.cat([features[m] for m in self.labels])
        return sum(VIEWS[m] for m in self.labels) * self.memory(x, _gather(self.labels, index))

    def update(self, features, index, generator):
        x = torch.cat([features[m] for m in self.rows])
        self.memory.update(x, _gather(self.rows, index), generator)


def assign_labels(features, cameras, config, cross):
    """Cluster each modality and, in stage 2, their union; match clusters across modalities.

    features: dict modality -> (N, D) unit rows; cameras: dict modality -> (N,) int64; cross: stage 2.
    """
    own = {
        m: emcc(
            features[m], cameras[m], k1=config.k1, k2=config.k2, k3=config.k3,
            eps=config.eps, min_samples=config.min_samples,
        )
        for m in MODALITIES
    }  # fmt: skip
    if not cross or not usable(own):
        return Labels(own)
    joint = selected = match = None
    if config.weight_joint > 0:
        joint = _joint_labels(features, cameras, config)
        selected = joint
        if config.k_select is not None:
            v, r = MODALITIES
            kept = select_instances(features[v], features[r], joint[v], joint[r], config.k_select)
            selected = dict(zip(MODALITIES, kept, strict=True))
    if config.pairs == "matched":
        centers = [cluster_means(features[m], own[m]) for m in MODALITIES]
        match = match_clusters(centers[0], centers[1], config.matching).cpu().numpy()
    return Labels(own, joint, selected, match)


def share_labels(labels, features):
    """Process 0's labels on every process; labels is None on the others."""
    if distributed.size() == 1:
        return labels
    sizes = [len(features[m]) for m in MODALITIES]
    device = features["visible"].device
    parts = [labels.own, labels.joint, labels.selected] if labels else [None] * 3
    absent = torch.full((sum(sizes),), -2, device=device)
    table = torch.stack([absent if p is None else torch.cat([p[m] for m in MODALITIES]) for p in parts])
    matched = torch.tensor(int(labels is not None and labels.match is not None), device=device)
    distributed.broadcast(table)
    own, joint, selected = (dict(zip(MODALITIES, row.split(sizes), strict=True)) for row in table)
    match = None
    if int(distributed.broadcast(matched)):
        match = torch.zeros(_count(own["infrared"]), _count(own["visible"]), dtype=torch.uint8, device=device)
        if labels is not None:
            match.copy_(torch.from_numpy(labels.match))
        match = distributed.broadcast(match).bool().cpu().numpy()
    has_joint = bool((table[1] > -2).any())
    return Labels(own, joint if has_joint else None, selected if has_joint else None, match)


def _joint_labels(features, cameras, config):
    both = torch.cat([features[m] for m in MODALITIES])
    sizes = [len(features[m]) for m in MODALITIES]
    modalities = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes)).to(both.device)
    labels = emcc(
        both, torch.cat([cameras[m] for m in MODALITIES]), modalities,
        k1=config.k1_joint, k2=config.k2_joint, k3=config.k3_joint,
        eps=config.eps_joint, min_samples=config.min_samples,
    )  # fmt: skip
    return dict(zip(MODALITIES, labels.split(sizes), strict=True))


def usable(own):
    """Whether there is something to tell apart: two clusters in each modality."""
    return min(_count(v) for v in own.values()) >= 2


def make_terms(features, labels, config, epoch, generator):
    """The memories of this epoch, started from its features and labels, each with its loss weight."""
    start, rule, momentum = "mean", config.update_rule, config.momentum
    if rule == "tsmem":
        start, rule, momentum = tsmem(epoch, config.tsmem_switch, momentum)

    def clusters(f, y, groups=None):
        rows = cluster_means(f, y, groups) if start == "mean" else random_members(f, y, generator)
        return ClusterMemory.from_clusters(rows, config.temp, momentum, rule)

    def instances(f, y):
        return InstanceMemory.from_features(f, y, config.temp, momentum)

    terms = []
    for m in MODALITIES:
        own = {m: (m, labels.own[m])}
        terms.append(Term(f"cluster_{m}", 1.0, clusters(features[m], labels.own[m]), own, own))
        slots = {m: (m, _slots(features[m]))}
        if config.weight_instance > 0:
            memory = instances(features[m], labels.own[m])
            terms.append(Term(f"instance_{m}", config.weight_instance, memory, own, slots))
    if labels.joint is not None and _count(torch.cat(list(labels.joint.values()))) >= 2:
        terms += _joint_terms(features, labels, config, clusters, instances)
    if labels.match is not None and max(config.weight_agnostic, config.weight_consistency) > 0:
        specific = {t.name: t.memory for t in terms}
        for m in MODALITIES:
            paired = dict.fromkeys(MODALITIES, (m, labels.own[m]))
            memory = copy.deepcopy(specific[f"cluster_{m}"])
            terms.append(Term(f"agnostic_{m}", config.weight_agnostic, memory, paired, paired))
    return terms


def _joint_terms(features, labels, config, clusters, instances):
    both = torch.cat([features[m] for m in MODALITIES])
    modality = torch.cat([torch.full_like(labels.joint[m], i) for i, m in enumerate(MODALITIES)])
    joint = {m: (m, labels.joint[m]) for m in MODALITIES}
    selected = {m: (m, labels.selected[m]) for m in MODALITIES}
    slots = dict(zip(MODALITIES, _slots(both).split([len(features[m]) for m in MODALITIES]), strict=True))
    slots = {m: (m, v) for m, v in slots.items()}
    cluster_memory = clusters(both, torch.cat(list(labels.joint.values())), modality)
    terms = [Term("cluster_joint", config.weight_joint, cluster_memory, joint, joint)]
    if config.weight_instance > 0:
        memory = instances(both, torch.cat(list(labels.selected.values())))
        terms.append(Term("instance_joint", config.weight_joint, memory, selected, slots))
    return terms


def make_batches(labels, cameras, config, rng):
    """The epoch's batches, as pairs of index arrays (visible, infrared)."""
    sizes = (config.identities, config.instances, config.iterations, rng)
    visible, infrared = (Clusters(labels.own[m].cpu(), cameras[m].cpu()) for m in MODALITIES)
    if labels.match is not None:
        return matched_batches(visible, infrared, labels.match, *sizes)
    if config.pairs == "joint" and labels.joint is not None:
        both_v, both_r = (Clusters(labels.joint[m].cpu(), cameras[m].cpu()) for m in MODALITIES)
        if max(len(both_v), len(both_r)) >= 2:
            return joint_batches(both_v, both_r, *sizes)
    return independent_batches(visible, infrared, *sizes)


def _gather(tables, index):
    return torch.cat([per_image[index[source]].repeat(VIEWS[m]) for m, (source, per_image) in tables.items()])


def _slots(features):
    return torch.arange(len(features), device=features.device)


def _count(labels):
    return int(labels.max()) + 1 if len(labels) else 0
