"""Batches: P x K images, cameras spread, matched positions, and every corner case."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from ecul.batches import draw_batches
from ecul.labels import Labels
from ecul.trainset import TrainImages


def draw(y_v, y_r, rng, batches, cameras=None, match=None, joint=False, **sizes):
    """The cluster of each drawn image and its row, visible and infrared; nothing given is changed."""
    own, border = torch.tensor(np.concatenate([y_v, y_r])), len(y_v)
    cameras = rng.integers(1, 4, len(own)) if cameras is None else cameras
    images = TrainImages((torch.empty(border, 0), torch.empty(len(own) - border, 0)), torch.tensor(cameras))
    labels = Labels(own, border, (torch.empty(0), torch.empty(0)), own if joint else None, match=match)
    weights = {"weight_joint": 0.7, "weight_agnostic": 0.0, "pairs": "joint"} if joint else {}
    before = own.clone(), None if match is None else match.copy()
    drawn = list(draw_batches(labels, images, tiny(**sizes, **weights, iterations=batches), rng))
    assert torch.equal(own, before[0]) and np.array_equal(match, before[1]) and len(drawn) == batches
    assert all((v < border).all() and (r >= border).all() for v, r in drawn)
    of = own.numpy()
    return [(of[v], of[r], v, r) for v, r in drawn]


def world(rng, clusters, images):
    """Labels from 0 without gaps and with outliers; some clusters have one image."""
    return np.concatenate([np.arange(clusters), rng.integers(-1, clusters, images)])


@given(st.integers(2, 12), st.integers(0, 60), st.integers(2, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_a_batch_is_p_clusters_of_k_images(clusters, images, identities, instances, seed):
    rng, seen = np.random.default_rng(seed), set()
    y_v, y_r = world(rng, clusters, images), world(rng, clusters, images)
    for visible, infrared, *_ in draw(y_v, y_r, rng, 8, identities=identities, instances=instances):
        for found in (visible, infrared):
            drawn = found.reshape(-1, instances)
            assert len(drawn) == min(identities, clusters)
            assert (drawn == drawn[:, :1]).all() and len(set(drawn[:, 0])) == len(drawn) and drawn.min() >= 0
        seen |= set(visible)
    if identities * 8 >= 3 * clusters:
        assert seen == set(range(clusters))


@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 10**6))
def test_after_the_anchor_come_other_cameras(members, instances, seed):
    rng = np.random.default_rng(seed)
    cameras = rng.integers(1, 4, members + 1)
    labels = np.zeros(members, dtype=int)
    _, _, rows, _ = draw(labels, labels[:1], rng, 1, cameras, identities=2, instances=instances)[0]
    anchor, rest = rows[0], rows[1:]
    pool = np.delete(np.arange(members), anchor) if members > 1 else np.arange(1)
    if len(set(cameras[:members])) > 1:
        pool = np.flatnonzero(cameras[:members] != cameras[anchor])
    assert set(rest) <= set(pool)
    assert len(set(rest)) == len(rest) or len(pool) < len(rest)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 6), st.integers(0, 10**6))
def test_matched_positions_hold_matched_clusters(a, b, identities, seed):
    rng = np.random.default_rng(seed)
    y_v, y_r = world(rng, a, 20), world(rng, b, 20)
    match = rng.random((b, a)) < 0.3
    match[np.arange(max(a, b)) % b, np.arange(max(a, b)) % a] = True
    pairs = min(identities // 2, b) + min(identities - identities // 2, a)
    for visible, infrared, *_ in draw(y_v, y_r, rng, 6, match=match, identities=identities, instances=3):
        assert len(visible) == len(infrared) == 3 * pairs and match[infrared, visible].all()


def test_half_of_the_matched_pairs_start_from_each_modality():
    many, one = np.arange(12), np.zeros(4, dtype=int)
    for y_v, y_r in ((many, one), (one, many)):
        match = np.ones((y_r.max() + 1, y_v.max() + 1), dtype=bool)
        batches = draw(y_v, y_r, np.random.default_rng(0), 3, match=match, identities=8, instances=2)
        drawn = [batch[int(y_r is many)].reshape(-1, 2)[:, 0] for batch in batches]
        started = [batch[-4:] if y_v is many else batch[:4] for batch in drawn]
        assert sorted(np.concatenate(started)) == list(many)  # a deck of 12, drawn four at a time


@given(st.integers(2, 10), st.integers(2, 6), st.integers(0, 10**6))
def test_joint_batches_take_clusters_of_both_modalities_first(clusters, identities, seed):
    rng = np.random.default_rng(seed)
    y_v, y_r = rng.integers(-1, clusters, 15), rng.integers(-1, clusters, 15)
    y_v[0] = clusters - 1
    both = (set(y_v) & set(y_r)) - {-1}
    either = (set(y_v) | set(y_r)) - {-1}
    for visible, infrared, *_ in draw(y_v, y_r, rng, 5, joint=True, identities=identities, instances=2):
        drawn = set(visible) | set(infrared)
        assert len(drawn) == min(identities, len(either)) and drawn <= either
        assert drawn <= both or both <= drawn
        assert all((visible == c).sum() == 2 * (c in y_v) for c in drawn)
        assert all((infrared == c).sum() == 2 * (c in y_r) for c in drawn)
