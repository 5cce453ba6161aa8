"""EMCC + DBSCAN beside the published way, each in its own process for an honest peak of memory.

The features are unit directions, one for each identity, camera (0.45) and modality (0.4), plus Gaussian
noise of length 2.5 ("typical") or 3.0 ("hard"). Harder features have more neighbours, so every row gives the
non-zeros of an extended encoding.
"""

from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import published
from benchmarks.table import apart, peak_memory, reset_peak_memory, seconds, table_row
from ecul import clustering
from ecul.kernels import _shortlist_cpu

SIZES = {"k1": 40, "k2": 16, "k3": 40}
DBSCAN = {"eps": 0.6, "min_samples": 4}
NOISE = {"typical": 2.5, "hard": 3.0}


def rows(device, quick):
    """Rows for the table: median seconds, peak memory of the whole process in bytes."""
    if quick:
        yield from (_compared(kind, 1_000, 2048, 25, device, 1, beside=True) for kind in NOISE)
    else:
        yield from (_compared(kind, 16_000, 2048, 395, device, 3, beside=True) for kind in NOISE)
        if device == "cpu" and _shortlist_cpu.BRAIN:
            yield from (
                _compared(kind, 16_000, 2048, 395, device, 3, beside=False, half=False) for kind in NOISE
            )
        # as many images an identity as above: with fewer the encodings are emptier
        yield from (_compared(kind, 34_167, 2048, 843, device, 1, beside=False) for kind in NOISE)
        yield _compared("typical", 64_000, 2048, 1_580, device, 1, beside=False)
        if device == "cuda":
            yield _compared("typical", 200_000, 2048, 5_000, device, 1, beside=False)
    if device == "cpu":
        yield from map(_busy, (500,) if quick else (2_000, 16_000))


def world(size, dim, identities, noise, cameras=6, device="cpu", dtype=torch.float32):
    """Features (size, dim), cameras and modalities; the last third of the cameras is infrared."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}

    def directions(count):
        return F.normalize(torch.randn(count, dim, **options), dim=1)

    identity, camera, modality = directions(identities), directions(cameras), directions(2)
    taken_by = torch.randint(0, cameras, (size,), **options)
    kind = (taken_by >= cameras - cameras // 3).long()
    features = torch.empty(size, dim, dtype=dtype, device=device)
    for part in torch.arange(size, device=device).split(10_000):
        rows = torch.randn(len(part), dim, **options).mul_(noise / dim**0.5)
        rows += identity[part % identities] + 0.45 * camera[taken_by[part]] + 0.4 * modality[kind[part]]
        features[part] = F.normalize(rows, dim=1).to(dtype)
    return features, taken_by, kind


def steps(features, cameras, modalities, device="cpu"):
    """Every step of `emcc` by itself: their results, their seconds and their peak bytes by name."""
    k1, k2, k3 = SIZES.values()
    points, spent, held = clustering.unit_rows(features), {}, {}

    def step(name, work, *arguments, **options):
        reset_peak_memory(device)
        spent[name], result = seconds(lambda: work(*arguments, **options), device)
        held[name] = peak_memory(device)
        return result

    points, group = step("equal rows", clustering.distinct_rows, points)
    found = step("neighbours", clustering.neighbors, points, group, k1)
    encodings, ranks = step("encodings", clustering.encode, found, k1), found.ranks
    codes = {"cameras": cameras, "modalities": modalities}
    extended = step("extension", clustering.extend_encodings, *encodings, ranks, **codes, k2=k2, k3=k3)
    labels = step("DBSCAN", clustering.dbscan, *extended, **DBSCAN)
    return (ranks, encodings, extended, labels), spent, held


def _compared(kind, size, dim, identities, device, n, beside, half=True):
    """A row; half=False: as on a processor without bf16 instructions."""
    arguments = (size, dim, identities, NOISE[kind])
    ours = apart(_ours, *arguments, device, n, half)
    product = apart(_product, *arguments, device, n) if size < 100_000 else None
    theirs = apart(_published, *arguments) if beside else None
    notes = [f"N={size}, D={dim}, {ours['non_zeros']:.0f} non-zeros a row, {ours['clusters']} clusters"]
    if product:
        notes.append(f"product + top-k alone {product:.1f} s, so {ours['seconds'] / product:.2f} x that")
    if theirs:
        equal = np.array_equal(ours["labels"], theirs["labels"])
        notes.append(f"published: {theirs['peak'] / 2**30:.1f} GiB, labels {'equal' if equal else 'differ'}")
    their_seconds = theirs and theirs["seconds"]
    sizes = "; ".join(notes)
    work = f"EMCC + DBSCAN, {kind}{'' if half else ', without bf16 instructions'}"
    return table_row(work, sizes, "s", ours["seconds"], their_seconds, n=n, peak_memory=ours["peak"])


def _ours(size, dim, identities, noise, device, n, half=True):
    _shortlist_cpu.BRAIN = _shortlist_cpu.BRAIN and half
    features, *codes = (part.to(device) for part in world(size, dim, identities, noise))
    clustering.emcc(features[:100])  # imports and kernels loaded
    reset_peak_memory(device)
    median, labels = seconds(lambda: clustering.emcc(features, *codes, **SIZES, **DBSCAN), device, n)
    peak = peak_memory(device)
    (_, _, extended, _), _, _ = steps(features, *codes, device)
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
    reset_peak_memory()
    once, labels = seconds(lambda: published.cluster(*arguments, **SIZES, **DBSCAN))
    return {"seconds": once, "peak": peak_memory(), "labels": labels}


def _busy(size):
    """How many times slower emcc becomes beside two spinning processes, and the plain product."""
    arguments = (size, 2048, max(1, size // 40), NOISE["typical"], "cpu", 3)
    quiet = apart(_ours, *arguments)["seconds"], apart(_product, *arguments)
    with _spinning(2):
        busy = apart(_ours, *arguments)["seconds"], apart(_product, *arguments)
    sizes = f"N={size}, D=2048; emcc {quiet[0]:.3g} to {busy[0]:.3g} s; published: one product + top-k"
    slower = [b / q for b, q in zip(busy, quiet, strict=True)]
    return table_row("slower beside two spinning processes", sizes, "x", *slower, n=3)


@contextmanager
def _spinning(count):
    others = [get_context("spawn").Process(target=_spin, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.terminate()


def _spin():
    while True:
        pass
