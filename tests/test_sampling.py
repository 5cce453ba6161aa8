"""Batches: P x K images, cameras spread, matched positions, and every corner case."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ecul.sampling import Clusters, independent_batches, joint_batches, matched_batches


def world(rng, clusters, images):
    """Contiguous labels with outliers, some clusters of one image, three cameras."""
    labels = np.concatenate([np.arange(clusters), rng.integers(-1, clusters, images)])
    return Clusters(labels, rng.integers(1, 4, len(labels))), labels


@given(st.integers(2, 12), st.integers(0, 60), st.integers(2, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_a_batch_is_p_clusters_of_k_images(clusters, images, identities, instances, seed):
    rng = np.random.default_rng(seed)
    side, labels = world(rng, clusters, images)
    seen = set()
    for visible, infrared in independent_batches(side, side, identities, instances, 8, rng):
        for index in (visible, infrared):
            drawn = labels[index].reshape(-1, instances)
            assert len(drawn) == min(identities, clusters)
            assert (drawn == drawn[:, :1]).all() and len(set(drawn[:, 0])) == len(drawn) and drawn.min() >= 0
        seen |= set(labels[visible])
    if identities * 8 >= 3 * clusters:
        assert seen == set(range(clusters))


@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 10**6))
def test_after_the_anchor_come_other_cameras(members, instances, seed):
    rng = np.random.default_rng(seed)
    cameras = rng.integers(1, 4, members)
    index = Clusters(np.zeros(members, dtype=int), cameras).draw([0], instances, rng)
    rest = index[1:]
    if len(set(cameras)) > 1:
        pool = np.flatnonzero(cameras != cameras[index[0]])
    else:
        pool = np.delete(np.arange(members), index[0]) if members > 1 else np.arange(1)
    assert set(rest) <= set(pool)
    assert len(set(rest)) == len(rest) or len(pool) < len(rest)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 6), st.integers(0, 10**6))
def test_matched_positions_hold_matched_clusters(a, b, identities, seed):
    rng = np.random.default_rng(seed)
    (visible, y_v), (infrared, y_r) = world(rng, a, 20), world(rng, b, 20)
    match = rng.random((b, a)) < 0.3
    match[np.arange(max(a, b)) % b, np.arange(max(a, b)) % a] = True
    for v, r in matched_batches(visible, infrared, match, identities, 3, 6, rng):
        assert len(v) == len(r) > 0
        assert match[y_r[r], y_v[v]].all()


def test_half_of_the_matched_pairs_start_from_each_modality():
    labels, one = np.arange(12), np.zeros(4, dtype=int)
    many, single = Clusters(labels, labels * 0), Clusters(one, one)
    for visible, infrared, match in ((many, single, np.ones((1, 12))), (single, many, np.ones((12, 1)))):
        batches = list(matched_batches(visible, infrared, match, 8, 2, 3, np.random.default_rng(0)))
        drawn = [pair[int(infrared is many)].reshape(-1, 2)[:, 0] for pair in batches]
        started = [batch[-4:] if visible is many else batch[:4] for batch in drawn]
        assert sorted(np.concatenate(started)) == list(labels)  # a deck of 12, drawn four at a time


@given(st.integers(2, 10), st.integers(2, 6), st.integers(0, 10**6))
def test_joint_batches_take_clusters_of_both_modalities_first(clusters, identities, seed):
    rng = np.random.default_rng(seed)
    y_v, y_r = rng.integers(-1, clusters, 15), rng.integers(-1, clusters, 15)
    y_v[0], y_r[0] = clusters - 1, clusters - 1
    cameras = np.ones(15, dtype=int)
    both = (set(y_v) & set(y_r)) - {-1}
    either = (set(y_v) | set(y_r)) - {-1}
    for v, r in joint_batches(Clusters(y_v, cameras), Clusters(y_r, cameras), identities, 2, 5, rng):
        drawn = set(y_v[v]) | set(y_r[r])
        assert len(drawn) <= min(identities, len(either)) and drawn <= either
        assert drawn <= both or both <= drawn
        assert all((y_v[v] == c).sum() in (0, 2) and (y_r[r] == c).sum() in (0, 2) for c in drawn)


def test_the_same_seed_draws_the_same_batches():
    side, _ = world(np.random.default_rng(0), 5, 30)
    runs = [list(independent_batches(side, side, 3, 4, 5, np.random.default_rng(7))) for _ in range(2)]
    assert np.array_equal(np.array(runs[0]), np.array(runs[1]))


def test_no_cluster_at_all_has_no_members():
    assert len(Clusters(np.full(5, -1), np.ones(5))) == 0
    assert len(Clusters(np.empty(0, dtype=int), np.empty(0))) == 0
