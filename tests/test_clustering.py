"""EMCC against a brute-force float64 oracle: dense matrices and Python loops, straight from METHOD."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from ecul.clustering import (
    emcc,
)


def oracle_ranks(features):
    """All points by similarity: the point itself first, then ties to the lower index."""
    x = features.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T
    np.fill_diagonal(similarity, np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")
    np.fill_diagonal(similarity, (x * x).sum(1))
    return order, similarity


def oracle_encodings(features, k1):
    order, similarity = oracle_ranks(features)
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
        weights = np.exp(-(2 - 2 * similarity[i, members]))
        encodings[i, members] = weights / weights.sum()
    return encodings


def oracle_extension(encodings, order, cameras, modalities, k2, k3):
    if k3 is None:
        return np.stack([encodings[row[:k2]].mean(0) for row in order])
    extended = np.zeros_like(encodings)
    for i, row in enumerate(order[:, :k3]):
        by_modality = []
        for m in sorted({modalities[j] for j in row}):
            by_camera = []
            for c in sorted({cameras[j] for j in row if modalities[j] == m}):
                members = [j for j in row if modalities[j] == m and cameras[j] == c][:k2]
                by_camera.append(np.mean([encodings[j] for j in members], axis=0))
            by_modality.append(np.mean(by_camera, axis=0))
        extended[i] = np.mean(by_modality, axis=0)
    return extended


def oracle_distance(encodings):
    """Overlaps are counted in units of 2**-30, as documented: equal for every order of summation."""
    counts = np.round(encodings.astype(np.float32).astype(np.float64) * 2**30)
    overlap = np.stack([np.minimum(row, counts).sum(1) for row in counts]) / 2**30
    distance = np.maximum(1 - overlap / (2 - overlap), 0)
    np.fill_diagonal(distance, 0)
    return distance


def oracle_emcc_distance(features, cameras, modalities, k1, k2, k3):
    order, _ = oracle_ranks(features)
    encodings = oracle_encodings(features, k1)
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
    "size": st.integers(1, 12) | st.integers(13, 90),
    "cameras": st.integers(1, 4),
    "modalities": st.integers(1, 2),
    "k1": st.integers(1, 40),
    "k2": st.integers(1, 8),
    "more": st.none() | st.integers(0, 40),
}


@given(**WORLD)
def test_labels_equal_the_oracle_on_generic_features(seed, size, cameras, modalities, k1, k2, more):
    features, camera, modality = world(seed, size, 6, cameras, modalities)
    k3 = None if more is None else k2 + more
    distance = oracle_emcc_distance(features, camera, modality, k1, k2, k3)
    rng = np.random.default_rng(seed)
    eps, min_samples = rng.uniform(0.2, 0.9), int(rng.integers(1, 6))
    assume(np.abs(distance - eps).min() > 1e-5)
    labels = emcc(features, camera, modality, k1=k1, k2=k2, k3=k3, eps=eps, min_samples=min_samples)
    np.testing.assert_array_equal(labels, oracle_dbscan(distance, eps, min_samples))


@given(pool=st.integers(1, 9), **WORLD)
def test_labels_equal_the_oracle_on_ties_and_duplicates_at_an_eps_that_occurs(
    seed, size, pool, cameras, modalities, k1, k2, more
):
    features, camera, modality = tied_world(seed, size, pool, cameras, modalities)
    k3 = None if more is None else k2 + more
    distance = oracle_emcc_distance(features, camera, modality, k1, k2, k3)
    rng = np.random.default_rng(seed)
    occurring = np.unique(distance[(distance > 1e-6) & (distance < 1)])
    eps = float(rng.choice(occurring)) if len(occurring) else 0.5
    min_samples = int(rng.integers(1, 6))
    labels = emcc(features, camera, modality, k1=k1, k2=k2, k3=k3, eps=eps, min_samples=min_samples)
    np.testing.assert_array_equal(labels, oracle_dbscan(distance, eps, min_samples))
