"""Files that are whole or absent: written under a temporary name, flushed, then renamed."""

import json
import os
import re
from pathlib import Path
from pickle import UnpicklingError  # the name of an error, no file of ours is a pickle

import torch
from safetensors.torch import load_file, save

from ecul.common.names import shorten


def read_weights(path):
    """The content of a weights file: `.safetensors`, or what `torch.save` wrote, read with weights only.

    Errors: FileNotFoundError; ValueError naming the file when it cannot be read that way or holds no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        safe = path.suffix == ".safetensors"
        content = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as e:  # a damaged file can raise anything
        code = re.search(r"GLOBAL ([\w.]*\w) ", str(e)) if isinstance(e, UnpicklingError) else None
        reason = f"it holds {code[1]}, which is code" if code else "it is damaged, or no file of weights"
        raise ValueError(f"{path} cannot be read as weights alone: {reason}") from e
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds {type(content).__name__}, expected a dict of weights")
    return content


def require_tensors(state, path):
    """A ValueError naming what in this dict of weights is no tensor."""
    other = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if other:
        raise ValueError(f"{path}: {shorten(other)} are no tensors; expected a state dict")


def prepare_output(path, *suffixes):
    """The file that will be written, as a `Path` in a folder that is there; before any work is spent on it.

    Errors: ValueError for another suffix, a folder in its place, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}, got {path.name!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"the output: cannot make the folder {path.parent} ({e.strerror})") from e
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"the output: cannot write {path}")
    return path


def hash_file(path, digest):
    """A file's hash in hex; digest: a new object of hashlib."""
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def write_file(path, data):
    """Write bytes so that `path` holds either its old content or all of the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as indented JSON."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path, tensors, metadata=None):
    """Write a dict of tensors as safetensors; metadata values become strings. Equal content, equal bytes.

    Tensors that share storage (tied weights) are written once each, as the format asks.
    """
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    data = save(tensors, {k: str(v) for k, v in (metadata or {}).items()})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()  # the library's order is arbitrary
    header += b" " * (-len(header) % 8)
    write_file(path, len(header).to_bytes(8, "little") + header + data[end:])
