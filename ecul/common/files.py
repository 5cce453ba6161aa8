"""Files that are whole or absent, weights read without code, and numbers read with a range."""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # the name of an error, no file of ours is a pickle
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file, save

from ecul.common.names import shorten

DIGITS = 18  # of a number that a file may hold: identities, cameras, images; all such are int64


@contextmanager
def draft(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends without an error.

    No other process has it, wherever it runs: its name is drawn, and it must not exist yet.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes so that `path` holds either its old content or all of the new."""
    with draft(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as indented JSON."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a dict of tensors as safetensors; metadata values become strings. Equal content, equal bytes.

    Tensors that share storage (tied weights) are written once each, as the format asks.
    """
    copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    data = save(copies, {k: str(v) for k, v in (metadata or {}).items()})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()  # the library's order is arbitrary
    header += b" " * (-len(header) % 8)
    write_file(path, len(header).to_bytes(8, "little") + header + data[end:])


def prepare_output(path: str | os.PathLike, *suffixes: str) -> Path:
    """The file that will be written, in a folder that is there; before any work is spent on it.

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


def read_weights(path: str | os.PathLike) -> dict:
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


def require_tensors(state: Mapping, path: str | os.PathLike) -> None:
    """A ValueError naming what in this dict of weights is no tensor."""
    other = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if other:
        raise ValueError(f"{path}: {shorten(other)} are no tensors; expected a state dict")


def hash_file(path: str | os.PathLike, digest: Any) -> str:
    """A file's hash in hex; digest: a new object of hashlib."""
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def whole_number(value: Any, where: str) -> int:
    """The number that a file states in at most `DIGITS` decimal digits.

    Errors: ValueError that begins with `where`: the file, and the place in it, of what is no such number.
    """
    text = str(value).strip()
    if text.isascii() and text.isdecimal() and len(text.lstrip("0")) <= DIGITS:
        return int(text)
    shown = repr(text) if len(text) <= 40 else f"{text[:40]!r}... of {len(text):,} characters"
    raise ValueError(f"{where} should be a whole number of at most {DIGITS} digits, not {shown}")
