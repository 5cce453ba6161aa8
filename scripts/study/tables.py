"""The results of the runs: a table with paired differences and their intervals."""

import statistics

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
    """A Markdown table: mean ± deviation over worlds, differences on the same worlds."""
    heads = ("held-out identities", "n", "mAP", "Rank-1", "of the way", "difference in mAP", "above 0")
    heads += ("re-ranked mAP", "re-ranked Rank-1", "gain by re-ranking")
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line, rows in results.items():
        if not rows:
            continue
        way, apart = of_the_way(results, line), differences(results, line)
        cells = [line, str(len(rows)), *(spread([r[k] for r in rows.values()]) for k in ("mAP", "rank1"))]
        cells.append("" if way is None else f"{100 * way:.0f} %")
        cells.append(f"{gain(apart)} ({LINES[line][0]})" if apart else "")
        cells.append(f"{sum(d > 0 for d in apart)} of {len(apart)}" if apart else "")
        again = [row for row in rows.values() if "mAP_reranked" in row]
        if again:
            cells += [spread([r[k] for r in again]) for k in ("mAP_reranked", "rank1_reranked")]
            cells.append(gain([r["mAP_reranked"] - r["mAP"] for r in again]))
        text.append(f"| {' | '.join([*cells, '', '', ''][:10])} |")
    return "\n".join(text)


def spread(values: list[float]) -> str:
    """Mean ± deviation; one value has no deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def gain(apart: list[float]) -> str:
    """The mean of paired differences and its interval; one difference has no interval."""
    mean = f"{statistics.mean(apart):+.1f}"
    if len(apart) == 1:
        return mean
    low, high = interval(apart)
    return f"{mean} [{low:+.1f}, {high:+.1f}]"
