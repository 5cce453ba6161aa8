"""Evaluation, packing and a large gallery, ours beside the published way.

The published way is our plain restatement of the field's evaluation script: a full distance matrix, a full
argsort, a Python loop over queries with `np.unique` and list comprehensions.
"""

import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.table import table_row
from ecul.data import Dataset, Images
from ecul.evaluation import eval_sysu, evaluate

SIZE = (288, 144)


def rows(device, quick):
    """Rows for the table: `ours` and `published` in `unit`, the median of n; peak memory in bytes."""
    yield from _ten_trials(quick)
    yield from _packing(quick)
    yield _large_gallery(quick)


def _seconds(work, n):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _ten_trials(quick):
    trials, queries, dim = (2, 500, 64) if quick else (10, 3_803, 2_048)
    rng = np.random.default_rng(0)
    g_pids, g_camids = np.repeat(np.arange(96), 4)[:301], np.tile([1, 2, 4, 5], 96)[:301]
    q_pids, q_camids = np.sort(rng.integers(0, 75, queries)), rng.choice([3, 6], queries)
    asked = _unit_rows(rng, queries, dim)
    galleries = [_unit_rows(rng, 301, dim) for _ in range(trials)]

    distances = [-asked @ drawn.T for drawn in galleries]

    def trials_by(metric, products):
        sides = [-asked @ drawn.T for drawn in galleries] if products else distances
        return [metric(distmat, q_pids, g_pids, q_camids, g_camids) for distmat in sides]

    for mine, theirs in zip(trials_by(eval_sysu, False), trials_by(_loops, False), strict=True):
        np.testing.assert_allclose(mine[0], theirs[0], atol=1e-6)
        np.testing.assert_allclose(mine[1:], theirs[1:], atol=1e-6)
    sizes = f"{trials} trials, {queries} x 301"
    for name, products in (("distances", False), (f"features, D={dim}", True)):
        fast = _seconds(lambda products=products: trials_by(eval_sysu, products), 5)
        slow = _seconds(lambda products=products: trials_by(_loops, products), 1 if quick else 3)
        yield table_row(f"SYSU trials from {name}", sizes, "s", fast, slow, n=5)


def _unit_rows(rng, count, dim):
    """Made in place, so that the peak memory of a process that made them is little more than they are."""
    rows = rng.standard_normal((count, dim), dtype=np.float32)
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows


def _loops(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=20):
    order = np.argsort(distmat, axis=1)
    ranked = g_pids[order]
    matches = (ranked == q_pids[:, np.newaxis]).astype(np.int32)
    curves, precisions, penalties, valid = [], [], [], 0
    for q in range(len(q_pids)):
        keep = ~((q_camids[q] == 3) & (g_camids[order[q]] == 2))
        shown = ranked[q][keep]
        first_places = np.unique(shown, return_index=True)[1]
        shown = np.array([shown[place] for place in sorted(first_places)])
        curves.append((shown == q_pids[q]).astype(np.int32).cumsum()[:max_rank])
        hits = matches[q][keep]
        if not hits.any():
            continue
        valid += 1
        found = hits.cumsum()
        last = np.max(np.where(hits == 1))
        penalties.append(found[last] / (last + 1.0))
        precision = np.asarray([count / (place + 1.0) for place, count in enumerate(found)]) * hits
        precisions.append(precision.sum() / hits.sum())
    return np.asarray(curves, np.float32).sum(0) / valid, np.mean(precisions), np.mean(penalties)


def _packing(quick):
    """JPEG files of SYSU-MM01's usual size, decoded one after the other against packing and loading."""
    from PIL import Image

    count = 200 if quick else 2_000
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for side in ("visible", "infrared"):
            (Path(folder) / side).mkdir()
        for number in range(count):
            coarse = rng.integers(0, 256, (20, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((160, 400)).save(Path(folder) / "visible" / f"{number:05d}.jpg")
        Image.fromarray(coarse).save(Path(folder) / "infrared" / "0.jpg")

        def plain():
            for path in sorted((Path(folder) / "visible").iterdir()):
                if path.suffix == ".jpg":
                    with Image.open(path) as image:
                        upright = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.LANCZOS)
                        np.asarray(upright)

        def dataset(pack):
            return Dataset.from_folders(f"{folder}/visible", f"{folder}/infrared", pack=pack).visible

        packs = iter(range(10))
        n = 3
        slow = _seconds(plain, n)
        packing = _seconds(lambda: dataset(f"{folder}/pack{next(packs)}").load(SIZE, progress=False), n)
        packed = dataset(f"{folder}/pack0")
        loading = _seconds(lambda: packed.load(SIZE, progress=False).clone(), n)
    sizes = f"{count} JPEG 400 x 160 to 288 x 144"
    yield table_row("packing", sizes, "images/s", count / packing, count / slow, n=n)
    yield table_row("loading from the pack", sizes, "images/s", count / loading, count / slow, n=n)


def _large_gallery(quick):
    """Peak memory of one direction; each side runs in a process of its own."""
    queries, gallery, dim = (100, 10_000, 64) if quick else (1_000, 100_000, 256)
    measured = []
    for work in (_bounded, _whole):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            measured.append(pool.submit(work, queries, gallery, dim).result())
    (peak, seconds), (whole_peak, whole_seconds) = measured
    sizes = f"{queries} x {gallery}, D={dim}; published: {whole_peak / 2**20:.0f} MiB beyond the features"
    return table_row("large gallery", sizes, "s", seconds, whole_seconds, n=1, peak_memory=peak)


def _features(queries, gallery, dim):
    rng = np.random.default_rng(0)
    return _unit_rows(rng, queries, dim), _unit_rows(rng, gallery, dim)


def _bounded(queries, gallery, dim):
    torch.set_num_threads(1)
    asked, searched = _features(queries, gallery, dim)
    pixel = np.zeros((gallery, 1, 1), np.uint8)
    visible = Images.from_array(pixel[:queries], "visible", pids=np.arange(queries) % 1_000)
    infrared = Images.from_array(pixel, "infrared", pids=np.arange(gallery) % 1_000)
    dataset = Dataset("large", None, visible, infrared, visible, infrared, "regdb")
    features = {"visible": asked, "infrared": searched}
    return _peak(lambda: evaluate(None, dataset, features=features, modes="visible-to-infrared"))


def _whole(queries, gallery, dim):
    torch.set_num_threads(1)
    asked, searched = _features(queries, gallery, dim)
    ids = np.arange(queries) % 1_000, np.arange(gallery) % 1_000
    cameras = np.full(queries, 6), np.ones(gallery, int)
    return _peak(lambda: _loops(-asked @ searched.T, *ids, *cameras))


def _peak(work):
    """Bytes beyond those in use before (Linux's high-water mark of this process), and seconds."""
    before = _high_water()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return _high_water() - before, seconds


def _high_water():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1_024 * int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status: this row needs Linux")
