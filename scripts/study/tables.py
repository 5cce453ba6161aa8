"""What the runs say: a table with paired differences and their intervals, and a picture of them."""

import statistics
from pathlib import Path

import numpy as np

from .lines import LINES


def differences(results: dict, line: str) -> list[float]:
    """mAP minus that of the line this one changes, seed by seed; empty where either did not run."""
    base = results.get(LINES[line][0], {})
    return [row["mAP"] - base[seed]["mAP"] for seed, row in results[line].items() if seed in base]


def interval(values: list[float], share: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """The bootstrap interval of a mean: percentiles of the means of `draws` samples with replacement.

    It never leaves the range of the values: below some eight of them it is too narrow.
    """
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def of_the_way(results: dict, line: str) -> float | None:
    """How far from untrained (0) to supervised (1) the mean mAP of a line is, on the seeds of all three."""
    three = [results.get(name, {}) for name in ("untrained", "supervised", line)]
    seeds = set.intersection(*(set(rows) for rows in three))
    if not seeds:
        return None
    low, high, own = (statistics.mean(rows[seed]["mAP"] for seed in seeds) for rows in three)
    return (own - low) / (high - low)


def table(results: dict) -> str:
    """A Markdown table of the lines that ran: mean ± deviation over worlds, differences in pairs."""
    heads = ("held-out identities", "n", "mAP", "Rank-1", "of the way", "difference in mAP", "above 0")
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line, rows in results.items():
        if not rows:
            continue
        cells = [line, str(len(rows)), *(spread([r[k] for r in rows.values()]) for k in ("mAP", "rank1"))]
        way, apart = of_the_way(results, line), differences(results, line)
        cells.append("" if way is None else f"{100 * way:.0f} %")
        if apart:
            cells.append(f"{gain(apart)} ({LINES[line][0]})")
            cells.append(f"{sum(d > 0 for d in apart)} of {len(apart)}")
        else:
            cells += ["", ""]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def reranked_table(results: dict) -> str:
    """A Markdown table of the lines that were re-ranked at test time as well, by modality."""
    heads = ("re-ranked at test time", "n", "mAP", "re-ranked mAP", "difference", "re-ranked Rank-1")
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line, runs in results.items():
        if not (rows := [row for row in runs.values() if "mAP_reranked" in row]):
            continue
        plain, again, first = ([r[k] for r in rows] for k in ("mAP", "mAP_reranked", "rank1_reranked"))
        apart = [b - a for a, b in zip(plain, again, strict=True)]
        cells = [line, str(len(rows)), spread(plain), spread(again), gain(apart), spread(first)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def spread(values: list[float]) -> str:
    """Mean ± deviation, of one value itself."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def gain(apart: list[float]) -> str:
    """The mean of paired differences and its interval, of one difference itself."""
    mean = f"{statistics.mean(apart):+.1f}"
    if len(apart) == 1:
        return mean
    low, high = interval(apart)
    return f"{mean} [{low:+.1f}, {high:+.1f}]"


def draw(results: dict, path: Path, title: str) -> None:
    """Differences from the line that each one changes: a dot a world, a bar at the mean, its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [line for line in results if differences(results, line)][::-1]
    if not lines:
        return
    bases = list(dict.fromkeys(LINES[line][0] for line in lines[::-1]))
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.36 * len(lines)), layout="constrained")
    for height, line in enumerate(lines):
        apart, color = differences(results, line), f"C{bases.index(LINES[line][0])}"
        axes.barh(height, statistics.mean(apart), height=0.6, color=color, alpha=0.3)
        axes.plot(interval(apart), [height] * 2, color=color, linewidth=2)
        axes.plot(apart, [height] * len(apart), "o", color=color, markersize=4)
    for base in bases:
        axes.plot([], [], "o", color=f"C{bases.index(base)}", label=f"from {base}")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.set_xlabel("difference in mAP, points")
    axes.legend(loc="best", framealpha=1)
    axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
