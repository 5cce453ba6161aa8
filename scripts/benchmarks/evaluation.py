"""Evaluation, packing and re-ranking beside the published way.

The published way is our plain restatement of the field's evaluation script: a full distance matrix, a full
argsort, a Python loop over queries with `np.unique` and list comprehensions.
"""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.clustering import NOISE, world
from benchmarks.table import apart, peak_memory, reset_peak_memory, seconds, table_row
from ecul.data import Dataset
from ecul.evaluation import eval_sysu
from ecul.evaluation.rerank import RERANKINGS, reranked

SIZE = (288, 144)


def rows(device, quick):
    """Rows for the table: `ours` and `published` in `unit`, the median of n; peak memory in bytes."""
    yield from _ten_trials(quick)
    yield from _packing(quick)
    for name in RERANKINGS:
        yield _reranking(name, *((100, 900, 64) if quick else (1_000, 50_000, 2048)))


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
        fast = seconds(lambda products=products: trials_by(eval_sysu, products), n=5)[0]
        slow = seconds(lambda products=products: trials_by(_loops, products), n=1 if quick else 3)[0]
        yield table_row(f"SYSU trials from {name}", sizes, "s", fast, slow, n=5)


def _unit_rows(rng, count, dim):
    rows = rng.standard_normal((count, dim), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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

    count, n = 200 if quick else 2_000, 3
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        visible, infrared = Path(folder, "visible"), Path(folder, "infrared")
        for side in (visible, infrared):
            side.mkdir()
        for number in range(count):
            coarse = rng.integers(0, 256, (20, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((160, 400)).save(visible / f"{number:05d}.jpg")
        Image.fromarray(coarse[..., 0]).save(infrared / "0.jpg")

        def plain():
            for path in sorted(visible.iterdir()):
                with Image.open(path) as image:
                    np.asarray(image.convert("RGB").resize(SIZE[::-1], Image.Resampling.LANCZOS))

        def images(number):
            return Dataset.from_folders(visible, infrared, pack=f"{folder}/pack{number}").visible

        packs = iter(range(n))
        slow = seconds(plain, n=n)[0]
        packing = seconds(lambda: images(next(packs)).load(SIZE, progress=False), n=n)[0]
        packed = images(0)
        loading = seconds(lambda: packed.load(SIZE, progress=False).clone(), n=n)[0]
    sizes = f"{count} JPEG 400 x 160 to 288 x 144"
    yield table_row("packing", sizes, "images/s", count / packing, count / slow, n=n)
    yield table_row("loading from the pack", sizes, "images/s", count / loading, count / slow, n=n)


def _reranking(name, queries, gallery, dim):
    """The published way makes an N x N matrix of queries and gallery together, 10 GB at the full size."""
    spent, peak = apart(_reranked, name, queries, gallery, dim)
    sizes = f"{queries} x {gallery}, D={dim}"
    return table_row(f"re-ranking, {name}", sizes, "s", spent, n=1, peak_memory=peak)


def _reranked(name, queries, gallery, dim, block=100):
    features = world(queries + gallery, dim, (queries + gallery) // 40, NOISE["typical"])[0]
    reset_peak_memory()

    def every_query():
        distances = reranked(features[:queries], features[queries:], name)
        for start in range(0, queries, block):
            distances(slice(start, start + block))

    return seconds(every_query)[0], peak_memory()
