"""A run directory: what is written after each epoch, and how a run goes on from it.

    config.json  log.jsonl  model.safetensors  resume.safetensors  resume.json

Every file is whole or absent. No pickle anywhere. Randomness of an epoch follows from (seed, epoch), so a
run's state is its weights, its optimiser's moments and its history. `resume.safetensors` is written last; it
has a checksum of all in it, and one of the history up to its epoch.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from ecul.common.files import write_file, write_json
from ecul.common.names import clipped, shorten
from ecul.common.pretrained import Pretrained
from ecul.common.records import COUNT, Schema, parse_json, read_json, whole_number
from ecul.common.weights import load_weights, read_tensors, require_fit, write_tensors
from ecul.config import Config

ROW: Schema = {"epoch": COUNT, "stage": {1, 2}, "score": float, "skipped?": bool, ...: float}
ABOUT: Schema = {
    "config": dict,
    "dataset": {"dataset": str, "visible_images": COUNT, "infrared_images": COUNT, ...: str},
    "history": [ROW],
    "root?": str | None,
    "options?": dict,
}

# The rate of the epochs to come, and where and how they are computed.
MAY_CHANGE = ("lr", "lr_gamma", "weights", "precision", "compile", "checkpointing", "batch_extract")


@contextmanager
def run_directory(output: str | os.PathLike | None, hold: bool = True) -> Iterator[Any]:
    """The run's directory as a Path, made and held alone (by one process of a run); None without output.

    Errors, before any work: a directory that cannot be written, is nearly full (under 1 GiB free) or is
    held by another run.
    """
    if output is None:
        yield None
        return
    output = Path(output)
    if not hold:
        yield output
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (output / ".lock").exists() and not (output / ".lock").is_file():
            raise ValueError(f"output: {output / '.lock'} is no file; remove it, or choose another directory")
        lock = open(output / ".lock", "a")  # noqa: SIM115 - held for the whole run; a link's target stays
    except OSError as e:
        raise ValueError(f"output: cannot write to {output} ({e.strerror}); choose another directory") from e
    with lock:
        _lock(lock, output)
        for left_over in output.glob(".*.tmp"):
            left_over.unlink()
        if shutil.disk_usage(output).free < 2**30:
            raise ValueError(
                f"output: less than 1 GiB is free on the disk of {output}; free some or choose another"
            )
        yield output


def _lock(file: TextIO, output: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            return  # a file system without locks
        raise ValueError(
            f"output: {output} is in use by another run; choose another directory or wait"
        ) from e


def holds_run(directory: Path) -> bool:
    """Whether a run can go on from here.

    Errors: ValueError for what a new run would write over: a run that lost its weights, another's model.
    """
    if (directory / "resume.safetensors").exists():
        return True
    lost = len(read_about(directory)["history"]) if (directory / "resume.json").exists() else 0
    if lost > 1:  # after one, the first epoch's files may not all be there yet
        raise ValueError(
            f"output: {directory} holds a run of {lost} epochs without its resume.safetensors; put it back, "
            "or choose another directory"
        )
    if (directory / "model.safetensors").exists() and not (directory / "log.jsonl").exists():
        raise ValueError(f"output: {directory} holds a model that no run wrote; choose another directory")
    return False


def save_run(output: Path, state: Any, config: Config, data: Mapping, source: Mapping) -> None:
    """Write the state after an epoch; `resume.safetensors` last, since its epoch is the one that counts.

    state: `model`, `optimizer`, `history` (a dict an epoch) and `labels` (a tensor or None). data: the
    data set's fingerprint. source: where it lies and how it was opened, for `ecul report`.
    """
    model, history = state.model, state.history
    metadata = {"method": config.method, "dataset": data["dataset"], "epoch": len(history)}
    write_file(output / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
    if isinstance(model, Pretrained):
        model.save_pretrained(output, metadata, config.to_dict())
    else:
        write_tensors(output / "model.safetensors", model.state_dict(), metadata)
        write_json(output / "config.json", config.to_dict())
    saved = {"config": config.to_dict(), "dataset": dict(data), **source, "history": history}
    write_json(output / "resume.json", saved)
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors.update({} if state.labels is None else {"labels.own": state.labels})
    for i, values in state.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in values.items()})
    metadata = {"epoch": len(history), "history": _checksum(history)}
    write_tensors(output / "resume.safetensors", tensors, metadata)


def load_run(output: Path, state: Any, config: Config, data: Mapping) -> None:
    """Put the state of `save_run` back to the last finished epoch.

    What may change on resume: the fields in MAY_CHANGE, and the schedule of the epochs to come
    (`epochs_intra`, `epochs_cross`, `tsmem_switch`, `lr_milestones`), so that a run can be lengthened.
    Everything else must stay. Errors: ValueError that names what differs in the configuration or the data
    set, or the file that is damaged.
    """
    about, file = read_about(output), output / "resume.safetensors"
    tensors, metadata = read_tensors(file)
    history = _continued(about["history"], metadata, file)
    epoch, before = len(history), about["config"]
    now, then = {**config.to_dict(), **data}, {**before.to_dict(), **about["dataset"]}
    past = [{**_settled(c, epoch), **d} for c, d in ((before, about["dataset"]), (config, data))]
    differs = [k for k in {**past[0], **past[1]} if past[0].get(k) != past[1].get(k)]
    if differs:
        told = [f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in differs]
        listed = shorten(told, len(told), "; ")
        raise ValueError(f"{output} holds a run that cannot be continued with other settings: {listed}")
    kinds = ("model.", "labels.", "optimizer.")
    part = {
        kind: {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)} for kind in kinds
    }
    labels = _labels(part["labels."], data, file)
    require_fit(state.model.state_dict(), part["model."], file)
    moments = _moments(part["optimizer."], state.optimizer, file)
    load_weights(state.model, part["model."], file)
    state.labels, state.history = labels, history
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})


def _settled(config: Config, epochs: int) -> dict[str, Any]:
    """The settings that must stay after so many finished epochs: the rule is in `load_run`."""
    values = {name: value for name, value in config.to_dict().items() if name not in MAY_CHANGE}
    values |= {name: min(values[name], epochs) for name in ("epochs_intra", "tsmem_switch")}
    values["epochs_cross"] = min(config.epochs, epochs) - values["epochs_intra"]
    values["lr_milestones"] = [milestone for milestone in config.lr_milestones if milestone < epochs]
    return values


def read_about(output: Path) -> dict[str, Any]:
    """What resume.json says of a run: `ABOUT`, its config as a `Config`, and "fields", those that it saved.

    Errors: FileNotFoundError; ValueError naming the file that is damaged, and where.
    """
    file = output / "resume.json"
    about = read_json(file, ABOUT)
    try:
        config = Config.from_dict(about["config"])
    except (ValueError, TypeError) as e:
        raise ValueError(f"{file} is damaged: its config is none of this version ({clipped(e)})") from e
    _require_sequence(about["history"], file)
    return {"root": None, "options": {}, **about, "config": config}


def read_log(output: Path) -> list[dict]:
    """The rows of log.jsonl, one an epoch. Errors: those of `read_about`."""
    file = output / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    lines = file.read_bytes().splitlines()
    rows = [parse_json(line, ROW, f"{file}, line {number}") for number, line in enumerate(lines, 1)]
    _require_sequence(rows, file)
    return rows


def _require_sequence(history: list[dict], file: Path) -> None:
    for number, row in enumerate(history):
        if row["epoch"] != number:
            raise ValueError(f"{file} is damaged: epoch {row['epoch']} in the place of epoch {number}")


def _checksum(history: list[dict]) -> str:
    return hashlib.blake2b(json.dumps(history, sort_keys=True).encode(), digest_size=16).hexdigest()


def _continued(history: list[dict], metadata: Mapping[str, str], file: Path) -> list[dict]:
    """The rows up to the epoch of resume.safetensors."""
    epoch = whole_number(metadata.get("epoch", 0), f"{file} is damaged: its epoch")
    if "epoch" not in metadata or epoch > len(history):
        told = f"epoch {epoch}" if "epoch" in metadata else "no epoch"
        raise ValueError(f"{file} is damaged: it tells of {told}, resume.json of {len(history)} epochs")
    history = history[:epoch]
    if metadata.get("history") != _checksum(history):
        raise ValueError(
            f"{file.with_name('resume.json')} is damaged: its history is not that of {file.name}"
        )
    return history


def _labels(tensors: Mapping[str, torch.Tensor], data: Mapping, file: Path) -> torch.Tensor | None:
    """The last epoch's labels of all images."""
    found = tensors.get("own")
    if found is None:
        return None
    count = data["visible_images"] + data["infrared_images"]
    if found.dtype != torch.int64 or found.shape != (count,) or int(found.amin()) < -1:
        raise ValueError(f"{file} is damaged: its labels are not those of {count} images")
    return found


def _moments(
    tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, file: Path
) -> dict[int, dict]:
    """Adam's tensors by parameter, in the parameter's memory format: a fused step relies on it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {number for key in tensors if (number := key.split(".")[0]) in map(str, range(len(parameters)))}
    mine = {f"{number}.step": torch.zeros(()) for number in numbers}
    for name in ("exp_avg", "exp_avg_sq"):
        mine |= {f"{number}.{name}": parameters[int(number)] for number in numbers}
    require_fit(mine, tensors, file, "the optimiser of this network")
    moments: dict[int, dict] = {int(number): {} for number in numbers}
    for key, value in tensors.items():
        number, name = key.split(".")
        like = value if name == "step" else torch.empty_like(parameters[int(number)]).copy_(value)
        moments[int(number)][name] = like
    return moments
