"""Scores and monitors against scikit-learn and plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from ecul.run.scores import adjusted_rand, separation


def unit(rng, n, d=5):
    return F.normalize(torch.tensor(rng.normal(size=(n, d)), dtype=torch.float32), dim=1)


@given(st.integers(2, 60), st.integers(0, 10**6))
def test_adjusted_rand_is_scikit_learns_without_outliers(n, seed):
    rng = np.random.default_rng(seed)
    labels, reference = rng.integers(-1, 5, n), rng.integers(0, 6, n)
    kept = labels >= 0
    value = adjusted_rand(labels, reference)
    if kept.sum() < 2:
        assert np.isnan(value)
    else:
        assert value == pytest.approx(adjusted_rand_score(reference[kept], labels[kept]), abs=1e-9)


@given(st.integers(4, 30), st.integers(0, 10**6))
def test_separation_is_the_simplified_silhouette(n, seed):
    rng = np.random.default_rng(seed)
    x, labels = unit(rng, n), rng.integers(-1, 3, n)
    labels[:3] = [0, 1, 2]
    centres = [F.normalize(x[labels == c].mean(0), dim=0) for c in range(3)]
    total = 0.0
    for f, y in zip(x, labels, strict=True):
        if y >= 0:
            distances = [1 - float(f @ c) for c in centres]
            own = distances.pop(y)
            total += (min(distances) - own) / max(min(distances), own, 1e-12)
    assert separation(x, torch.tensor(labels)) == pytest.approx(total / n, abs=1e-4)


def test_separation_without_two_clusters_is_zero():
    assert separation(torch.eye(3), torch.tensor([0, 0, -1])) == 0
    assert separation(torch.empty(0, 3), torch.empty(0)) == 0
