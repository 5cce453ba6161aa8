"""Pairs within a Jaccard distance, against dense float64 matrices."""

import numpy as np
import torch
from ecul.kernels import jaccard_neighbors
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix


def dense_distance(encodings):
    overlap = np.stack([np.minimum(row, encodings).sum(1) for row in encodings])
    distance = np.maximum(1 - overlap / (2 - overlap), 0)
    np.fill_diagonal(distance, 0)
    return distance


def random_encodings(seed, size, columns, exact):
    """Rows that sum to 1 or less over a few shared columns; `exact`: multiples of 1/64, some rows empty."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 8, (size, size)) * (np.arange(size) < columns)
    if exact:
        weights = weights * (rng.random((size, size)) < 0.5)
        weights[weights.cumsum(1) > 64] = 0
        return weights / 64
    weights = weights * rng.random((size, size))
    encodings = (weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)).astype(np.float32)
    return np.round(encodings.astype(np.float64) * 2**30) / 2**30


def as_arguments(encodings, device="cpu", dtype=torch.float32):
    matrix = csr_matrix(encodings)
    indptr, indices = (
        torch.from_numpy(a.astype(np.int64)).to(device) for a in (matrix.indptr, matrix.indices)
    )
    return indptr, indices, torch.from_numpy(matrix.data).to(device, dtype)


def assert_graph(graph, within):
    indptr, indices = (part.cpu().numpy() for part in graph)
    rows, cols = np.nonzero(within)
    np.testing.assert_array_equal(indptr, np.concatenate([[0], within.sum(1).cumsum()]))
    np.testing.assert_array_equal(indices, cols)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_equals_the_dense_distance_at_an_eps_that_occurs(seed, size, columns, exact):
    encodings = random_encodings(seed, size, columns, exact)
    distance = dense_distance(encodings)
    eps = float(np.random.default_rng(seed).choice(np.append(distance[distance > 0], 0.5)))
    within = distance <= eps
    assert_graph(jaccard_neighbors(*as_arguments(encodings, dtype=torch.float64), eps), within)
