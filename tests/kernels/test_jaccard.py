"""Pairs within a Jaccard distance, against dense float64 matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from ecul.kernels import _overlaps, _overlaps_cpu, jaccard_neighbors, jaccard_neighbors_reference
from ecul.kernels.jaccard import jaccard_pairs

WORLD = {
    "seed": st.integers(0, 10**6),
    "size": st.integers(1, 24),
    "columns": st.integers(1, 24),
    "exact": st.booleans(),
}


def dense_distance(encodings):
    overlap = np.stack([np.minimum(row, encodings).sum(1) for row in encodings])
    distance = np.maximum(1 - overlap / (2 - overlap), 0)
    np.fill_diagonal(distance, 0)
    return distance


def random_encodings(seed, size, columns, exact=False):
    """Rows that sum to 1 or less over a few shared columns; `exact`: multiples of 1/64, some rows empty."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 8, (size, size)) * (np.arange(size) < columns)
    if exact:
        weights = weights * (rng.random((size, size)) < 0.5)
        weights[weights.cumsum(1) > 64] = 0
        return weights / 64
    weights = weights * rng.random((size, size))
    encodings = weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)
    return np.round(encodings * 2**30) / 2**30


def as_arguments(encodings, device="cpu"):
    matrix = csr_matrix(encodings)
    indptr, indices = (
        torch.from_numpy(a.astype(np.int64)).to(device) for a in (matrix.indptr, matrix.indices)
    )
    return indptr, indices, torch.from_numpy(matrix.data).to(device)


def assert_graph(graph, within):
    assert all(part.dtype == torch.int64 for part in graph)
    indptr, indices = (part.cpu().numpy() for part in graph)
    np.testing.assert_array_equal(indptr, np.concatenate([[0], within.sum(1).cumsum()]))
    np.testing.assert_array_equal(indices, np.nonzero(within)[1])


@given(**WORLD)
def test_equals_the_dense_distance_at_an_eps_that_occurs(seed, size, columns, exact):
    encodings = random_encodings(seed, size, columns, exact)
    distance = dense_distance(encodings)
    eps = float(np.random.default_rng(seed).choice(np.append(distance[distance > 0], 0.5)))
    assert_graph(jaccard_neighbors(*as_arguments(encodings), eps), distance <= eps)


PORTIONS = [("OVERLAPS", 60), ("OVERLAPS", 1), ("FOUND", 1), ("SORTED", 7)]
PORTIONS += [("SHARE", 1), ("SHARE", 2), ("SHARE", 10**9)]
ON_HOST = [("COMPARED", 7), ("SPLIT", 3), ("WIDE", 3), ("MEASURED", 3)]


@pytest.mark.parametrize(
    "module, name, size",
    [(_overlaps, *portion) for portion in PORTIONS]
    + [pytest.param(_overlaps_cpu, *portion, marks=pytest.mark.host) for portion in ON_HOST],
)
def test_the_sizes_of_the_portions_do_not_matter(device, monkeypatch, few, module, name, size):
    count = few(12, 50)
    encodings = random_encodings(3, count, 8)
    monkeypatch.setattr(module, name, size)
    for eps in (0.4, 0.5, 0.6):
        within = dense_distance(encodings) <= eps
        assert count + 2 <= within.sum() < count * count
        assert_graph(jaccard_neighbors(*as_arguments(encodings, device), eps), within)


def test_a_row_longer_than_a_block_of_the_kernel(device, monkeypatch, few):
    block = few(4, _overlaps.OPTIONS["BLOCK"])
    monkeypatch.setitem(_overlaps.OPTIONS, "BLOCK", block)
    size = 2 * block + 3
    encodings = np.zeros((size, size))
    encodings[:, 0], encodings[range(size), range(size)] = 0.5, 0.5  # one column that every row shares
    encodings[0, 0] = 1
    graph = jaccard_neighbors(*as_arguments(encodings, device), 0.67)  # s = 1/2, d = 2/3 for every pair
    assert graph[0].tolist() == list(range(0, size * size + 1, size))
    assert_graph(jaccard_neighbors(*as_arguments(encodings, device), 0.66), np.eye(size, dtype=bool))


def test_columns_in_any_order_strided_views_and_float32(device):
    encodings = random_encodings(5, 12, 6).astype(np.float32).astype(np.float64)
    indptr, indices, values = as_arguments(encodings, device)
    rows = torch.arange(12, device=device).repeat_interleave(indptr.diff())
    order = (rows * 100 - indices).argsort()
    strided = torch.stack([values[order], values[order]], 1)[:, 0].float()
    within = dense_distance(np.round(encodings * 2**30) / 2**30) <= 0.5
    assert_graph(jaccard_neighbors(indptr, indices[order], strided, 0.5), within)


def test_no_rows_empty_rows_and_eps_of_one(device):
    indptr, indices = jaccard_neighbors(*as_arguments(np.zeros((0, 0)), device), 0.5)
    assert indptr.tolist() == [0] and indices.tolist() == []
    assert_graph(jaccard_neighbors(*as_arguments(np.zeros((3, 3)), device), 0.5), np.eye(3, dtype=bool))
    assert_graph(jaccard_neighbors(*as_arguments(np.eye(4), device), 1.0), np.ones((4, 4), bool))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eps": 0.0}, "eps must lie in"),
        ({"eps": float("nan")}, "eps must lie in"),
        ({"eps": torch.ones(2)}, "eps must be a number; got Tensor"),
        ({"indptr": torch.tensor([0, 2, 1, 3])}, "indptr must rise from 0"),
        ({"indptr": torch.tensor([1, 2, 2, 3])}, "indptr must rise from 0"),
        ({"indptr": torch.tensor([0, 1, 2])}, "indptr must rise from 0"),
        ({"indptr": torch.empty(0, dtype=torch.int64)}, "indptr must hold"),
        ({"indices": torch.tensor([0, 1, 3])}, r"indices must lie in 0..2.*; got 0..3"),
        ({"indices": torch.tensor([0, -1, 2])}, "indices must lie in"),
        ({"indices": torch.tensor([0, 1])}, "values must have 2 entries"),
        ({"values": torch.tensor([0.5, float("nan"), 0.5])}, "values must not be negative or NaN"),
        ({"values": torch.tensor([0.5, -0.5, 0.5])}, "values must not be negative or NaN"),
        ({"values": torch.tensor([0.5, 1.5, 0.5])}, "sum to 1 at most"),
        ({"values": torch.tensor([1, 1, 1])}, "values must be float32, float64"),
        ({"indptr": torch.tensor([0.0, 1, 2, 3])}, "indptr must be int64"),
    ],
)
def test_bad_input_says_what_is_wrong(change, message):
    good = {"indptr": torch.arange(4), "indices": torch.arange(3), "values": torch.ones(3), "eps": 0.5}
    with pytest.raises((TypeError, ValueError), match=message):
        jaccard_neighbors(**{**good, **change})


@pytest.mark.parametrize("sketched", [0, 10**9], ids=["sketches", "first entries"])
@pytest.mark.parametrize("room", [1, 128])
def test_portions_hold_every_pair_once_but_those_within_a_group(device, monkeypatch, few, sketched, room):
    """Rows that are alike: all pairs are within eps. Groups that are known late only save the rest."""
    for module, name, size in (
        (_overlaps_cpu, "COMPARED", 3), (_overlaps_cpu, "SKETCHED", sketched),
        (_overlaps, "OVERLAPS", 40), (_overlaps, "FOUND", room),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, size)
    size = few(11, 40)
    encodings = as_arguments(random_encodings(2, size, 8) * 0.1 + 0.9 * (np.arange(size) == 0), device)
    wanted, group = set(zip(*np.triu_indices(size, 1), strict=True)), np.arange(size)
    for known in (None, group // 2, group * 0):
        portions = jaccard_pairs(encodings, 0.3, lambda known=known: known)
        found = [pair for pairs in portions for pair in pairs.T.tolist()]
        left = {(i, j) for i, j in wanted if known is None or known[i] != known[j]}
        assert len(found) == len(left) and set(map(tuple, found)) == left
    for turns in (2, 3):
        parts = [jaccard_pairs(encodings, 0.3, lambda: None, turn, turns) for turn in range(turns)]
        found = [pair for part in parts for pairs in part for pair in pairs.T.tolist()]
        assert len(found) == len(wanted) and set(map(tuple, found)) == wanted


@pytest.mark.host
@pytest.mark.parametrize("sketched", [0, 10**9], ids=["sketches", "first entries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alike, most", [(30, 1.5), (100, 3)])
def test_every_way_to_find_candidates_finds_few_and_no_pair_is_lost(
    monkeypatch, sketched, dtype, alike, most
):
    monkeypatch.setattr(_overlaps_cpu, "SKETCHED", sketched)
    monkeypatch.setattr(_overlaps_cpu, "product_dtype", lambda: dtype)
    rng = np.random.default_rng(0)
    encodings = np.zeros((900, 900))
    for i in range(900):  # rows of a group share columns, a third of each is anywhere
        encodings[i, i // alike * alike :][:alike] = 1 + rng.random(alike)
        encodings[i, rng.integers(0, 900, alike + 10)] += rng.random(alike + 10)
    encodings = np.round(encodings / encodings.sum(1, keepdims=True) * 2**30) / 2**30
    within = dense_distance(encodings) <= 0.7
    way = "_by_first_entries" if sketched else "_by_sketches"
    find, listed = getattr(_overlaps_cpu, way), []

    def counted(*arguments):
        candidates = find(*arguments)

        def portions(*strip):
            for pairs in candidates(*strip):
                listed.append((pairs[0] < pairs[1]).sum())
                yield pairs

        return portions

    monkeypatch.setattr(_overlaps_cpu, way, counted)
    assert_graph(jaccard_neighbors_reference(*as_arguments(encodings), 0.7), within)
    pairs = (within.sum() - 900) / 2
    assert pairs > 10_000 and pairs <= sum(listed) < most * pairs


@pytest.mark.gpu
def test_the_kernel_returns_what_the_reference_returns_at_scale():
    encodings = random_encodings(2, 3000, 60)
    ours = jaccard_neighbors(*as_arguments(encodings, "cuda"), 0.6)
    theirs = jaccard_neighbors_reference(*as_arguments(encodings), 0.6)
    assert all(torch.equal(got.cpu(), want) for got, want in zip(ours, theirs, strict=True))
