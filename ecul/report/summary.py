"""What a run came to, in words: the first screen of its report."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ecul.data.dataset import Dataset
from ecul.labels import Labels
from ecul.memory import cluster_means
from ecul.run.scores import separation

MIXED = 0.1  # the margin below which a cluster looks mixed
STRUCTURE = ((0.7, "far apart"), (0.5, "apart"), (0.25, "partly apart"), (-1, "hardly apart"))
# silhouettes as Kaufman and Rousseeuw, Finding Groups in Data (1990), read them


def counted(number: int, noun: str, of: int | None = None) -> str:
    """A number in words, as 3 of 75 epochs or 1 of 1 epoch: the noun follows the last number."""
    last = number if of is None else of
    return f"{number:,}{'' if of is None else f' of {of:,}'} {noun}{'s' * (last != 1)}"


def summary_rows(
    directory: Path, history: Sequence[dict], epochs: int, dataset: Dataset | None
) -> list[tuple[str, str]]:
    """When, how long, on how many images: (name, text) a row."""
    ended = time.localtime((directory / "resume.safetensors").stat().st_mtime)
    seconds = round(sum(row.get("seconds", 0) for row in history))
    hours, minutes = divmod(seconds // 60, 60)
    lasted = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"
    rows = [
        ("ended", time.strftime("%Y-%m-%d %H:%M", ended)),
        ("training", f"{counted(len(history), 'epoch', epochs)} in {lasted}"),
    ]
    for prefix, name in (("", "trained on"), ("test_", "tested on")) if dataset is not None else ():
        sides = [getattr(dataset, f"{prefix}{m}") for m in ("visible", "infrared")]
        if None not in sides:
            rows.append((name, ", ".join(f"{len(side):,} {side.modality}" for side in sides) + " images"))
    return rows


def verdict(features: torch.Tensor, labels: Labels) -> str:
    """What the clusters look like without identities: how far apart, how many mixed, how many outliers."""
    if not labels.enough:
        return "bad: fewer than two clusters in a modality; see eps and min_samples"
    told, parts = [], features.tensor_split([labels.num_visible])
    for (name, own), rows in zip(labels.sides.items(), parts, strict=True):
        margins, score = cluster_margins(rows, own), separation(rows, own)
        mixed, outliers = int((margins < MIXED).sum()), int((own < 0).sum())
        words = next(word for least, word in STRUCTURE if score >= least)
        bad = "bad: " * (score < 0.25 or 5 * mixed > len(margins) or 2 * outliers > len(own))
        text = f"{bad}{counted(len(margins), f'{name} cluster')} {words} (separation {score:.2f}), "
        text += f"{mixed or 'none'} of them look{'s' * (mixed == 1)} mixed"
        told.append(f"{text}, {outliers / len(own):.0%} of the images in none")
    return "; ".join(told)


def cluster_margins(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over each cluster's members of (cosine to the own centre - cosine to the nearest other one).

    features: (N, D) unit rows; labels: (N,) int64, -1 = outlier, contiguous from 0. Returns (C,) float32;
    with one cluster alone the other cosine is taken as -1.
    """
    kept = labels >= 0
    cosines = features[kept] @ cluster_means(features, labels).T
    own = labels[kept][:, None]
    other = cosines.scatter(1, own, -1.0).amax(1)
    margins = cosines.gather(1, own)[:, 0] - other
    return cosines.new_zeros(cosines.shape[1]).index_add_(0, own[:, 0], margins) / torch.bincount(own[:, 0])
