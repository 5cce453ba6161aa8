"""Files that are whole or absent, and one way to read the files of others.

with reading(path):
    ...                 # any failure in here is ValueError("PATH is damaged: why")
"""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ecul.common.names import clipped


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Every failure in this block is a ValueError that names the file: it is damaged, or cannot be read.

    Errors: FileNotFoundError where there is no such file, as for a folder or a pipe.
    """
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        yield
    except FileNotFoundError:
        raise
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or clipped(e)}") from e
    except Exception as e:  # a damaged file can raise anything
        if str(e).startswith(f"{path} "):
            raise
        why = {KeyError: f"{e} is missing", RecursionError: "it is nested too deeply"}
        why[MemoryError] = "it needs more memory than there is"
        told = clipped(why.get(type(e), str(e) or type(e).__name__))
        raise ValueError(f"{path} is damaged: {told}") from e


def lock(file: int) -> bool | None:
    """Lock an open file or folder until it is closed; file: its descriptor.

    False where another process holds the lock, None where there are no locks.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # on this platform
        return None
    except OSError as e:  # or on this file system
        return False if e.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Errors: those of `reading`."""
    with reading(path):
        return json.loads(Path(path).read_bytes())


@contextmanager
def draft(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file to write. It takes the place of `path` when the block ends without an error.

    Its name is drawn and must not exist yet, so no other process writes it. An error in writing, as on a full
    disk, names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
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
        with suppress(OSError):  # it has moved, or the disk cannot be written
            temporary.unlink()


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes: `path` then holds all of them, or its old content after an error."""
    with draft(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as indented JSON."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def prepare_output(path: str | os.PathLike, *suffixes: str) -> Path:
    """The path of a file to write, checked before any work; its folder is made.

    Errors: ValueError for another suffix, a folder in its place, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}, got {path.name!r}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"the output: cannot write {path}")
    return path


def hash_file(path: str | os.PathLike) -> str:
    """A file's SHA-256 in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
