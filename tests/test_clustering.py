"""EMCC against a brute-force float64 oracle: dense matrices and Python loops, straight from the paper."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from ecul import InstanceMemory, TwoStreamResNet, extract
from ecul.clustering import (
    dbscan,
    emcc,
    encode,
    extend_encodings,
    rank_neighbors,
    reciprocal_encodings,
    unit_rows,
)
from ecul.common.density import Density
from ecul.common.duplicates import distinct_rows
from ecul.common.neighbors import neighbors
from ecul.kernels import pair_similarity, topk_similarity


def oracle_ranks(features):
    """All points by similarity: the point itself first, then ties to the lower index."""
    x = features.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T
    np.fill_diagonal(similarity, np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")
    np.fill_diagonal(similarity, (x * x).sum(1))
    return order, similarity


def float32_ranks(features):
    """`oracle_ranks` as documented for near ties: exact products of rows on the grid, rounded to float32."""
    x = unit_rows(features).astype(np.float64)
    similarity = x @ x.T
    ranked = similarity.astype(np.float32)
    np.fill_diagonal(ranked, np.inf)
    return np.argsort(-ranked, axis=1, kind="stable"), similarity


def on_grid(values):
    """Features, weights and encodings are multiples of 2**-26, as documented: their sums are exact."""
    return np.round(values * 2**26) / 2**26


def oracle_encodings(features, k1, ranks=oracle_ranks):
    order, similarity = ranks(features)
    size = len(features)
    near = [[set(order[i, :k].tolist()) for i in range(size)] for k in (k1, round(k1 / 2) + 1)]
    mutual = [[{j for j in n[i] if i in n[j]} for i in range(size)] for n in near]
    encodings = np.zeros((size, size))
    for i in range(size):
        grown = set(mutual[0][i])
        for j in mutual[0][i]:
            if len(mutual[1][j] & mutual[0][i]) > 2 / 3 * len(mutual[1][j]):
                grown |= mutual[1][j]
        members = sorted(grown)
        weights = on_grid(np.exp(-(2 - 2 * similarity[i, members])))
        encodings[i, members] = on_grid(weights / weights.sum())
    return encodings


def oracle_extension(encodings, order, cameras, modalities, k2, k3):
    if k3 is None:
        return np.stack(
            [on_grid(np.full(len(row[:k2]), 1 / len(row[:k2]))) @ encodings[row[:k2]] for row in order]
        )
    extended = np.zeros_like(encodings)
    for i, row in enumerate(order[:, :k3]):
        present = sorted({modalities[j] for j in row})
        for m in present:
            with_cameras = sorted({cameras[j] for j in row if modalities[j] == m})
            for c in with_cameras:
                members = [j for j in row if modalities[j] == m and cameras[j] == c][:k2]
                weight = on_grid(1 / (len(present) * len(with_cameras) * len(members)))
                extended[i] += weight * encodings[members].sum(0)
    return extended


def oracle_distance(encodings):
    """Overlaps are counted in units of 2**-30, as documented: equal for every order of summation."""
    counts = np.round(encodings.astype(np.float32).astype(np.float64) * 2**30)
    overlap = np.stack([np.minimum(row, counts).sum(1) for row in counts]) / 2**30
    distance = np.maximum(1 - overlap / (2 - overlap), 0)
    np.fill_diagonal(distance, 0)
    return distance


def oracle_emcc_distance(features, cameras, modalities, k1, k2, k3, ranks=oracle_ranks):
    order, _ = ranks(features)
    encodings = oracle_encodings(features, k1, ranks=ranks)
    return oracle_distance(oracle_extension(encodings, order, cameras, modalities, k2, k3))


def oracle_dbscan(distance, eps, min_samples):
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(distance)


def world(seed, size, identities, cameras, modalities, noise=0.5, dim=16):
    rng = np.random.default_rng(seed)
    camera, modality = rng.integers(0, cameras, size), rng.integers(0, modalities, size)
    directions = [rng.normal(size=(n, dim)) for n in (identities, cameras, modalities)]
    features = directions[0][rng.integers(0, identities, size)] + 0.3 * directions[1][camera]
    features += 0.3 * directions[2][modality] + noise * rng.normal(size=(size, dim))
    return features.astype(np.float32), camera, modality


def tied_world(seed, size, pool, cameras, modalities):
    """Rows of four entries +-1/2: every similarity is a multiple of 1/4, exact in any arithmetic."""
    rng = np.random.default_rng(seed)
    directions = np.zeros((pool, 8), np.float32)
    for row in directions:
        row[rng.permutation(8)[:4]] = rng.choice([-0.5, 0.5], 4)
    picked = directions[rng.integers(0, pool, size)]
    return picked, rng.integers(0, cameras, size), rng.integers(0, modalities, size)


WORLD = {
    "seed": st.integers(0, 10**6),
    "size": st.integers(1, 12) | st.integers(13, 90) | st.integers(91, 300),
    "cameras": st.integers(1, 4),
    "modalities": st.integers(1, 2),
    "k1": st.integers(1, 40),
    "k2": st.integers(1, 8),
    "more": st.none() | st.integers(0, 40),
}


def dense(indptr, indices, values):
    matrix = np.zeros((len(indptr) - 1, len(indptr) - 1))
    matrix[np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), indices] = values
    return matrix


def assert_labels_equal_the_oracle(arrays, seed, k1, k2, more, ranks=oracle_ranks, occurring=False):
    """At a random eps that is no distance, or at one that is."""
    k3 = None if more is None else k2 + more
    near = rank_neighbors(unit_rows(arrays[0]), k1)
    np.testing.assert_array_equal(near, ranks(arrays[0])[0][:, :k1])
    distance = oracle_emcc_distance(*arrays, k1, k2, k3, ranks)
    rng = np.random.default_rng(seed)
    eps, min_samples = rng.uniform(0.2, 0.9), int(rng.integers(1, 6))
    between = distance[(distance > 1e-6) & (distance < 1)]
    if occurring and len(between):
        eps = float(rng.choice(np.unique(between)))
    else:
        assume(np.abs(distance - eps).min() > 1e-5)
    labels = emcc(*arrays, k1=k1, k2=k2, k3=k3, eps=eps, min_samples=min_samples)
    np.testing.assert_array_equal(labels, oracle_dbscan(distance, eps, min_samples))


@given(**WORLD)
def test_labels_equal_the_oracle_on_generic_features(seed, size, cameras, modalities, k1, k2, more):
    arrays = world(seed, size, 6, cameras, modalities)
    assert_labels_equal_the_oracle(arrays, seed, k1, k2, more)


@given(pool=st.integers(1, 9), **WORLD)
def test_labels_equal_the_oracle_on_ties_and_duplicates_at_an_eps_that_occurs(
    seed, size, pool, cameras, modalities, k1, k2, more
):
    arrays = tied_world(seed, size, pool, cameras, modalities)
    assert_labels_equal_the_oracle(arrays, seed, k1, k2, more, occurring=True)


@given(spread=st.integers(3, 9), **WORLD)
def test_labels_equal_the_oracle_on_nearly_equal_rows(seed, size, cameras, modalities, k1, k2, more, spread):
    """Most rows are within 10**-spread of another one: many similarities are equal in float32."""
    features, *codes = world(seed, size, 6, cameras, modalities)
    rng = np.random.default_rng(seed)
    few = rng.integers(0, 1 + size // 20, size)
    features = features[few] * (1 + 10.0**-spread * rng.normal(size=features.shape)).astype(np.float32)
    assert_labels_equal_the_oracle((features, *codes), seed, k1, k2, more, float32_ranks)


@given(**WORLD)
def test_every_step_equals_its_part_of_the_oracle(seed, size, cameras, modalities, k1, k2, more):
    features, camera, modality = world(seed, size, 6, cameras, modalities)
    k3 = None if more is None else k2 + more
    order, _ = oracle_ranks(features)
    points = unit_rows(features)
    ranks = rank_neighbors(points, k=max(k1, k3 or k2))
    np.testing.assert_array_equal(ranks, order[:, : max(k1, k3 or k2)])
    encodings = reciprocal_encodings(points, ranks, k1=k1)
    expected = oracle_encodings(features, k1)
    np.testing.assert_allclose(dense(*encodings), expected, atol=1e-6)
    np.testing.assert_array_equal(dense(*encodings) > 0, expected > 0)
    extended = extend_encodings(*encodings, ranks, camera, modality, k2=k2, k3=k3)
    expected = oracle_extension(expected, order, camera, modality, k2, k3)
    np.testing.assert_allclose(dense(*extended), expected, atol=1e-6)
    np.testing.assert_allclose(dense(*extended).sum(1), 1, atol=1e-6)
    distance = oracle_distance(dense(*extended))
    assume(np.abs(distance - 0.6).min() > 1e-6)
    np.testing.assert_array_equal(dbscan(*extended), oracle_dbscan(distance, 0.6, 4))


@given(**WORLD, pool=st.integers(1, 300))
def test_known_similarities_are_not_computed_again(seed, size, cameras, modalities, k1, k2, more, pool):
    """Of points with and without equal rows, and of fewer neighbours than the encodings use."""
    few = world(seed, pool, 6, cameras, modalities)[0]
    points = unit_rows(torch.from_numpy(few[np.random.default_rng(seed).integers(0, pool, size)]))
    known = neighbors(*distinct_rows(points), k1)
    assert torch.equal(rank_neighbors(points.clone().requires_grad_(), k1), known.ranks)
    expected, asked = reciprocal_encodings(points.clone().requires_grad_(), known.ranks, k1), []

    def noted(x, y, i, j):
        asked.append((i, j))
        return pair_similarity(x, y, i, j)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecul.common.neighbors.pair_similarity", noted)
        found = encode(known, k1)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and not other.requires_grad
    for i, j in asked:
        assert not (known.near[i] == j[:, None]).any()


@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(1, 6), st.integers(1, 4))
def test_dbscan_of_portions_equals_scikit_learn(seed, size, min_samples, most):
    """Pairs in any order, a few at a time; those within a group may be missing. Points have weights."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, most + 1, size)
    near = np.triu(rng.random((size, size)) < rng.random() / 4, 1)
    which = np.arange(size).repeat(weights)
    whole = (near | near.T | np.eye(size, dtype=bool))[which][:, which]
    expected = oracle_dbscan(1.0 - whole, 0.5, min_samples) if size else np.empty(0, int)
    found, pairs = Density(weights, min_samples), rng.permutation(np.stack(near.nonzero()), axis=1)
    for portion in np.array_split(pairs, 1 + size // 5, axis=1):
        if found.groups is not None:
            i, j = found.groups[portion]
            portion = portion[:, (i != j) | (rng.random() < 0.5)]
        found.add(portion)
        assert found.pairs.shape[1] <= (2 * min_samples + 1) * size
    labels = found.labels().numpy()
    np.testing.assert_array_equal(labels[which], expected)


def test_pairs_within_a_group_that_is_known_are_not_measured(monkeypatch):
    """Images of one person stand side by side, as in the folders of the data sets."""
    group, (added, add) = torch.arange(400) // 40, ([], Density.add)
    monkeypatch.setattr("ecul.kernels._overlaps_cpu.COMPARED", 20)
    monkeypatch.setattr(Density, "add", lambda self, pairs: (added.append(pairs.shape[1]), add(self, pairs)))
    columns = (group[:, None] == group).nonzero()[:, 1]
    labels = dbscan(torch.arange(401) * 40, columns, torch.full((16_000,), 1 / 40))
    assert torch.equal(labels, group)
    assert 400 < sum(added) < 3_900  # half of all


def test_scales_threads_and_portions_do_not_change_the_labels(monkeypatch):
    features, camera, modality = world(0, 200, 12, 4, 2, noise=0.4)
    labels = emcc(features, camera, modality)
    assert labels.max() > 3
    scales = np.exp2(np.linspace(-15, 15, 200).round())[:, None].astype(np.float32)
    np.testing.assert_array_equal(emcc(features * scales, camera, modality), labels)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    for small in (0, 2**40):  # in three threads, in one
        monkeypatch.setattr("ecul.clustering.SMALL", small)
        np.testing.assert_array_equal(emcc(features, camera, modality), labels)
        assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    monkeypatch.setattr("ecul.common.sparse.STRIP_ROWS", 7)
    monkeypatch.setattr("ecul.common.exact.FEATURE_ROWS", 7)
    np.testing.assert_array_equal(emcc(features, camera, modality), labels)


def test_arrays_of_any_kind_give_the_labels_of_plain_ones():
    features, camera, modality = world(0, 60, 5, 3, 2)
    options = {"k1": 8, "k2": 3, "k3": 6}
    labels = emcc(features, camera, modality, **options)
    assert labels.max() > 1
    tensors = [torch.from_numpy(a) for a in (features, camera, modality)]
    same = emcc(*tensors, **options)
    assert isinstance(same, torch.Tensor) and same.dtype == torch.int64 and same.tolist() == labels.tolist()
    coarse = tensors[0].bfloat16()
    assert torch.equal(emcc(coarse, *tensors[1:], **options), emcc(coarse.double(), *tensors[1:], **options))
    locked, fields = features.copy(), np.zeros(60, [("odd", "u1"), ("x", "f4", features.shape[1])])
    locked.flags.writeable, fields["x"] = False, features
    for kind in (
        features.tolist(), features[::-1].copy()[::-1], features.astype(">f4"), np.longdouble(features),
        locked, fields["x"], [torch.from_numpy(row) for row in features], np.asfortranarray(features),
    ):  # fmt: skip
        found = emcc(kind, camera, modality, **options)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, labels)
    for codes in (camera.tolist(), camera.astype(">i2"), camera.astype(np.uint64), camera[::-1].copy()[::-1]):
        np.testing.assert_array_equal(emcc(features, codes, modality > 0, **options), labels)
    assert emcc(np.ones((1, 3))[::-1]).tolist() == emcc([[1, 2]]).tolist() == [-1]


def test_sizes_beyond_the_points_and_hardly_any_points():
    features, camera, modality = world(1, 9, 2, 2, 2)
    large = emcc(features, camera, modality, k1=500, k2=100, k3=300)
    np.testing.assert_array_equal(large, emcc(features, camera, modality, k1=500, k2=9, k3=9))
    for kind in (np.zeros((0, 4), np.float32), torch.zeros(0, 4)):
        labels = emcc(kind)
        assert type(labels) is type(kind) and len(labels) == 0
    assert emcc(np.ones((1, 3))).tolist() == [-1]
    assert emcc(np.ones((1, 3)), min_samples=1).tolist() == [0]
    assert emcc(features, eps=1).tolist() == [0] * 9
    assert emcc(features, eps=1, min_samples=10).tolist() == [-1] * 9
    assert emcc(np.ones((6, 3)), k1=6, k2=6, k3=None).tolist() == [0] * 6


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": "file.npy"}, TypeError, "features must be a tensor or an array of .* got 'file.npy'"),
        ({"features": [[1, 2], [3]]}, ValueError, "features must be an array of numbers: .*inhomogeneous"),
        ({"features": [["a", "b"]]}, TypeError, "features must be an array of real numbers, got <U1"),
        ({"features": torch.ones(3, 2).to_sparse()}, TypeError, "features must be a dense tensor"),
        ({"features": torch.ones(3, 2, device="meta")}, TypeError, "features must be a dense tensor.* meta"),
        ({"features": np.ones(3)}, ValueError, r"features must have shape \(N, D\), got \(3,\)"),
        ({"features": np.array([[1, 1], [1, np.nan], [1, 1]])}, ValueError, "row 1 is not finite"),
        ({"features": np.array([[1, 1], [1, 1], [np.inf, 1]])}, ValueError, "row 2 is not finite"),
        ({"features": np.array([[1.0, 1], [0, 0], [0, 0]])}, ValueError, r"row 1 is all zeros \(2 such"),
        ({"cameras": np.zeros(2, int)}, ValueError, "cameras must have one entry a point"),
        ({"cameras": np.array([0, -1, 2])}, ValueError, "cameras must not be negative, got -1..2"),
        ({"cameras": np.zeros(3)}, TypeError, "cameras must be integers"),
        ({"modalities": np.array([0, 1, 2])}, ValueError, "modalities must lie in 0..1, got 0..2"),
        ({"modalities": np.zeros(4, int)}, ValueError, "modalities must have one entry a point"),
        ({"k1": 0}, ValueError, "k1 must be at least 1, got 0"),
        ({"k1": 2.5}, TypeError, "k1 must be an integer"),
        ({"k1": torch.tensor(3)}, TypeError, r"k1 must be an integer, got tensor\(3\)"),
        ({"eps": torch.tensor(0.5)}, ValueError, "eps must be a number in"),
        ({"k2": 0}, ValueError, "k2 must be at least 1, got 0"),
        ({"k2": 5, "k3": 4}, ValueError, "k3 must be at least k2 = 5, or None"),
        ({"eps": 0}, ValueError, r"eps must be a number in \(0, 1\], got 0"),
        ({"eps": 1.5}, ValueError, r"eps must be a number in \(0, 1\], got 1.5"),
        ({"eps": float("nan")}, ValueError, "eps must be a number in"),
        ({"min_samples": 0}, ValueError, "min_samples must be at least 1, got 0"),
    ],
)
def test_bad_input_says_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        emcc(**{"features": np.ones((3, 2)), **change})


def test_arrays_that_are_no_sparse_matrix_are_refused_before_they_crash():
    """Every step has the checks of `jaccard_neighbors`."""
    columns, values, ranks = torch.arange(3), torch.full((3,), 0.5), torch.arange(3).repeat(3, 1)
    for indptr, odd, message in (([0, 9, 2, 3], 0.5, "indptr must rise"), ([0, 1, 2, 3], -0.5, "negative")):
        arrays = torch.tensor(indptr), columns, values.where(columns > 0, odd)
        with pytest.raises(ValueError, match=message):
            dbscan(*arrays)
        with pytest.raises(ValueError, match=message):
            extend_encodings(*arrays, ranks, k2=1, k3=2)


def test_the_default_dtype_of_torch_changes_nothing():
    features = torch.from_numpy(world(3, 60, 6, 2, 2)[0])
    found = emcc(features, k1=8, k2=3, k3=5), topk_similarity(features, features, 3)
    torch.set_default_dtype(torch.float64)
    try:
        again = emcc(features, k1=8, k2=3, k3=5), topk_similarity(features, features, 3)
        memory = InstanceMemory(16, 60)
        memory(features, found[0])
        memory.update(features, torch.arange(60))
        model = TwoStreamResNet(10, 2, input_size=(32, 16)).eval()
        rows = extract(model, np.zeros((2, 32, 16, 3), np.uint8), "visible", progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], again[0]) and again[1][0].dtype == torch.float32
    assert all(map(torch.equal, found[1], again[1]))
    assert rows.dtype == memory.features.dtype == model.bottleneck.weight.dtype == torch.float32


def in_a_process(code, **environment):
    """Run code in a fresh interpreter; returns what it prints, read as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return json.loads(run.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("blank", [0, 10_000])
def test_memory_stays_far_below_a_byte_a_pair(blank):
    code = f"""
import json, re, torch
from ecul import emcc
torch.set_num_threads(1)
emcc(torch.eye(50))
peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
start = peak()
generator = torch.Generator().manual_seed(0)
size = 20_000
groups = torch.randn(size // 20, 16, generator=generator).repeat_interleave(20, 0)
features = groups + 0.1 * torch.randn(size, 16, generator=generator)
features[:{blank}] = features[0]
labels = emcc(features, k1=10, k2=3, k3=8)
print(json.dumps([peak() - start, int(labels.max()), size]))
"""
    grown, largest, size = in_a_process(code)
    assert largest > 400
    assert grown < size * size / 2


def test_labels_are_the_same_in_the_interpreter_of_triton():
    pytest.importorskip("triton")
    features, camera, modality = world(0, 24, 3, 2, 2, noise=0.2, dim=8)
    sizes = {"k1": 8, "k2": 3, "k3": 6}
    labels = emcc(features, camera, modality, **sizes).tolist()
    assert max(labels) >= 1
    arrays = ", ".join(f"np.array({a.tolist()})" for a in (features, camera, modality))
    code = f"""
import json, numpy as np
from ecul import emcc
print(json.dumps(emcc({arrays}, **{sizes}).tolist()))
"""
    assert in_a_process(code, TRITON_INTERPRET="1") == labels


def in_processes(count, tmp_path, worlds, *more):
    """Cluster in this many processes: how they ended, and where the labels are."""
    np.savez(tmp_path / "given.npz", *(array for arrays in worlds for array in arrays))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    files = [Path(__file__).with_name("together.py"), tmp_path / "given.npz", tmp_path / "labels.npz"]
    done = subprocess.run([*command, *files, *more], capture_output=True, text=True, timeout=300)
    return done, tmp_path / "labels.npz"


@pytest.mark.parametrize("count, sizes", [(2, (301,)), (4, (203, 5, 2))])
def test_labels_are_the_same_in_several_processes(tmp_path, count, sizes):
    """Uneven shares, and processes without a row."""
    worlds = [world(0, size, 12, 4, 2, noise=0.4) for size in sizes]
    for features, *_ in worlds:
        half = len(features) // 2
        features[half::2] = features[: len(features[half::2])]  # some points twice
    done, labels = in_processes(count, tmp_path, worlds)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [emcc(*arrays, k1=12, k2=3, k3=9) for arrays in worlds]
    assert alone[0].max() > 3
    for ours, theirs in zip(np.load(labels).values(), alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_killed_process_ends_the_others(tmp_path):
    done, labels = in_processes(2, tmp_path, [world(0, 100, 12, 4, 2)], "kill")
    assert done.returncode != 0 and "SIGKILL" in done.stderr and not labels.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [world, tied_world])
def test_labels_are_the_same_on_a_gpu(make):
    features, camera, modality = (torch.from_numpy(a) for a in make(0, 500, 20, 4, 2))
    labels = emcc(features, camera, modality)
    on_gpu = emcc(features.cuda(), camera, modality)
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), labels)


def test_each_step_alone_has_the_defaults_of_emcc():
    whole = inspect.signature(emcc).parameters
    for step in (extend_encodings, dbscan):
        own = inspect.signature(step).parameters
        shared = [name for name in own if name in whole]
        assert shared and all(own[name].default == whole[name].default for name in shared)
