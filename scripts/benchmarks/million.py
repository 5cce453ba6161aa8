"""A million points in 64 dimensions through every step of `emcc` on a CPU, checked by a plain oracle.

The features are those of `clustering.py` with noise of length 0.35. For each of 40 sampled points the oracle
computes the neighbours from float64 products with all points, the encoding from sets, the extension, and the
neighbours in the graph from a scan of all rows. scikit-learn labels the whole graph again.
"""

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN as TheirDBSCAN

from benchmarks.clustering import DBSCAN, SIZES, steps, world
from benchmarks.table import apart, table_row
from ecul import clustering
from ecul.common.exact import unit_rows
from ecul.kernels import jaccard_neighbors

DIM, NOISE, SAMPLE = 64, 0.35, 40


def rows(device, quick):
    if device != "cpu":
        raise SystemExit("add --device cpu: the million for a GPU is in scripts/gpu-proof")
    size = 4_000 if quick else 1_000_000
    sizes, total, peak = apart(_measured, size)
    yield table_row("EMCC + DBSCAN, a million", sizes, "s", total, n=1, peak_memory=peak)


def _measured(size):
    """The row's text, seconds and peak bytes."""
    features, *codes = world(size, DIM, size // 40, NOISE)
    clustering.emcc(features[:100])  # imports and kernels loaded
    results, spent, held = steps(features, *codes)
    labels, non_zeros = results[-1].numpy(), len(results[2][1]) / size
    told = ", ".join(f"{name} {taken:.0f} s" for name, taken in spent.items())
    graph = jaccard_neighbors(*results[2], DBSCAN["eps"])
    equal = _compared(features, codes, *results[:-1], graph, labels)
    checks = ", ".join(f"{name} {right} of {count}" for name, (right, count) in equal.items())
    found = f"{non_zeros:.0f} non-zeros a row, {labels.max() + 1} clusters, {(labels < 0).sum()} outliers"
    sizes = f"N={size}, D={DIM}, {found}; {told}; equal to the oracle: {checks}"
    return sizes, sum(spent.values()), max(held.values())


def _compared(features, codes, ranks, encodings, extended, graph, labels):
    """For each step how many of the sampled rows equal the oracle's, and how many there are."""
    size, right = len(features), dict.fromkeys(("neighbours", "encodings", "extension", "graph"), 0)
    points = unit_rows(features).double().numpy()
    ranks, *codes = (table.numpy() for table in (ranks, *codes))
    encodings, extended, graph = ([part.numpy() for part in csr] for csr in (encodings, extended, graph))
    for i in np.random.default_rng(0).choice(size, SAMPLE, replace=False):
        similarity = (points @ points[i]).astype(np.float32)
        similarity[i] = np.inf
        nearest = np.argsort(-similarity, kind="stable")[: SIZES["k1"]]
        right["neighbours"] += np.array_equal(nearest, ranks[i])
        right["encodings"] += _close(_encoding(points, ranks, i), encodings, i)
        right["extension"] += _close(_extension(encodings, ranks[i], *codes), extended, i)
        right["graph"] += np.array_equal(_within(extended, i), graph[1][slice(*graph[0][i : i + 2])])
    matrix = csr_matrix((np.full(len(graph[1]), 0.5), graph[1], graph[0]), (size, size))
    theirs = TheirDBSCAN(eps=0.5, min_samples=DBSCAN["min_samples"], metric="precomputed").fit_predict(matrix)
    equal = {name: (int(count), SAMPLE) for name, count in right.items()}
    return {**equal, "labels": (int((labels == theirs).sum()), size)}


def _row(csr, i):
    columns, values = (part[slice(*csr[0][i : i + 2])].tolist() for part in csr[1:])
    return dict(zip(columns, values, strict=True))


def _close(want, csr, i):
    """Whether a row holds these columns and, to float32's precision, these values."""
    found = _row(csr, i)
    return found.keys() == want.keys() and all(abs(found[j] - want[j]) < 1e-6 for j in want)


def _encoding(points, ranks, i):
    k1 = SIZES["k1"]
    half = round(k1 / 2) + 1

    def mutual(j, k):
        return {int(other) for other in ranks[j, :k] if j in ranks[other, :k]}

    own = mutual(i, k1)
    theirs = [mutual(j, half) for j in own]
    members = sorted(own.union(*(near for near in theirs if len(near & own) > 2 / 3 * len(near))))
    weights = np.exp(2 * points[members] @ points[i] - 2)
    return dict(zip(members, weights / weights.sum(), strict=True))


def _extension(encodings, near, cameras, modalities):
    """The mean over modalities of means over their cameras of means over these cameras' first k2 members."""
    seen = {}
    for j in near[: SIZES["k3"]]:
        seen.setdefault(int(modalities[j]), {}).setdefault(int(cameras[j]), []).append(j)
    row = {}
    for by_camera in seen.values():
        for members in by_camera.values():
            members = members[: SIZES["k2"]]
            for j in members:
                for column, value in _row(encodings, j).items():
                    share = value / (len(seen) * len(by_camera) * len(members))
                    row[column] = row.get(column, 0.0) + share
    return row


def _within(extended, i):
    """The points whose extended rows are within eps of that of i."""
    indptr, columns, values = extended
    own, row = np.zeros(len(indptr) - 1), _row(extended, i)
    own[list(row)] = list(row.values())
    found = []
    for start in range(0, len(own), 50_000):
        edges = indptr[start : start + 50_001]
        entries = slice(edges[0], edges[-1])
        smaller = np.minimum(values[entries], own[columns[entries]])
        overlap = np.add.reduceat(smaller, edges[:-1] - edges[0])
        found.append((1 - overlap / (2 - overlap) <= DBSCAN["eps"]).nonzero()[0] + start)
    return np.concatenate(found)
