"""Which images make a batch: P identities x K images from each modality.

A batch is a pair of index arrays (visible, infrared). The corner cases are the same everywhere:
- fewer clusters than P: all there are;
- fewer images than K in a cluster: drawn with replacement, a cluster of one image repeats it;
- cameras: after a random anchor, the other K - 1 images come from other cameras when there are any.

ECUL and MBCCM, section "implementation details".
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import ArrayLike

Drawn = tuple[np.ndarray, np.ndarray]  # rows of visible and of infrared images


class Clusters:
    """The members of each cluster: labels (N,) int64, -1 = outlier or not to be drawn; cameras (N,) int64."""

    def __init__(self, labels: ArrayLike, cameras: ArrayLike):
        labels, cameras = np.asarray(labels), np.asarray(cameras)
        if labels.shape != cameras.shape or labels.ndim != 1:
            raise ValueError(f"labels and cameras must be (N,) alike, got {labels.shape} and {cameras.shape}")
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(labels.max(initial=-1) + 2))
        self.members = [order[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        self.cameras = cameras

    def __len__(self) -> int:
        return len(self.members)

    def draw(self, clusters: Iterable[int], instances: int, rng: np.random.Generator) -> np.ndarray:
        """`instances` images of each of these clusters, cluster after cluster; an empty one gives none."""
        drawn = [self._draw_one(self.members[c], instances, rng) for c in clusters if len(self.members[c])]
        return np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)

    def _draw_one(self, members: np.ndarray, instances: int, rng: np.random.Generator) -> np.ndarray:
        anchor = rng.integers(len(members))
        cameras = self.cameras[members]
        others = members[cameras != cameras[anchor]]
        if len(others) == 0:
            others = np.delete(members, anchor) if len(members) > 1 else members
        rest = rng.choice(others, instances - 1, replace=len(others) < instances - 1)
        return np.concatenate([members[anchor : anchor + 1], rest])


class _Deck:
    """Draws without replacement from a shuffled list; too few left for a draw, and it is shuffled anew."""

    def __init__(self, cards: np.ndarray, rng: np.random.Generator):
        self.cards, self.rng = cards, rng
        self.left: list[int] = []

    def draw(self, count: int) -> list[int]:
        """The next `count` cards, no two the same; all there are where there are fewer."""
        count = min(count, len(self.cards))
        if len(self.left) < count:
            self.left = list(self.rng.permutation(self.cards))
        taken, self.left = self.left[:count], self.left[count:]
        return taken


def independent_batches(
    visible: Clusters,
    infrared: Clusters,
    identities: int,
    instances: int,
    iterations: int,
    rng: np.random.Generator,
) -> Iterator[Drawn]:
    """Stage 1: P visible and P infrared clusters, drawn independently of each other."""
    deck_v, deck_r = _Deck(np.arange(len(visible)), rng), _Deck(np.arange(len(infrared)), rng)
    for _ in range(iterations):
        yield (
            visible.draw(deck_v.draw(identities), instances, rng),
            infrared.draw(deck_r.draw(identities), instances, rng),
        )


def matched_batches(
    visible: Clusters,
    infrared: Clusters,
    match: np.ndarray,
    identities: int,
    instances: int,
    iterations: int,
    rng: np.random.Generator,
) -> Iterator[Drawn]:
    """Stage 2 with matched pairs: position p holds a visible image and an infrared one of matched clusters.

    match: bool (B infrared, A visible). Half of the pairs start from infrared clusters with a random match
    each, half from visible ones. Source: MBCCM's published sampler.
    """
    deck_v, deck_r = _Deck(np.arange(len(visible)), rng), _Deck(np.arange(len(infrared)), rng)
    matches_of_r = [np.flatnonzero(row) for row in match]
    matches_of_v = [np.flatnonzero(column) for column in match.T]
    for _ in range(iterations):
        from_r = deck_r.draw(identities // 2)
        from_v = deck_v.draw(identities - identities // 2)
        clusters_v = [rng.choice(matches_of_r[c]) for c in from_r] + from_v
        clusters_r = from_r + [rng.choice(matches_of_v[c]) for c in from_v]
        yield visible.draw(clusters_v, instances, rng), infrared.draw(clusters_r, instances, rng)


def joint_batches(
    visible: Clusters,
    infrared: Clusters,
    identities: int,
    instances: int,
    iterations: int,
    rng: np.random.Generator,
) -> Iterator[Drawn]:
    """Stage 2 of ECUL alone: P joint clusters, those holding both modalities first [R].

    visible, infrared: the joint clusters' members in each modality, cluster c of one is cluster c of the
    other. A cluster that holds one modality gives images of that one alone.
    """
    in_both = np.array([len(v) > 0 and len(r) > 0 for v, r in _paired(visible, infrared)])
    both, rest = (_Deck(np.flatnonzero(mask), rng) for mask in (in_both, ~in_both))
    for _ in range(iterations):
        clusters = both.draw(identities)
        clusters = clusters + rest.draw(identities - len(clusters))
        yield visible.draw(clusters, instances, rng), infrared.draw(clusters, instances, rng)


def _paired(visible: Clusters, infrared: Clusters) -> Iterator[Drawn]:
    count = max(len(visible), len(infrared))
    for side in (visible, infrared):
        side.members += [np.empty(0, dtype=np.int64)] * (count - len(side))
    return zip(visible.members, infrared.members, strict=True)
