"""Batches: which images make a step, and their views.

A batch has P identities x K images of each modality. The corner cases are the same everywhere:
- fewer clusters than P: the batch takes all of them;
- fewer images than K in a cluster: drawn with replacement, a cluster of one image repeats it;
- cameras: after a random anchor, the other K - 1 images come from other cameras when there are any.

ECUL: https://arxiv.org/abs/2412.19134, MBCCM: https://arxiv.org/abs/2305.12673, "implementation details"
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from ecul.augment import train_view
from ecul.config import Config
from ecul.labels import Labels, count_clusters
from ecul.trainset import TrainImages


@dataclass(frozen=True)
class Batch:
    """The views of one step and the image behind each, in the order view 1, view 2, infrared.

    A visible image has two views; view 2 is the channel-exchanged one. In stage 1 view 2 goes through the
    visible stem. In stage 2 it goes through the stem that `Config.exchanged_stem` names, by default infrared.

    visible: (V,), infrared: (R,) int64 rows of the training images. views: the views (n, 3, H, W) for the
    visible stem, then those for the infrared stem, 2V + R together. In matched pairs V = R, and the images at
    one place belong together. A batch's features are (2V + R, D), in this order.
    """

    views: tuple[torch.Tensor, torch.Tensor]
    visible: torch.Tensor
    infrared: torch.Tensor

    @property
    def sizes(self) -> list[int]:
        """How many positions view 1, view 2 and infrared have."""
        return [len(self.visible), len(self.visible), len(self.infrared)]

    def part(self, modality: str | None) -> tuple[slice, int]:
        """The positions of a modality, or of both (None), and the number of views among them."""
        border = 2 * len(self.visible)
        parts = {"visible": (slice(border), 2), "infrared": (slice(border, None), 1)}
        return parts[modality] if modality else (slice(None), 3)

    def images(self, paired: str | None = None) -> torch.Tensor:
        """(2V + R,) int64: each position's training image; paired: its pair's image of this modality."""
        if paired is None:
            return torch.cat([self.visible, self.visible, self.infrared])
        return (self.visible if paired == "visible" else self.infrared).repeat(3)


def make_batches(
    labels: Labels,
    images: TrainImages,
    config: Config,
    stage: int,
    rng: np.random.Generator,
    generator: torch.Generator | None = None,
) -> Iterator[Batch]:
    """The epoch's batches: `rng` draws the images, `generator` (of the images' device) their views."""
    for drawn in draw_batches(labels, images, config, rng):
        rows = [torch.from_numpy(r) for r in drawn]
        visible, infrared = (images.take(r, modality) for modality, r in enumerate(rows))
        first = train_view(visible, "visible", config.pad, generator, config.linear_transform)
        second = train_view(visible, "exchanged", config.pad, generator)
        third = train_view(infrared, "infrared", config.pad, generator)
        crosses = config.exchanged_crosses(stage)
        stems = [[first], [second, third]] if crosses else [[first, second], [third]]
        views = [torch.cat(stem).contiguous(memory_format=torch.channels_last) for stem in stems]
        yield Batch((views[0], views[1]), *(r.to(images.device, non_blocking=True) for r in rows))


def draw_batches(
    labels: Labels, images: TrainImages, config: Config, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of each batch's visible and infrared images."""
    table, choose = labels.own, independent_clusters
    if config.pairs == "joint" and labels.joint is not None and count_clusters(labels.joint) >= 2:
        table, choose = labels.joint, joint_clusters
    of, cameras, modalities = (x.cpu().numpy() for x in (table, images.cameras, images.modalities))
    visible, infrared = (_members(np.where(modalities == m, of, -1)) for m in (0, 1))
    chosen = choose([*visible], [*infrared], config.identities, rng)
    if labels.pairing is not None:
        chosen = matched_clusters(labels.pairing, config.identities, rng)
    for _ in range(config.iterations):
        drawn = []
        for members in (visible, infrared):  # in joint batches a modality may lack a cluster
            found = [members[c] for c in next(chosen) if c in members]
            parts = [_draw_images(rows, cameras, config.instances, rng) for rows in found]
            drawn.append(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
        yield drawn[0], drawn[1]


def _members(labels: np.ndarray) -> dict[int, np.ndarray]:
    """The images of each cluster, from labels (N,) int64, -1 = none."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    members = dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))
    return {cluster: rows for cluster, rows in members.items() if cluster >= 0}


def _draw_images(
    rows: np.ndarray, cameras: np.ndarray, instances: int, rng: np.random.Generator
) -> np.ndarray:
    """K of a cluster's images `rows`: an anchor, then images of other cameras, if there are any."""
    anchor = rng.choice(rows)
    others = rows[cameras[rows] != cameras[anchor]]
    if len(others) == 0:
        others = rows[rows != anchor] if len(rows) > 1 else rows
    rest = rng.choice(others, instances - 1, replace=len(others) < instances - 1)
    return np.concatenate([[anchor], rest])


def _deal(cards: Iterable[int], count: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """`count` cards at a time, no two the same; all of them where there are fewer.

    They come without replacement from a shuffled list, which is shuffled anew when too few are left.
    """
    cards, left = list(cards), list[int]()
    count = min(count, len(cards))
    while True:
        if len(left) < count:
            left = rng.permutation(cards).tolist()
        yield left[:count]
        left = left[count:]


def independent_clusters(
    visible: list[int], infrared: list[int], identities: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """P visible clusters, then P infrared ones, and so on: each modality draws for itself."""
    for deck in cycle([_deal(side, identities, rng) for side in (visible, infrared)]):
        yield next(deck)


def matched_clusters(match: np.ndarray, identities: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """P visible clusters, then the P infrared ones matched with them, and so on.

    match: bool (B infrared, A visible). Half of the pairs start from infrared clusters with a random match
    each, half from visible ones. Source: MBCCM's published sampler.
    """
    infrared, visible = map(range, match.shape)
    decks = _deal(infrared, identities // 2, rng), _deal(visible, identities - identities // 2, rng)
    for from_r, from_v in zip(*decks, strict=True):
        to_v = [int(rng.choice(np.flatnonzero(match[c]))) for c in from_r]
        to_r = [int(rng.choice(np.flatnonzero(match[:, c]))) for c in from_v]
        yield to_v + from_v
        yield from_r + to_r


def joint_clusters(
    visible: list[int], infrared: list[int], identities: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """P joint clusters for both modalities, and so on; clusters that hold both modalities come first [R]."""
    both, rest = (sorted(part) for part in ({*visible} & {*infrared}, {*visible} ^ {*infrared}))
    decks = _deal(both, identities, rng), _deal(rest, max(0, identities - len(both)), rng)
    for first, others in zip(*decks, strict=True):
        yield from [first + others] * 2
