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

import numpy as np
import torch

from ecul.common.files import write_file, write_json
from ecul.common.names import clipped, shorten
from ecul.common.pretrained import Pretrained
from ecul.common.records import COUNT, Schema, parse_json, read_json, whole_number
from ecul.common.weights import load_weights, read_tensors, require_fit, write_tensors
from ecul.config import FORMER, Config

ROW: Schema = {"epoch": COUNT, "stage": {1, 2}, "score": float, "skipped?": bool, ...: float}
ABOUT: Schema = {
    "config": dict,
    "dataset": {"dataset": str, "visible_images": COUNT, "infrared_images": COUNT, ...: str},
    "history": [ROW],
    "root?": str | None,
    "options?": dict,
}


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

    state: `model`, `optimizer`, `history` (a dict an epoch), `labels` and `best` (dicts of tensors, or None)
    and `kept`, the epochs behind the weights when these are not the last, else None. data: the data set's
    fingerprint. source: where it lies and how it was opened, for `ecul report`.
    """
    model, history = state.model, state.history
    metadata = {"method": config.method, "dataset": data["dataset"], "epoch": state.kept or len(history)}
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
    if (known := getattr(model, "trained_on", None)) is not None:
        tensors["images.trained_on"] = torch.tensor(known.view(np.int64))
    tensors.update({f"best.{k}": v for k, v in (state.best or {}).items()})
    for i, values in state.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in values.items()})
    metadata = {"epoch": len(history), "kept": state.kept or 0, "history": _checksum(history)}
    metadata |= {"best": state.best_epoch or 0}
    write_tensors(output / "resume.safetensors", tensors, metadata)


def load_run(output: Path, state: Any, config: Config, data: Mapping) -> None:
    """Put the state of `save_run` back to the last finished epoch.

    The configuration may differ in what comes after that epoch: a run can be lengthened. Errors: ValueError
    naming what differs when the configuration or the data set is another one, or the file that is damaged.
    """
    about, file = read_about(output), output / "resume.safetensors"
    tensors, metadata = read_tensors(file)
    history, kept, best_epoch = _continued(about["history"], metadata, file)
    epoch, before = len(history), about["config"]
    now, then = {**config.to_dict(), **data}, {**before.to_dict(), **about["dataset"]}
    past = [{**_past(c, epoch), **d} for c, d in ((before, about["dataset"]), (config, data))]
    differs = [k for k in {**past[0], **past[1]} if past[0].get(k) != past[1].get(k)]
    if differs:
        told = [f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in differs]
        listed = shorten(told, len(told), "; ")
        raise ValueError(f"{output} holds a run that cannot be continued with other settings: {listed}")
    if before.update_rule == "tsmem" and "exchanged_stem" not in about["fields"] and epoch < config.epochs:
        raise ValueError(
            f"{output} holds a run of an earlier version, whose TSMem moved the memories in another way: it "
            "cannot be continued; train it anew in another directory"
        )
    if kept and config.keep != "score":
        raise ValueError(f"{file} is damaged: it tells of a best score, and none was to be kept")
    if kept and epoch < config.epochs:
        raise ValueError(
            f"{output} has ended with the weights of its best score, and those of its last epoch are gone: "
            'it cannot go on. With keep="last" a run can be lengthened'
        )
    kinds = ("model.", "labels.", "images.", "best.", "optimizer.")
    part = {
        kind: {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)} for kind in kinds
    }
    labels, best = _labels(part["labels."], data, file), part["best."] if best_epoch else None
    for weights in filter(None, (part["model."], best)):
        require_fit(state.model.state_dict(), weights, file)
    moments = _moments(part["optimizer."], state.optimizer, file)
    load_weights(state.model, part["model."], file)
    if "trained_on" in part["images."]:
        state.model.trained_on = part["images."]["trained_on"].numpy().view(np.uint64)
    state.labels, state.history, state.kept = labels, history, kept
    state.best, state.best_epoch = best, best_epoch
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})


def _past(config: Config, epochs: int) -> dict[str, Any]:
    """The settings as far as the first epochs depend on them: what comes later may be changed."""
    values = config.to_dict()
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
        config = Config.from_dict(FORMER | about["config"])
    except (ValueError, TypeError) as e:
        raise ValueError(f"{file} is damaged: its config is none of this version ({clipped(e)})") from e
    _require_sequence(about["history"], file)
    return {"root": None, "options": {}, **about, "config": config, "fields": about["config"]}


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


def _continued(
    history: list[dict], metadata: Mapping[str, str], file: Path
) -> tuple[list[dict], int | None, int | None]:
    """The rows up to the epoch of resume.safetensors, and the epochs behind the weights that were kept, and
    behind the best so far."""
    epoch, kept, best = (
        whole_number(metadata.get(name, 0), f"{file} is damaged: its {name}")
        for name in ("epoch", "kept", "best")
    )
    if "epoch" not in metadata or epoch > len(history):
        told = f"epoch {epoch}" if "epoch" in metadata else "no epoch"
        raise ValueError(f"{file} is damaged: it tells of {told}, resume.json of {len(history)} epochs")
    if max(kept, best) > epoch:
        told = f"weights of epoch {max(kept, best)} cannot be kept after epoch {epoch}"
        raise ValueError(f"{file} is damaged: {told}")
    history = history[:epoch]
    if metadata.get("history", _checksum(history)) != _checksum(history):
        raise ValueError(
            f"{file.with_name('resume.json')} is damaged: its history is not that of {file.name}"
        )
    return history, kept or None, best or None


def _labels(tensors: Mapping[str, torch.Tensor], data: Mapping, file: Path) -> torch.Tensor | None:
    """The last epoch's labels of all images; earlier versions wrote them by modality."""
    found = [tensors[k] for k in ("own", "visible", "infrared") if k in tensors]
    if not found:
        return None
    count = data["visible_images"] + data["infrared_images"]
    whole = all(part.dtype == torch.int64 and part.ndim == 1 for part in found)
    if not whole or sum(map(len, found)) != count or int(torch.cat(found).amin()) < -1:
        raise ValueError(f"{file} is damaged: its labels are not those of {count} images")
    return torch.cat(found)


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
