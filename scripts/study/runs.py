"""One run: a line on the world of a seed, trained and evaluated on held-out identities."""

import datetime
import fcntl
import hashlib
import json
import logging
import os
import resource
import shutil
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import ecul
from ecul import Config, evaluate, open_dataset, optim, train, training
from ecul.common.files import hash_file
from ecul.common.weights import read_tensors, write_tensors
from ecul.config import METHODS
from ecul.labels import Labels

from .lines import LINES, PRESET, WORLDS

# Fields that only stage 2 reads: lines that differ in these alone share their first stage.
CROSS = (
    "pairs", "matching", "exchanged_stem", "k1_joint", "k2_joint", "k3_joint", "eps_joint",
    "k_select", "weight_joint", "weight_agnostic", "weight_consistency",
)  # fmt: skip


@cache
def code() -> str:
    """A hash of the library's code: other code must train its own first stages."""
    package = Path(ecul.__file__).parent
    folders = {package, Path(ecul.kernels.__file__).parent}
    found = hashlib.sha256()
    for file in sorted(f for folder in folders for f in folder.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def configure(line: str, world: str, seed: int, weights: str | None, overrides: dict) -> Config:
    """The configuration of a line on a world; fields that its method sets to None stay None."""
    own = LINES[line][1]
    left_out = {k: v for k, v in METHODS[own.get("method", "united")].items() if v is None}
    fields = {**WORLDS[world].fields, **left_out, **own}
    if fields.get("k3", 0) is None:
        fields |= WORLDS[world].plain
    fields |= {"weights": weights, **overrides, "seed": seed}
    whole = fields.pop("stages", 2) == 1
    config = Config.preset(PRESET, **fields)
    return config.replace(epochs_intra=config.epochs, epochs_cross=0) if whole else config


def settings(line: str, world: str, overrides: dict) -> dict:
    """All fields of a line for the record, without the seed and the path of its start."""
    fields = configure(line, world, 0, None, overrides).to_dict()
    return {name: value for name, value in fields.items() if name not in ("seed", "weights")}


def run_line(line: str, root: str, config: Config, shared: int, folder: Path) -> dict:
    """Metrics, seconds and peak memory of one run; `shared`: epochs of stage 1 that all lines share."""
    torch.set_num_threads(1)
    logging.getLogger("ecul").setLevel(logging.WARNING)
    dataset, history = open_dataset("sysu", root), [{"seconds": 0.0}]
    if line == "untrained":
        model = optim.build_model(config, torch.device("cpu")).eval()
    elif line == "supervised":
        model, history = supervise(dataset, config)
    else:
        model, history = train_shared(dataset, config, min(shared, config.epochs_intra), folder)
    seconds = sum(row["seconds"] for row in history)
    result: dict = {"seconds": seconds, "date": f"{datetime.date.today()}", "code": code()}
    for rerank, ending in ((None, ""), ("modality", "_reranked")):
        tested = evaluate(model, dataset, modes=["all"], rerank=rerank, progress=False).rows[0]
        result |= {name + ending: tested[name] for name in ("mAP", "rank1")}
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return result | {k: v for k, v in history[-1].items() if k.startswith(("clusters_", "monitor_", "score"))}


def train_shared(dataset, config: Config, epochs: int, folder: Path):
    """`train(dataset, config)`, continued from the first epochs of stage 1, which equal lines train once.

    The weights are those of a whole run, because the seed and the epoch determine the randomness of an epoch.
    """
    default = Config()
    first = config.replace(
        **{name: getattr(default, name) for name in CROSS}, epochs_intra=epochs, epochs_cross=0
    )
    start = hash_file(first.weights) if first.weights else None
    world = Path(dataset.root, "synthetic.json").read_text()
    name = hashlib.sha256(json.dumps([first.to_dict(), start, world, code()]).encode()).hexdigest()[:12]
    begun, own = folder / f"stage-1-{name}", folder / f"run-{os.getpid()}"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the lines trains it, the others wait
        train(dataset, first, output=begun, resume=begun.exists())
    shutil.rmtree(own, ignore_errors=True)
    try:
        shutil.copytree(begun, own)
        tensors, metadata, _ = read_tensors(own / "resume.safetensors")
        about = {**json.loads(metadata["run"]), "config": config.to_dict()}
        write_tensors(own / "resume.safetensors", tensors, {"run": json.dumps(about)})
        run = train(dataset, config, output=own, resume=True)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return run.model, run.history


def supervise(dataset, config: Config):
    """`train(dataset, config)` with the identities in place of the clusters, in stage 2 from the start."""

    def identities(features, images, config, *_):
        people, own = np.unique(images.identities, return_inverse=True)
        own, match = torch.from_numpy(own), np.eye(len(people), dtype=bool)
        found = {"joint": own, "selected": own, "match": match, "mutual": config.matching == "mutual"}
        return Labels.from_own(features, own, images.num_visible, **found)

    config = config.replace(epochs_intra=0, epochs_cross=config.epochs)
    with mock.patch.multiple(training, assign_labels=identities, extract_exchanged=lambda *_: None):
        run = train(dataset, config)
    return run.model, run.history
