"""What every measurement has in common: the machine it ran on, and a row of the table."""

import os
import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe_machine(device="cpu"):
    """Processor, card, memory, versions, load and date, by name."""
    machine = {
        "CPU": _cpu_name(),
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


def table_row(work, sizes, unit, ours=None, published=None, *, n=0, peak_memory=None):
    """A row of the table: medians in this unit (s, us, images/s) over n runs, None for what did not run.

    The ratio says how many times better ours is: times are better when they are shorter, rates when higher.
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


def as_line(row):
    """The row as a line of Markdown."""

    def value(number):
        return "not run" if number is None else f"{number:.3g} {row['unit']}"

    ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f} x"
    memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f} GiB"
    cells = [row["work"], row["sizes"], value(row["ours"]), value(row["published"]), ratio, memory, row["n"]]
    return "| " + " | ".join(map(str, cells)) + " |"
