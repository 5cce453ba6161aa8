"""The row of an epoch in the log: label-free score, monitors, warnings, one line of text, other files."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ecul import MODALITIES
from ecul.common.files import write_file
from ecul.common.tables import render_table
from ecul.labels import Labels
from ecul.run.scores import adjusted_rand, separation

log = logging.getLogger("ecul")
LEGEND = (
    "clusters and outliers: visible/infrared/joint; score: separation of the clusters, without identities; "
    "loss: the sum of the stage's terms (stage 2 has more), then the mean of each, visible/infrared/joint"
)


def label_score(features: torch.Tensor, labels: Labels) -> float:
    """The separation of the clusters by the weights at the start of an epoch, the mean of both modalities.

    It needs no identities; higher is better. It compares epochs of one stage, and does not see what stage 2
    adds.
    """
    sides = features.tensor_split([labels.num_visible]), labels.sides.values(), labels.centers
    return float(np.mean([separation(x, y, centers) for x, y, centers in zip(*sides, strict=True)]))


def fell_apart(row: dict, history: list[dict], images: int) -> dict[str, int]:
    """{"fell_apart": 1}, with a warning, if the clusters fell apart since the epoch before; else {}.

    That is: the separation is lower, and there are half as many clusters, or three times as many outliers,
    a tenth of all images. A learning rate that is too high does that to a good start.
    """
    if not history or row["score"] >= history[-1]["score"]:
        return {}
    clusters, outliers = (
        [sum(r[f"{kind}_{m}"] for m in MODALITIES) for r in (history[-1], row)]
        for kind in ("clusters", "outliers")
    )
    if 2 * clusters[1] > clusters[0] and outliers[1] < max(3 * outliers[0], images / 10):
        return {}
    told = "epoch %d: the clusters fell apart: %d, then %d clusters; %d, then %d outliers"
    advice = "Lower lr, which may change on resume, or start from other weights"
    log.warning(f"{told}. {advice}", row["epoch"] + 1, *clusters, *outliers)
    return {"fell_apart": 1}


def monitors(labels: Labels, identities: np.ndarray | None) -> dict[str, float]:
    """Adjusted Rand index of the labels with the identities (N,), if known. Training never reads it."""
    if identities is None:
        return {}
    people = dict(zip(MODALITIES, np.split(identities, [labels.num_visible]), strict=True))
    joint = {} if labels.joint is None else {"joint": labels.joint}
    found = {}
    for name, own in (labels.sides | joint).items():
        found[f"monitor_ari_{name}"] = adjusted_rand(own.cpu(), people.get(name, identities))
    return {name: value for name, value in found.items() if not np.isnan(value)}


def describe(history: list[dict], epochs: int) -> str:
    """One line of text for the last epoch of a run of so many, which goes on like its latest five."""
    row, left = history[-1], epochs - len(history)
    clusters, outliers = (_joined(row, kind, "d") for kind in ("clusters_", "outliers_"))
    text = f"epoch {len(history)}/{epochs} stage {row['stage']} clusters {clusters} outliers {outliers}"
    text += f" score {row['score']:.3f}"
    losses = {k.removeprefix("loss_"): v for k, v in row.items() if k.startswith("loss_")}
    if losses:
        kinds = dict.fromkeys(name.split("_")[0] for name in losses)
        parts = [f"{kind} {_joined(losses, kind, '.2f')}" for kind in kinds]
        text += f" loss {sum(losses.values()):.3f} ({', '.join(parts)})"
        text += f" {row['seconds']:.1f} s {row['images_per_second']:.0f} images/s"
    if told := _joined(row, "monitor_", ".2f"):
        text += f" (monitor: ARI {told})"
    if told := _joined(row, "valid", ".1f"):
        text += f" (validation: Rank-1/mAP {told})"
    seconds = left * float(np.mean([row["seconds"] for row in history[-5:]]))
    return text + f", {tqdm.format_interval(seconds)} left" * (left > 0)


def _joined(row: dict, kind: str, form: str) -> str:
    return "/".join(format(v, form) for k, v in row.items() if k.startswith(kind))


def logger(kind: str, directory: Path) -> Callable[[dict], None]:
    """An `on_epoch` that writes `log.csv`, or TensorBoard's files, into a run's directory.

    kind: "csv" or "tensorboard". TensorBoard counts epochs from 1. Errors: ImportError without its package.
    """
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

    def write(row: dict) -> None:
        if kind == "csv":
            rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
            write_file(directory / "log.csv", render_table("csv", "", [], rows).encode())
            return
        with SummaryWriter(str(directory / "tensorboard")) as writer:
            for name, value in row.items():
                writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"] + 1)

    return write
