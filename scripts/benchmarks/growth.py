"""How time and memory of clustering grow with the number of images, N = 1,000 to 64,000.

Every N runs in its own process on the "typical" features of `clustering.py` with D = 2048 and 40 images an
identity. Peak memory starts anew before each step and leaves out the libraries. Exponents are least-squares
slopes of log against log over N >= 4,000.
"""

import numpy as np

from benchmarks.clustering import NOISE, steps, world
from benchmarks.table import apart, peak_memory, table_row
from ecul import clustering

DIM = 2048


def rows(device, quick):
    runs = []
    for size in (1_000 * 2**i for i in range(2 if quick else 7)):
        spent, held, non_zeros = apart(_measured, size)
        runs.append((size, sum(spent.values()), max(held.values())))
        told = ", ".join(f"{name} {spent[name]:.2f} s {held[name] / 2**20:.0f} MiB" for name in spent)
        sizes = f"N={size}, D={DIM}, {non_zeros:.0f} non-zeros a row; {told}"
        yield table_row("growth of EMCC + DBSCAN", sizes, "s", runs[-1][1], n=1, peak_memory=runs[-1][2])
    large = np.log([run for run in runs if quick or run[0] >= 4_000])
    power = [np.polyfit(large[:, 0], large[:, column], 1)[0] for column in (1, 2)]
    yield table_row("growth, exponents", f"time ~ N^{power[0]:.2f}, memory ~ N^{power[1]:.2f}", "")


def _measured(size):
    """Seconds and peak bytes of every step, and the non-zeros of a row."""
    clustering.emcc(world(100, DIM, 5, NOISE["typical"])[0])
    before = peak_memory()
    features, *codes = world(size, DIM, size // 40, NOISE["typical"])
    (_, _, extended, _), spent, held = steps(features, *codes)
    return spent, {name: peak - before for name, peak in held.items()}, len(extended[1]) / size
