"""Pseudo labels: clusters from the features of an epoch, and matches of clusters across the modalities.

ECUL: https://arxiv.org/abs/2412.19134, MBCCM: https://arxiv.org/abs/2305.12673
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ecul import MODALITIES
from ecul.clustering import emcc
from ecul.common import distributed
from ecul.config import Config
from ecul.matching import match_clusters, select_instances
from ecul.memory import cluster_means
from ecul.trainset import TrainImages


@dataclass(frozen=True)
class Labels:
    """Pseudo labels of one epoch over the N training images, visible ones first: (N,) int64, -1 = outlier.

    own: clusters of each modality, both numbered from 0. centers: their normalised means, visible (A, D) and
    infrared (B, D). joint: clusters of both modalities together, and selected: those that instance selection
    keeps; None without joint losses. match: bool (B, A), which clusters belong together, else None.

    mutual: how the matches are used. A memory of one modality labels the images of that modality by their own
    cluster; `mutual` decides how it labels the images of the other modality.
        True, `matching="mutual"`: a cluster has at most one match. Batches draw the modalities independently,
        and an image of the other modality gets the match of its cluster (`across`).
        False, `matching="bilateral"`: a cluster has one match or more. Batches hold matched pairs
        (`pairing`), and an image of the other modality gets the cluster of its partner in the pair.
    """

    own: torch.Tensor
    num_visible: int
    centers: tuple[torch.Tensor, torch.Tensor]
    joint: torch.Tensor | None = None
    selected: torch.Tensor | None = None
    match: np.ndarray | None = None
    mutual: bool = False

    @classmethod
    def from_own(cls, features: torch.Tensor, own: torch.Tensor, num_visible: int, **more: Any) -> "Labels":
        """Labels with the centres of the clusters `own` (N,) of these features (N, D); more: other fields."""
        sides = zip(features.tensor_split([num_visible]), own.tensor_split([num_visible]), strict=True)
        visible, infrared = (cluster_means(x, y) for x, y in sides)
        return cls(own, num_visible, (visible, infrared), **more)

    @property
    def sides(self) -> dict[str, torch.Tensor]:
        """`own` by modality: views of it."""
        parts = self.own[: self.num_visible], self.own[self.num_visible :]
        return dict(zip(MODALITIES, parts, strict=True))

    @property
    def enough(self) -> bool:
        """Whether there is something to learn: two clusters or more in each modality."""
        return min(map(count_clusters, self.sides.values())) >= 2

    @property
    def pairing(self) -> np.ndarray | None:
        """`match` if batches must hold matched pairs, else None, see `mutual`."""
        return None if self.mutual else self.match

    def across(self, modality: str) -> torch.Tensor:
        """(N,) int64: an image's own cluster or, in the other modality, its mutual match; -1 = none."""
        assert self.match is not None
        match = self.match if modality == "visible" else self.match.T  # other x this
        of = np.append(np.where(match.any(1), match.argmax(1), -1), -1)
        table = torch.from_numpy(of).to(self.own.device)
        return torch.cat([own if m == modality else table[own] for m, own in self.sides.items()])

    def counts(self) -> dict[str, int]:
        """Clusters and outliers by name, for the log."""
        named = self.sides | ({} if self.joint is None else {"joint": self.joint})
        row = {f"clusters_{name}": count_clusters(values) for name, values in named.items()}
        return row | {f"outliers_{name}": int((values < 0).sum()) for name, values in named.items()}


def count_clusters(labels: torch.Tensor) -> int:
    """Number of clusters in labels (N,) that are contiguous from 0."""
    return int(labels.max()) + 1 if len(labels) else 0


def assign_labels(
    features: torch.Tensor,
    images: TrainImages,
    config: Config,
    stage: int,
    exchanged: torch.Tensor | None = None,
) -> Labels:
    """Cluster each modality; in stage 2 also cluster their union and match clusters across modalities.

    features: (N, D) unit rows; exchanged: (W, num_visible, D), features of more views of the visible images,
    which mutual matching uses too. All processes pass equal inputs and share the clustering. Selection
    and matches are those of process 0, because floating-point products may differ between processors.
    """
    border = images.num_visible
    parts = zip(features.tensor_split([border]), images.cameras.tensor_split([border]), strict=True)
    own = torch.cat([cluster(x, cameras, None, config, together=True) for x, cameras in parts])
    labels = Labels.from_own(features, own, border, mutual=config.matching == "mutual")
    if stage == 1 or not labels.enough:
        return labels
    if config.weight_joint > 0:
        joint = selected = cluster(
            features, images.cameras, images.modalities, config, "_joint", together=True
        )
        if config.k_select is not None:
            (v, r), (y_v, y_r) = features.tensor_split([border]), joint.tensor_split([border])
            selected = distributed.broadcast(torch.cat(select_instances(v, r, y_v, y_r, config.k_select)))
        labels = replace(labels, joint=joint, selected=selected)
    if config.pairs == "matched":
        visible, infrared = labels.centers
        if exchanged is not None:
            visible = torch.stack([visible, *(cluster_means(view, own[:border]) for view in exchanged)])
        match = distributed.broadcast(match_clusters(visible, infrared, config.matching))
        labels = replace(labels, match=match.cpu().numpy())
    return labels


def cluster(
    features: torch.Tensor,
    cameras: torch.Tensor,
    modalities: torch.Tensor | None,
    config: Config,
    joint: str = "",
    together: bool = False,
) -> torch.Tensor:
    """`emcc` with the sizes of `config` for one modality, or for both with joint="_joint"."""
    sizes = {name: getattr(config, name + joint) for name in ("k1", "k2", "k3", "eps")}
    return emcc(features, cameras, modalities, **sizes, min_samples=config.min_samples, together=together)
