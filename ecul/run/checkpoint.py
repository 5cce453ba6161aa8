"""A run directory: what is written after each epoch, and how a run goes on from it.

    config.json  log.jsonl  model.safetensors  resume.safetensors  resume.json

Every file is whole or absent. No pickle anywhere. Randomness of an epoch follows from (seed, epoch), so a
run's state is its weights, its optimiser's moments and its history.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ecul.common.files import write_file, write_json, write_tensors
from ecul.common.pretrained import Pretrained
from ecul.config import Config


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
        lock = open(output / ".lock", "w")  # noqa: SIM115 - held for the whole run
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
    tensors.update({f"best.{k}": v for k, v in (state.best or {}).items()})
    for i, values in state.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in values.items()})
    metadata = {"epoch": len(history), "kept": state.kept or 0}
    write_tensors(output / "resume.safetensors", tensors, metadata)


def load_run(output: Path, state: Any, config: Config, data: Mapping) -> None:
    """Put the state of `save_run` back to the last finished epoch.

    The configuration may differ in what comes after that epoch: a run can be lengthened. Errors: ValueError
    naming what differs when the configuration or the data set is another one, or a file that is damaged.
    """
    saved, metadata, tensors = _read_run(output)
    epoch, before = int(metadata["epoch"]), Config.from_dict(saved["config"])
    now, then = {**config.to_dict(), **data}, {**before.to_dict(), **saved["dataset"]}
    past = [{**_past(c, epoch), **d} for c, d in ((before, saved["dataset"]), (config, data))]
    differs = [k for k in {**past[0], **past[1]} if past[0].get(k) != past[1].get(k)]
    if differs:
        listed = "; ".join(f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in differs)
        raise ValueError(f"{output} holds a run that cannot be continued with other settings: {listed}")
    if epoch < config.epochs and int(metadata.get("kept", 0)):
        raise ValueError(
            f"{output} has ended with the weights of its best score, and those of its last epoch are gone: "
            'it cannot go on. With keep="last" a run can be lengthened'
        )
    part = {
        kind: {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}
        for kind in ("model.", "labels.", "best.", "optimizer.")
    }
    state.model.load_state_dict(part["model."])
    found = [part["labels."][k] for k in ("own", "visible", "infrared") if k in part["labels."]]
    state.labels = torch.cat(found) if found else None  # earlier versions wrote them by modality
    state.best = part["best."] or None
    state.history = saved["history"][:epoch]
    state.kept = int(metadata.get("kept", 0)) or None
    moments = _moments(part["optimizer."], state.optimizer)
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})


def _past(config: Config, epochs: int) -> dict[str, Any]:
    """The settings as far as the first epochs depend on them: what comes later may be changed."""
    values = config.to_dict()
    values |= {name: min(values[name], epochs) for name in ("epochs_intra", "tsmem_switch")}
    values["epochs_cross"] = min(config.epochs, epochs) - values["epochs_intra"]
    values["lr_milestones"] = [milestone for milestone in config.lr_milestones if milestone < epochs]
    return values


def _read_run(output: Path) -> tuple[dict, dict[str, str], dict[str, torch.Tensor]]:
    """What resume.json says, and the metadata and tensors of resume.safetensors."""
    try:
        saved = json.loads((output / "resume.json").read_text())
        with safe_open(output / "resume.safetensors", framework="pt") as f:
            metadata = f.metadata()
        if not {"config", "dataset", "history"} <= set(saved) or "epoch" not in metadata:
            raise ValueError("something in them is missing")
        return saved, metadata, load_file(output / "resume.safetensors")
    except (SafetensorError, ValueError, TypeError) as e:
        raise ValueError(f"{output}: resume.json or resume.safetensors is damaged ({e})") from e


def _moments(tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """The optimiser's tensors by parameter, in the parameter's memory format: a fused step relies on it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        i = int(number)
        if value.shape == parameters[i].shape:
            value = torch.empty_like(parameters[i]).copy_(value)
        moments.setdefault(i, {})[name] = value
    return moments
