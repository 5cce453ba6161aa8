"""Files that are whole or absent."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def draft(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends without an error.

    No other process has it, wherever it runs: its name is drawn, and it must not exist yet. An error in
    writing, as on a full disk, names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if e.errno is None or e.filename not in (None, str(temporary)):
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes so that `path` holds either its old content or all of the new."""
    with draft(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as indented JSON."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


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


def hash_file(path: str | os.PathLike) -> str:
    """A file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
