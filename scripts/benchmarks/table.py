"""What every measurement needs: the machine's description, a clock, peak memory, a row of the table."""

import argparse
import os
import platform
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import torch

from ecul.kernels._shortlist_cpu import BRAIN


def arguments(text):
    """A parser whose help is this text as it stands."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def describe_machine(device="cpu"):
    """Processor, card, memory, versions, load and date, by name."""
    machine = {
        "CPU": _cpu_name(),
        "bf16 instructions": "yes" if BRAIN else "no",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "GPU": torch.cuda.get_device_name() if device == "cuda" else "none used",
        "Python": platform.python_version(),
    }
    for package in ("torch", "triton", "numpy", "scipy", "scikit-learn"):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = "not installed"
    machine["load before"] = round(os.getloadavg()[0], 1)
    return {**machine, "date": date.today().isoformat()}


def _cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def apart(work, *arguments):
    """Run a function in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def seconds(work, device="cpu", n=1):
    """Median seconds of n runs, and the last result."""
    times = []
    for _ in range(n):
        _wait(device)
        start = time.perf_counter()
        result = work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def _wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device="cpu"):
    """Peak bytes of the GPU, or of this process in memory (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def reset_peak_memory(device="cpu"):
    """Forget the peak so far."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def table_row(work, sizes, unit, ours=None, published=None, *, n=0, peak_memory=None):
    """A row of the table: medians of n runs in this unit (s, us, images/s, x); None was not run.

    The ratio says how many times better ours is. Higher is better for rates (.../s), lower for the rest.
    """
    measured = ours is not None and published is not None
    better = (ours, published) if unit.endswith("/s") else (published, ours)
    return {
        "work": work,
        "sizes": sizes,
        "unit": unit,
        "ours": ours,
        "published": published,
        "ratio": better[0] / better[1] if measured else None,
        "peak_memory": peak_memory,
        "n": n,
    }


def as_line(row, quick=False):
    """The row as a line of Markdown; no ratio for quick rows, whose sizes are too small to compare."""

    def value(number):
        return "not run" if number is None else f"{number:.3g} {row['unit']}"

    ratio = "" if row["ratio"] is None or quick else f"{row['ratio']:.1f} x"
    memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f} GiB"
    cells = [row["work"], row["sizes"], value(row["ours"]), value(row["published"]), ratio, memory, row["n"]]
    return "| " + " | ".join(map(str, cells)) + " |"
