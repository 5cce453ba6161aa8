"""How good is a clustering: agreement with identities (a monitor), and scores that need none."""

import numpy as np


def adjusted_rand(labels, identities):
    """Adjusted Rand index of labels (N,) with identities (N,); outliers (-1) left out; nan below two images.

    Equals `sklearn.metrics.adjusted_rand_score(identities[labels >= 0], labels[labels >= 0])`. It is a
    monitor: identities reach the log and nothing else.
    """
    labels, identities = np.asarray(labels), np.asarray(identities)
    kept = labels >= 0
    if kept.sum() < 2:
        return float("nan")
    _, a = np.unique(labels[kept], return_inverse=True)
    _, b = np.unique(identities[kept], return_inverse=True)
    cells = np.unique(a * (b.max() + 1) + b, return_counts=True)[1]
    both, in_a, in_b, total = (_pairs(c) for c in (cells, np.bincount(a), np.bincount(b), np.array([len(a)])))
    expected = in_a * in_b / total
    highest = (in_a + in_b) / 2
    return 1.0 if highest == expected else float((both - expected) / (highest - expected))


def _pairs(counts):
    counts = counts.astype(np.float64)
    return (counts * (counts - 1)).sum() / 2
