"""A run directory: what is written after each epoch, how a run goes on from it, and what it says of itself.

    config.json  log.jsonl  model.safetensors  resume.safetensors

Every file is whole or absent. No pickle anywhere. Randomness of an epoch follows from (seed, epoch), so a
run's state is its weights, its optimiser's moments and its history. `resume.safetensors` holds all of it and
is written last: it alone says which epoch was finished. The other files are for people and for the commands.
Runs of several trials of a data set lie together, as `trial-1`, `trial-2`, ... in one directory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from ecul import MODALITIES
from ecul.common import distributed
from ecul.common.files import lock, reading, write_file, write_json
from ecul.common.names import shorten
from ecul.common.pretrained import Pretrained, weights_file
from ecul.common.weights import read_metadata, read_tensors, require_fit, write_tensors
from ecul.config import Config
from ecul.data.dataset import Dataset, open_dataset

FILE = "resume.safetensors"  # its metadata hold what a `SavedRun` is made of
# Fields that may change on resume; `load_run` has the whole rule.
MAY_CHANGE = ("lr", "lr_gamma", "weights", "precision", "compile", "checkpointing", "batch_extract")


@dataclass
class State:
    """All that an epoch changes, and all that a run needs to go on."""

    model: torch.nn.Module
    forward: torch.nn.Module  # the model as the batches see it: compiled, or one of several processes
    optimizer: torch.optim.Optimizer
    history: list = field(default_factory=list)  # a row of the log for each epoch


@contextmanager
def run_directory(output: str | os.PathLike | None) -> Iterator[Any]:
    """Make the run's directory and lock it in the first process, so that no other run uses it; or None.

    Errors, before any work: a directory that cannot be written, is nearly full (under 1 GiB free) or is
    held by another run.
    """
    output = None if output is None else Path(output)
    if output is None or distributed.rank() > 0:
        yield output
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = open(output / ".lock", "ab+", buffering=0)  # noqa: SIM115 - even a pipe opens at once so
    except OSError as e:
        raise ValueError(f"output: cannot write to {output} ({e.strerror}); choose another directory") from e
    with file:
        if lock(file.fileno()) is False:
            raise ValueError(f"output: {output} is in use by another run; choose another directory or wait")
        for left_over in output.glob(".*.tmp"):
            left_over.unlink()
        if shutil.disk_usage(output).free < 2**30:
            raise ValueError(f"output: less than 1 GiB is free on the disk of {output}; free some")
        yield output


def holds_run(directory: Path) -> bool:
    """Whether a run can go on from here.

    Errors: ValueError for what a new run would write over: a run that lost its state, another's model.
    """
    if (directory / FILE).exists():
        return True
    log, model = directory / "log.jsonl", directory / "model.safetensors"
    epochs = log.read_bytes().count(b"\n") if log.is_file() else 0
    if epochs > 1 or (model.exists() and not epochs):  # after one epoch, its files may not all be there yet
        held = f"a run of {epochs} epochs without its {FILE}" if epochs else "a model that no run wrote"
        raise ValueError(f"output: {directory} holds {held}; choose another directory")
    return False


def save_run(output: Path, state: State, config: Config, data: Mapping) -> None:
    """Write the state after an epoch; `resume.safetensors` last, since its epoch is the one that counts.

    data: what the file says of the data set, as in `SavedRun`.
    """
    model, history, settings = state.model, state.history, config.to_dict()
    metadata = {"method": config.method, "dataset": data["dataset"], "epoch": len(history)}
    write_file(output / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
    if isinstance(model, Pretrained):
        model.save_pretrained(output, metadata, settings)
    else:
        write_tensors(output / "model.safetensors", model.state_dict(), metadata)
        write_json(output / "config.json", settings)
    about = {"config": settings, "dataset": dict(data), "model": _network(model), "history": history}
    tensors = _tensors(model, state.optimizer.state_dict()["state"])
    write_tensors(output / FILE, tensors, {"run": json.dumps(about)})


def load_run(output: Path, state: State, config: Config, dataset: Dataset) -> None:
    """Put the state of `save_run` back to the last finished epoch.

    What may change on resume: the fields in MAY_CHANGE, and the schedule of the epochs to come
    (`epochs_intra`, `epochs_cross`, `tsmem_switch`, `lr_milestones`), so that a run can be lengthened.
    Everything else must stay: the other fields, the data set, and the network with its own settings. Errors:
    ValueError that names what differs, or the file that is damaged.
    """
    file = output / FILE
    tensors, metadata, _ = read_tensors(file)
    with reading(file):
        run = parse_run(output, metadata)
    then = {**run.dataset, **run.config.to_dict(), "network (model=)": run.model}
    now = {**dataset_fingerprint(dataset), **config.to_dict(), "network (model=)": _network(state.model)}
    past, present = (_settled(values, len(run.history)) for values in (then, now))
    told = [f"{k}: {then.get(k)!r} then, {now[k]!r} now" for k in present if past.get(k) != present[k]]
    if told:
        listed = shorten(told, len(told), "; ")
        raise ValueError(f"{output} holds a run that cannot be continued with other settings: {listed}")
    moments = {  # of Adam, in the parameter's memory format: a fused step relies on it
        i: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for i, p in enumerate(state.optimizer.param_groups[0]["params"])
        if f"optimizer.{i}.step" in tensors
    }
    mine = _tensors(state.model, moments)
    require_fit(mine, tensors, file, "this network; give model= the one of the run")
    for name, value in tensors.items():
        mine[name].copy_(value)
    state.history = run.history
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})


def _tensors(model: torch.nn.Module, moments: dict[int, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The weights and the optimiser's moments by their names in the file."""
    named = {f"model.{name}": value for name, value in model.state_dict().items()}
    return named | {
        f"optimizer.{i}.{k}": torch.as_tensor(v) for i, m in moments.items() for k, v in m.items()
    }


def _settled(values: dict[str, Any], epochs: int) -> dict[str, Any]:
    """What must stay once these epochs are finished, with the schedule cut to them."""
    kept = {name: value for name, value in values.items() if name not in MAY_CHANGE}
    total = values["epochs_intra"] + values["epochs_cross"]
    kept |= {name: min(values[name], epochs) for name in ("epochs_intra", "tsmem_switch")}
    kept["epochs_cross"] = min(total, epochs) - kept["epochs_intra"]
    kept["lr_milestones"] = [milestone for milestone in values["lr_milestones"] if milestone < epochs]
    return kept


def _network(model: torch.nn.Module) -> dict[str, Any]:
    """The network's class and its own settings, as JSON gives them back."""
    return json.loads(json.dumps({"architecture": type(model).__name__, **getattr(model, "settings", {})}))


@dataclass(frozen=True)
class SavedRun:
    """What a run directory says of itself.

    history: a dict an epoch. dataset: `dataset_fingerprint`, and "root" and "options", with which it was
    opened. model: its class under "architecture", and its settings.
    """

    directory: Path
    config: Config
    history: list[dict]
    dataset: dict
    model: dict

    @property
    def options(self) -> dict[str, Any]:
        """The data set's options. Where to write a pack is not for a run to say."""
        options = self.dataset["options"]
        return {name: value for name, value in options.items() if name != "pack" or value is False}

    def options_for(self, dataset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options to open the data set of this name with: those of the training, then the given ones.

        Errors: ValueError for another trial than the run's: some of its test people were trained on.
        """
        known = self.options if self.dataset["dataset"] == dataset else {}
        trial, trained = given.get("trial"), known.get("trial")
        if None not in (trial, trained) and trial != trained:
            told = f"which holds test people of trial {trial}; leave it out, or give that trial's model"
            raise ValueError(f"{self.directory} was trained on trial {trained}, {told}")
        return {**known, **given}

    def open(self, root: str | Path | None = None, **options: Any) -> Dataset:
        """The run's data set with its options and these, from where it lay or from `root`.

        Errors: ValueError where it is no longer there.
        """
        known = self.dataset["root"]
        if known is None:
            raise ValueError("the images were in memory; in Python, report(run, dataset) takes them")
        kept = self.options | ({"pack": False} if root is None else {})
        if root in (None, known) and not Path(known).is_dir():
            raise ValueError(f"the images are no longer at {known}; --root (root=) names their folder")
        return open_dataset(self.dataset["dataset"], root or known, **{**kept, **options})

    def require_same(self, dataset: Dataset) -> None:
        """A ValueError that names what differs, unless the run was trained on this data set."""
        now, then = dataset_fingerprint(dataset), self.dataset
        if told := [f"{k} is {v!r}, in training it was {then[k]!r}" for k, v in now.items() if then[k] != v]:
            raise ValueError(f"dataset: not the one that {self.directory} was trained on: {'; '.join(told)}")


def dataset_fingerprint(dataset: Dataset) -> dict:
    """What a run knows its data set by: its name, numbers of images, a hash of names and cameras."""
    digest = hashlib.sha256()
    for m in MODALITIES:
        images = getattr(dataset, m)
        digest.update(os.fsencode("\n".join(images.names)) + images.camids.tobytes())
    counts = {f"{m}_images": len(getattr(dataset, m)) for m in MODALITIES}
    return {"dataset": dataset.name, **counts, "names_and_cameras": digest.hexdigest()[:16]}


def parse_run(directory: Path, metadata: Mapping[str, str]) -> SavedRun:
    """The run that the metadata of its resume.safetensors describe; call it in a block of `reading`."""
    about = json.loads(metadata["run"])
    history = list(about["history"])
    for number, row in enumerate(history):
        if row["epoch"] != number or row["stage"] not in (1, 2) or not all(map(isfinite, row.values())):
            raise ValueError(f"its history has no row of numbers for epoch {number}")
    dataset = about["dataset"]
    kinds = {"dataset": str, "root": str | None, "options": dict}
    if not all(isinstance(dataset[name], kind) for name, kind in kinds.items()):
        raise ValueError("its data set has no name, root and options")
    return SavedRun(directory, Config.from_dict(about["config"]), history, dataset, about["model"])


def find_run(path: str | Path) -> SavedRun | None:
    """The run of a run directory, or of the weights in one; None for weights alone, as after an import."""
    file = weights_file(path).parent / FILE
    if not file.is_file():
        return None
    with reading(file):
        return parse_run(file.parent, read_metadata(file))


def read_run(directory: str | Path) -> SavedRun:
    """The run of a directory. Errors: ValueError for a directory without a run, or a run without an epoch."""
    run = find_run(Path(directory) / FILE)
    if run is None:
        raise ValueError(f"{directory} is no run directory: it has no {FILE}")
    if not run.history:
        raise ValueError(f"{directory}: the run has not finished an epoch yet")
    return run


def trial_directory(output: str | Path, trial: int | None) -> Path:
    """Where the run of one trial lies among those of the others; None: there is one run alone."""
    return Path(output) if trial is None else Path(output) / f"trial-{trial}"


def find_trials(path: str | Path) -> list[Path]:
    """The runs of all trials in a directory, by number; the path alone where it is a run or a model."""
    path = Path(path)
    numbers = [p.name.removeprefix("trial-") for p in path.glob("trial-*/")]
    found = [trial_directory(path, n) for n in sorted(int(n) for n in numbers if n.isdecimal())]
    return [path] if (path / "model.safetensors").exists() or not found else found
