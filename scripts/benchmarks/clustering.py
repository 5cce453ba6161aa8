"""EMCC + DBSCAN, ours beside the published way, each in a process of its own for an honest peak of memory.

The features are unit directions, one for each identity, camera (0.45) and modality (0.4), plus Gaussian
noise of length 2.5 ("typical") or 3.0 ("hard"). Harder features reach more points: every row states the
non-zeros of an extended encoding, because features that are too easy make the Jaccard step look free.
"""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import published
from benchmarks.table import table_row
from ecul import clustering

SIZES = {"k1": 40, "k2": 16, "k3": 40}
DBSCAN = {"eps": 0.6, "min_samples": 4}
NOISE = {"typical": 2.5, "hard": 3.0}


def rows(device, quick):
    """Rows for the table: seconds, the median of n; peak memory of the whole process in bytes."""
    size, dim, identities = (1_000, 2048, 25) if quick else (16_000, 2048, 395)
    n = 1 if quick else 3
    for kind in NOISE:
        yield _compared(kind, size, dim, identities, device, n, beside=True)
    if not quick:
        for kind in NOISE:  # as many images an identity as above, or the encodings would get emptier
            yield _compared(kind, 34_167, 2048, 843, device, 1, beside=False)
        yield _compared("typical", 64_000, 2048, 1_580, device, 1, beside=False)
        if device == "cuda":
            yield _compared("typical", 200_000, 2048, 5_000, device, 1, beside=False)


def world(size, dim, identities, noise, cameras=6, seed=0):
    """Features (size, dim) float32, cameras and modalities; the last third of the cameras is infrared."""
    generator = torch.Generator().manual_seed(seed)

    def directions(count):
        return F.normalize(torch.randn(count, dim, generator=generator), dim=1)

    identity, camera, modality = directions(identities), directions(cameras), directions(2)
    taken_by = torch.randint(0, cameras, (size,), generator=generator)
    kind = (taken_by >= cameras - cameras // 3).long()
    features = torch.randn(size, dim, generator=generator).mul_(noise / dim**0.5)
    features += identity[torch.arange(size) % identities] + 0.45 * camera[taken_by] + 0.4 * modality[kind]
    return F.normalize(features, dim=1), taken_by, kind


def steps(features, cameras, modalities, step):
    """Every step of `emcc` by itself, through step(name, work): what each of them returns."""
    k1, k2, k3 = SIZES.values()
    points = clustering.unit_rows(features)
    ranks = step("neighbours", lambda: clustering.rank_neighbors(points, k1))
    encodings = step("encodings", lambda: clustering.reciprocal_encodings(points, ranks, k1))
    options = {"cameras": cameras, "modalities": modalities, "k2": k2, "k3": k3}
    extended = step("extension", lambda: clustering.extend_encodings(*encodings, ranks, **options))
    graph = step("neighbour graph", lambda: clustering.neighbor_graph(*extended, eps=DBSCAN["eps"]))
    labels = step("DBSCAN", lambda: clustering.dbscan(*graph, min_samples=DBSCAN["min_samples"]))
    return ranks, encodings, extended, graph, labels


def _compared(kind, size, dim, identities, device, n, beside):
    arguments = (size, dim, identities, NOISE[kind])
    ours = apart(_ours, *arguments, device, n)
    product = apart(_product, *arguments, device, n) if size < 100_000 else None
    theirs = apart(_published, *arguments) if beside else None
    notes = [f"N={size}, D={dim}, {ours['non_zeros']:.0f} non-zeros a row, {ours['clusters']} clusters"]
    if product:
        notes.append(f"product + top-k alone {product:.1f} s, so {ours['seconds'] / product:.2f} x that")
    if theirs:
        equal = np.array_equal(ours["labels"], theirs["labels"])
        notes.append(f"published: {theirs['peak'] / 2**30:.1f} GiB, labels {'equal' if equal else 'differ'}")
    return table_row(
        f"EMCC + DBSCAN, {kind}",
        "; ".join(notes),
        "s",
        ours["seconds"],
        theirs and theirs["seconds"],
        n=n,
        peak_memory=ours["peak"],
    )


def apart(work, *arguments):
    """Run it in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def seconds(work, device, n=1):
    """Median seconds of n runs, and the last result."""
    times = []
    for _ in range(n):
        _wait(device)
        start = time.perf_counter()
        result = work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def peak_memory(device):
    """Bytes: the GPU's when there is one, else this process's high-water mark (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def reset_peak_memory(device):
    """So that the peak leaves out how the features were made, but not the features."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def _ours(size, dim, identities, noise, device, n):
    features, *codes = (part.to(device) for part in world(size, dim, identities, noise))
    clustering.emcc(features[:100])  # imports and kernels loaded
    reset_peak_memory(device)
    median, labels = seconds(lambda: clustering.emcc(features, *codes, **SIZES, **DBSCAN), device, n)
    peak = peak_memory(device)
    points = clustering.unit_rows(features)
    ranks = clustering.rank_neighbors(points, SIZES["k1"])
    encodings = clustering.reciprocal_encodings(points, ranks, SIZES["k1"])
    extended = clustering.extend_encodings(*encodings, ranks, *codes, k2=SIZES["k2"], k3=SIZES["k3"])
    return {
        "seconds": median,
        "peak": peak,
        "non_zeros": len(extended[1]) / size,
        "labels": labels.cpu().numpy(),
        "clusters": int(labels.max()) + 1,
    }


def _product(size, dim, identities, noise, device, n):
    features = world(size, dim, identities, noise)[0].to(device)
    return seconds(lambda: published.product_topk(features, SIZES["k1"]), device, n)[0]


def _published(size, dim, identities, noise):
    arguments = world(size, dim, identities, noise)
    reset_peak_memory("cpu")
    once, labels = seconds(lambda: published.cluster(*arguments, **SIZES, **DBSCAN), "cpu")
    return {"seconds": once, "peak": peak_memory("cpu"), "labels": labels}
