"""Batches of views; `Batch` alone knows that a visible image has two."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ecul import MODALITIES
from ecul.augment import train_view
from ecul.config import Config
from ecul.labels import Labels
from ecul.sampling import Clusters, independent_batches, joint_batches, matched_batches
from ecul.trainset import TrainImages


@dataclass(frozen=True)
class Batch:
    """The views of one step and the image behind each, in the order view 1, view 2, infrared.

    views: those that pass the visible stem, then those that pass the infrared one, 2P + Q of (3, H, W)
    together: view 1 of every visible image, view 2 in either of the two, infrared; visible: (P,), infrared:
    (Q,) int64 rows of the training images. In matched pairs P = Q, and the images at one place belong
    together. A batch's features are (2P + Q, D), in this order.
    """

    views: tuple[torch.Tensor, torch.Tensor]
    visible: torch.Tensor
    infrared: torch.Tensor

    def __len__(self) -> int:
        return 2 * len(self.visible) + len(self.infrared)

    @property
    def sizes(self) -> list[int]:
        """Positions of view 1, of view 2 and of infrared."""
        return [len(self.visible), len(self.visible), len(self.infrared)]

    def part(self, modality: str | None) -> tuple[slice, int]:
        """The positions of a modality, or of both (None), and the number of views among them."""
        border = 2 * len(self.visible)
        parts = {"visible": (slice(border), 2), "infrared": (slice(border, None), 1)}
        return parts[modality] if modality else (slice(None), 3)

    @cached_property
    def rows(self) -> torch.Tensor:
        """(2P + Q,) int64: the training image at each position."""
        return torch.cat([self.visible, self.visible, self.infrared])

    def paired(self, modality: str) -> torch.Tensor:
        """(3P,) int64: the visible, or the infrared, image at the place of each position in matched pairs."""
        return (self.visible if modality == "visible" else self.infrared).repeat(3)


def make_batches(
    labels: Labels,
    images: TrainImages,
    config: Config,
    rng: np.random.Generator,
    generator: torch.Generator | None = None,
) -> Iterator[Batch]:
    """The epoch's batches: `rng` draws the images, `generator` (of the images' device) their views."""
    device, bridged = images.device, labels.crossing and config.exchanged_stem == "infrared"
    for drawn in draw_batches(labels, images, config, rng):
        rows = [torch.from_numpy(r) for r in drawn]
        taken = [images.take(r, modality) for modality, r in enumerate(rows)]
        first = train_view(taken[0], "visible", config.pad, generator, config.linear_transform)
        second = train_view(taken[0], "exchanged", config.pad, generator)
        third = train_view(taken[1], "infrared", config.pad, generator)
        parts = [[first], [second, third]] if bridged else [[first, second], [third]]
        views = [torch.cat(part).contiguous(memory_format=torch.channels_last) for part in parts]
        yield Batch((views[0], views[1]), *(r.to(device, non_blocking=True) for r in rows))


def draw_batches(
    labels: Labels, images: TrainImages, config: Config, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of each batch's visible and infrared images."""
    cameras, modalities = images.cameras.cpu().numpy(), images.modalities.cpu().numpy()

    def clusters(table: torch.Tensor) -> list[Clusters]:
        of = table.cpu().numpy()
        return [Clusters(np.where(modalities == m, of, -1), cameras) for m in range(len(MODALITIES))]

    sizes = (config.identities, config.instances, config.iterations, rng)
    visible, infrared = clusters(labels.own)
    if labels.match is not None and not labels.mutual:
        return matched_batches(visible, infrared, labels.match, *sizes)
    if config.pairs == "joint" and labels.joint is not None and int(labels.joint.max()) >= 1:
        visible, infrared = clusters(labels.joint)
        return joint_batches(visible, infrared, *sizes)
    return independent_batches(visible, infrared, *sizes)
