"""EMCC + DBSCAN shared by one to four processes of one thread each, on a CPU.

The features are the "typical" ones of `clustering.py`. Each process tells its seconds and its CPU seconds.
Beside other work only the CPU seconds mean something: the row gives the largest, the text gives both.
"""

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist

from benchmarks.clustering import DBSCAN, NOISE, SIZES, world
from benchmarks.table import table_row
from ecul import clustering


def rows(device, quick):
    if device != "cpu":
        raise SystemExit("add --device cpu: these processes share the cores of one machine")
    size = 1_000 if quick else 8_000
    alone = None
    for count in (1, 2, 3, 4):
        spent, taken, labels = _measured(size, count)
        alone = alone or (spent, taken, labels)
        share = f"{spent / alone[0]:.2f} of the CPU time and {taken / alone[1]:.2f} of the time of one"
        equal = "equal" if np.array_equal(labels, alone[2]) else "differ"
        sizes = f"N={size}, D=2048; {taken:.2f} s; {share}; labels {equal}"
        yield table_row(f"EMCC + DBSCAN, processes: {count}", sizes, "s of CPU", spent, n=3)


def _measured(size, count):
    """The CPU seconds of the busiest process, the seconds of the slowest one, and the labels."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(_member, [store] * count, range(count), [count] * count, [size] * count))
    return max(spent for spent, _, _ in found), max(taken for _, taken, _ in found), found[0][2]


def _member(store, rank, count, size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    features, *codes = world(size, 2048, size // 40, NOISE["typical"])
    spent, taken = [], []
    for _ in range(4):
        dist.barrier()
        start = time.process_time(), time.perf_counter()
        labels = clustering.emcc(features, *codes, **SIZES, **DBSCAN, together=True)
        spent.append(time.process_time() - start[0])
        taken.append(time.perf_counter() - start[1])
    dist.destroy_process_group()
    return float(np.median(spent[1:])), float(np.median(taken[1:])), labels.numpy()
