"""Cluster matching and instance selection against loops written from the papers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecul import match_clusters
from ecul.matching import select_instances


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def best_assignment(cost):
    """Minimum-cost one-to-one assignment by trying every one; cost has at most as many rows as columns."""
    every = itertools.permutations(range(cost.shape[1]), len(cost))
    return list(enumerate(min(every, key=lambda p: sum(cost[i, j] for i, j in enumerate(p)))))


def oracle(visible, infrared):
    """Bilateral matching, step by step, for a few clusters a side."""
    distance = 2 - 2 * infrared @ visible.T
    b, a = distance.shape
    small = distance if b <= a else distance.T
    k = max(a, b) // min(a, b) + 1
    first = best_assignment(small)
    tiled = np.concatenate([small] * k)
    second = [(r % small.shape[0], c) for c, r in best_assignment(tiled.T)]
    if b > a:
        first, second = [(c, r) for r, c in first], [(c, r) for r, c in second]
    match = np.zeros((b, a), dtype=bool)
    for i, j in first:
        for other in range(a):
            match[i, other] |= distance[i, other] <= distance[i, j]
    for i, j in second:
        for other in range(b):
            match[other, j] |= distance[other, j] <= distance[i, j]
    return match


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_equals_the_oracle(a, b, seed):
    rng = np.random.default_rng(seed)
    visible, infrared = unit(rng, a, 5), unit(rng, b, 5)
    assert np.array_equal(match_clusters(visible, infrared), oracle(visible, infrared))


def mutual_oracle(views, infrared):
    """Pairs that are each other's nearest, in loops; the most similar view counts. (Of two, all are ties.)"""

    def unit_apart(rows):
        apart = rows - rows.mean(0)
        return [row / max(np.linalg.norm(row), 1e-12) for row in apart]

    across = unit_apart(infrared)
    a, b = len(views[0]), len(infrared)
    near = np.array([[max(unit_apart(v)[j] @ across[i] for v in views) for j in range(a)] for i in range(b)])
    match = np.zeros((b, a), dtype=bool)
    for i in range(b):
        for j in range(a):
            others = [near[i, k] for k in range(a) if k != j] + [near[k, j] for k in range(b) if k != i]
            match[i, j] = all(near[i, j] > other for other in others)
    return match


@given(st.integers(3, 6), st.integers(3, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_mutual_matches_equal_the_oracle(a, b, w, seed):
    rng = np.random.default_rng(seed)
    views, infrared = np.stack([unit(rng, a, 5) for _ in range(w)]), unit(rng, b, 5)
    match = match_clusters(views, infrared, "mutual")
    assert np.array_equal(match, mutual_oracle(views, infrared))
    assert match.sum(0).max() <= 1 and match.sum(1).max() <= 1
    if w == 1:
        assert np.array_equal(match, match_clusters(views[0], infrared, "mutual"))


def test_mutual_matches_see_through_an_offset_of_a_modality():
    rng = np.random.default_rng(0)
    centers, offset = unit(rng, 6, 8), 2 * unit(rng, 1, 8)
    shuffled = rng.permutation(6)
    match = match_clusters(centers, centers[shuffled] + offset, "mutual")
    assert np.array_equal(match, shuffled[:, None] == np.arange(6))
    equal = np.ones((3, 4))  # nothing sets them apart
    assert match_clusters(equal, equal, "mutual").sum() == 1


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10**6))
def test_is_total_and_gives_the_pairs_that_its_docstring_shows(a, b, seed):
    rng = np.random.default_rng(seed)
    visible, infrared = unit(rng, a, 8), unit(rng, b, 8)
    match = match_clusters(visible, infrared)
    assert match.shape == (b, a) and match.dtype == bool
    assert match.any(axis=0).all() and match.any(axis=1).all()
    lines = [line.strip() for line in match_clusters.__doc__.splitlines()]
    shown = "\n".join(line for line in lines if line.startswith(("near =", "r2i =", "i2r =")))
    exec(shown, names := {"np": np, "match": match, "visible": visible, "infrared": infrared})
    cosine = infrared @ visible.T
    for pairs, table, near in ((names["r2i"], match.T, cosine.T), (names["i2r"], match, cosine)):
        assert pairs == {i: max(np.flatnonzero(row), key=near[i].item) for i, row in enumerate(table)}


def test_scale_kind_and_dtype_do_not_matter():
    rng = np.random.default_rng(1)
    visible, infrared = (rng.integers(-3, 4, (n, 6)) + 0.25 for n in (7, 3))
    expected = match_clusters(visible, infrared)
    assert np.array_equal(match_clusters(visible.tolist(), infrared[::-1])[::-1], expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = match_clusters(torch.tensor(2 * visible, dtype=dtype), torch.tensor(infrared, dtype=dtype))
        assert isinstance(found, torch.Tensor) and np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("visible", "infrared", "message"),
    [
        (np.ones((0, 4)), np.ones((2, 4)), "visible .* at least one cluster"),
        (np.ones((2, 4)), np.ones((0, 4)), "infrared .* at least one cluster"),
        (
            np.diag([1, 0, np.nan]),
            np.eye(3),
            r"visible centres .* not zero, got row 1 = \[0. 0. 0.\]",
        ),
        (np.ones((2, 4)), np.full((2, 4), np.nan), "infrared centres must be finite"),
        (np.ones((2, 4)), np.ones((2, 5)), "as many features as each other, got 4 and 5"),
    ],
)
def test_errors_name_the_side(visible, infrared, message):
    with pytest.raises(ValueError, match=message):
        match_clusters(visible, infrared)
    with pytest.raises(ValueError, match="rule must be bilateral or mutual, got 'closest'"):
        match_clusters(np.eye(2), np.eye(2), rule="closest")


def selected_oracle(visible, infrared, y_v, y_r, k):
    similarity = visible @ infrared.T
    near_v, near_r = (np.argsort(-s, 1, kind="stable")[:, :k] for s in (similarity, similarity.T))
    keep_v, keep_r = [-1] * len(visible), [-1] * len(infrared)
    for i, j in itertools.product(range(len(visible)), range(len(infrared))):
        if j in near_v[i] and i in near_r[j] and y_v[i] == y_r[j] != -1:
            keep_v[i], keep_r[j] = y_v[i], y_r[j]
    return keep_v, keep_r


@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 6), st.integers(0, 10**6))
def test_instance_selection_equals_the_oracle(a, b, k, seed):
    rng = np.random.default_rng(seed)
    visible, infrared = unit(rng, a, 6), unit(rng, b, 6)
    y_v, y_r = rng.integers(-1, 4, a), rng.integers(-1, 4, b)
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (visible, infrared)]
    kept = select_instances(*tensors, torch.tensor(y_v), torch.tensor(y_r), k)
    rounded = [x.double().numpy() for x in tensors]
    assert [t.tolist() for t in kept] == list(selected_oracle(*rounded, y_v.tolist(), y_r.tolist(), k))
