"""A run directory: what is written after each epoch, and how a run goes on from it.

    config.json  log.jsonl  model.safetensors  resume.safetensors

Every file is whole or absent. No pickle anywhere. Randomness of an epoch follows from (seed, epoch), so a
run's state is its weights, its optimiser's moments and its history. `resume.safetensors` holds all of it and
is written last: it alone says which epoch was finished. The other files are for people and for the commands.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ecul.common.files import lock, reading, write_file, write_json
from ecul.common.names import shorten
from ecul.common.pretrained import Pretrained
from ecul.common.weights import read_tensors, require_fit, write_tensors
from ecul.config import Config
from ecul.run.saved import FILE, parse_run

# Fields that may change on resume; `load_run` has the whole rule.
MAY_CHANGE = ("lr", "lr_gamma", "weights", "precision", "compile", "checkpointing", "batch_extract")


@contextmanager
def run_directory(output: str | os.PathLike | None, hold: bool = True) -> Iterator[Any]:
    """Make the run's directory and lock it, so that no other run uses it; None without output.

    hold: whether this process locks it; one process of a run does.

    Errors, before any work: a directory that cannot be written, is nearly full (under 1 GiB free) or is
    held by another run.
    """
    output = None if output is None else Path(output)
    if output is None or not hold:
        yield output
        return
    held = output / ".lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if held.exists() and not held.is_file():
            raise ValueError(f"output: {held} is no file; remove it, or choose another directory")
        file = open(held, "a")  # noqa: SIM115 - held for the whole run
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


def save_run(output: Path, state: Any, config: Config, data: Mapping, source: Mapping) -> None:
    """Write the state after an epoch; `resume.safetensors` last, since its epoch is the one that counts.

    state: `model`, `optimizer` and `history` (a dict an epoch). data: the data set's fingerprint. source:
    where it lies and how it was opened, for `ecul report`.
    """
    model, history = state.model, state.history
    metadata = {"method": config.method, "dataset": data["dataset"], "epoch": len(history)}
    write_file(output / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
    if isinstance(model, Pretrained):
        model.save_pretrained(output, metadata, config.to_dict())
    else:
        write_tensors(output / "model.safetensors", model.state_dict(), metadata)
        write_json(output / "config.json", config.to_dict())
    tensors = _tensors(model, state.optimizer.state_dict()["state"])
    about = {"config": config.to_dict(), "dataset": {**data, **source}, "model": _settings(model)}
    write_tensors(output / FILE, tensors, {"run": json.dumps({**about, "history": history})})


def load_run(output: Path, state: Any, config: Config, data: Mapping) -> None:
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
    epoch, network = len(run.history), _settings(state.model)
    before = {k: run.dataset.get(k) for k in data}
    then, now = {**run.config.to_dict(), **before}, {**config.to_dict(), **data}
    past = ({**_settled(run.config, epoch), **before}, {**_settled(config, epoch), **data})
    told = [f"{k}: {then[k]!r} then, {now[k]!r} now" for k in past[0] if past[0][k] != past[1][k]]
    if told:
        listed = shorten(told, len(told), "; ")
        raise ValueError(f"{output} holds a run that cannot be continued with other settings: {listed}")
    if run.model != network:
        both = f"{run.model} then, {network} now; give model="
        raise ValueError(f"{output} holds a run of another network: {both}")
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


def _settled(config: Config, epochs: int) -> dict[str, Any]:
    """The settings that must stay once these epochs are finished, with the schedule cut to them."""
    values = {name: value for name, value in config.to_dict().items() if name not in MAY_CHANGE}
    values |= {name: min(values[name], epochs) for name in ("epochs_intra", "tsmem_switch")}
    values["epochs_cross"] = min(config.epochs, epochs) - values["epochs_intra"]
    values["lr_milestones"] = [milestone for milestone in config.lr_milestones if milestone < epochs]
    return values


def _settings(model: torch.nn.Module) -> dict[str, Any]:
    """The network's class and its own settings, as JSON gives them back."""
    return json.loads(json.dumps({"architecture": type(model).__name__, **getattr(model, "settings", {})}))
