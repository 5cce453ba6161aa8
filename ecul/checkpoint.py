"""A run directory: what is written after each epoch, and how a run goes on from it.

    config.json  log.jsonl  model.safetensors  resume.safetensors  resume.json

Every file is whole or absent. No pickle anywhere. Randomness of an epoch follows from (seed, epoch), so a
run's state is its weights, its optimiser's moments and its history.
"""

import errno
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .files import write_file, write_json, write_tensors


@contextmanager
def run_directory(output):
    """Make the run's directory and hold it alone; None when there is no output.

    Errors, before any work: a directory that cannot be written, is nearly full (under 1 GiB free) or is
    held by another run.
    """
    if output is None:
        yield None
        return
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115 - held for the whole run
    except OSError as e:
        raise ValueError(f"output: cannot write to {output} ({e.strerror}); choose another directory") from e
    with lock:
        _lock(lock, output)
        if shutil.disk_usage(output).free < 2**30:
            raise ValueError(
                f"output: less than 1 GiB is free on the disk of {output}; free some or choose another"
            )
        yield output


def _lock(file, output):
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise ValueError(
            f"output: {output} is in use by another run; choose another directory or wait"
        ) from e


def save_run(output, model, optimizer, config, history, identity, metadata):
    """Write the state after an epoch; `resume.safetensors` last, since its epoch is the one that counts."""
    write_json(output / "config.json", {**config.to_dict(), "model": getattr(model, "settings", {})})
    write_file(output / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(output, metadata)
    else:
        write_tensors(output / "model.safetensors", model.state_dict(), metadata)
    write_json(output / "resume.json", {"config": config.to_dict(), "dataset": identity, "history": history})
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in values.items()})
    write_tensors(output / "resume.safetensors", tensors, {"epoch": len(history)})


def load_run(output, model, optimizer, config, identity):
    """Put model and optimiser back to the last finished epoch; returns the history, empty if there is none.

    Errors: ValueError naming what differs when the configuration or the data set is another one.
    """
    tensors_file, json_file = output / "resume.safetensors", output / "resume.json"
    if not tensors_file.exists():
        return []
    saved = json.loads(json_file.read_text())
    now = {**config.to_dict(), **identity}
    then = {**saved["config"], **saved["dataset"]}
    differs = [
        f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in {**then, **now} if then.get(k) != now.get(k)
    ]
    if differs:
        raise ValueError(
            f"{output} holds a run that cannot be continued with this one's settings: {'; '.join(differs)}"
        )
    with safe_open(tensors_file, framework="pt") as f:
        epoch = int(f.metadata()["epoch"])
    tensors = load_file(tensors_file)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            i, name = int(key.split(".")[1]), key.split(".")[2]
            if (
                value.shape == parameters[i].shape
            ):  # in the parameter's memory format, which a fused step relies on
                value = torch.empty_like(parameters[i]).copy_(value)
            moments.setdefault(i, {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return saved["history"][:epoch]
