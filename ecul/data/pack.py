"""Pixels of a pile of images: decoded in parallel, resized once, kept in one memory-mapped file.

A pack is `<label>-<H>x<W>-<stamp>.uint8`, the raw (N, H, W, 3) bytes, beside `<label>-<H>x<W>.json`, its
manifest: sources with sizes and modification times, the stamp made of them, and the hash of the bytes.
The manifest is written last, and both are renamed into place, so that a half pack is never found.
"""

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import numpy as np
import torch

from ecul.common.files import hash_file, write_file
from ecul.data.decode import in_parallel, pillow, read_all, resize

_VERSION = 1


class Arrays:
    """Pixels that are already in memory: uint8 (N, H, W, 3) or (N, H, W)."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def load(self, rows: np.ndarray, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        if self.pixels.shape[1:3] == tuple(size):
            chosen = torch.from_numpy(self.pixels[rows])
            chosen = chosen if chosen.ndim == 4 else chosen[..., None].expand(-1, -1, -1, 3)
            return chosen.permute(0, 3, 1, 2)
        from_array = pillow()[0].fromarray
        resized = in_parallel(
            lambda row: resize(from_array(self.pixels[row]).convert("RGB"), size), rows, progress, "resizing"
        )
        return _stack(resized, len(rows), size)


class Files:
    """Image files under one root; `label` names their pack, `folder` says where packs lie, `advice` what to
    do about an image that cannot be read.

    folder: None reads directly; True is `<root>/.ecul-pack`, or the user's cache where the root cannot be
    written; a path is that folder and no other.
    """

    def __init__(self, root, names: Sequence[str], label: str, folder=None, advice: str = ""):
        self.root, self.names, self.label, self.advice = Path(root), list(names), label, advice
        key = hashlib.blake2b(os.fsencode(self.root.resolve()), digest_size=8).hexdigest()
        if folder is True:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            self.folders = [self.root / ".ecul-pack", Path(home) / "ecul" / key]
        elif folder:  # which data sets may share
            self.folders, self.label = [Path(folder)], f"{label}-{key}"
        else:
            self.folders = []

    def paths(self, rows=None) -> list[Path]:
        """Where the images at `rows` lie, or all of them."""
        return [self.root / self.names[row] for row in (range(len(self.names)) if rows is None else rows)]

    def load(self, rows: np.ndarray, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        packed = self.packed(size, progress) if self.folders else None
        if packed is None:
            decoded = read_all(self.paths(rows), size, progress, "reading", self.advice)
            return _stack(decoded, len(rows), size)
        whole = len(rows) == len(packed) and (rows == np.arange(len(rows))).all()
        return torch.from_numpy(packed if whole else packed[rows]).permute(0, 3, 1, 2)

    def packed(self, size: tuple[int, int], progress: bool = True) -> np.ndarray | None:
        """The (N, H, W, 3) memory map of all names, written when no pack matches; None: nowhere to write."""
        sources = self._sources()
        stamp = _digest([_VERSION, list(size), "lanczos", sources])
        for folder in self.folders:
            pack = _Pack(folder, self.label, size, stamp, len(self.names))
            if pack.matches():
                return pack.open()
        for folder in self.folders:
            pack = _Pack(folder, self.label, size, stamp, len(self.names))
            if _can_write(folder):
                pack.write(read_all(self.paths(), size, progress, "packing", self.advice), sources)
                return pack.open()
        warnings.warn(
            f"no pack: none of {[str(f) for f in self.folders]} can be written; reading images directly "
            "(pass pack=<folder> to pack elsewhere, pack=False to silence this)",
            stacklevel=2,
        )
        return None

    def damaged(self) -> list[Path]:
        """Packs of these files whose bytes do not have the hash that their manifest states, or manifests."""
        found = []
        for folder in self.folders:
            for path in sorted(folder.glob(f"{escape(self.label)}-*x*.json")):
                try:
                    manifest = json.loads(path.read_text(encoding="utf-8"))
                    data = folder / f"{path.stem}-{manifest['stamp']}.uint8"
                    if hash_file(data, _hash()) != manifest["hash"]:
                        found.append(data)
                except (OSError, ValueError, KeyError, TypeError):
                    found.append(path)
        return found

    def _sources(self) -> list:
        def stat(name):
            try:
                entry = os.stat(self.root / name)
            except OSError as error:
                raise ValueError(f"missing image {str(self.root / name)!r}: {error.strerror}") from error
            return [name, entry.st_size, entry.st_mtime_ns]

        return [stat(name) for name in self.names]


@dataclass(frozen=True)
class _Pack:
    """One pack of `count` images: its two files in `folder`."""

    folder: Path
    label: str
    size: tuple[int, int]
    stamp: str
    count: int

    @property
    def manifest(self) -> Path:
        return self.folder / f"{self.label}-{self.size[0]}x{self.size[1]}.json"

    @property
    def data(self) -> Path:
        return self.folder / f"{self.manifest.stem}-{self.stamp}.uint8"

    def matches(self) -> bool:
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            whole = self.data.stat().st_size == self.count * self.size[0] * self.size[1] * 3
        except (OSError, ValueError):
            return False
        return whole and isinstance(manifest, dict) and manifest.get("stamp") == self.stamp

    def open(self) -> np.ndarray:
        return np.memmap(self.data, np.uint8, "c", shape=(self.count, *self.size, 3))

    def write(self, pixels: Iterator[np.ndarray], sources: list) -> None:
        """Bytes first, then the manifest that names them, then older packs of this name are removed."""
        digest = _hash()
        draft = self.data.with_name(f"{self.data.name}.part{os.getpid()}")
        try:
            with open(draft, "wb") as handle:
                for image in pixels:
                    digest.update(image)
                    handle.write(image.data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(draft, self.data)
        except OSError as error:
            raise OSError(f"cannot pack into {str(draft)!r}: {error}; pack=False reads directly") from error
        finally:
            draft.unlink(missing_ok=True)
        manifest = {
            "version": _VERSION,
            "size": self.size,
            "filter": "lanczos",
            "stamp": self.stamp,
            "hash": digest.hexdigest(),
            "sources": sources,
        }
        write_file(self.manifest, json.dumps(manifest).encode())
        for old in self.folder.glob(f"{escape(self.manifest.stem)}-*.uint8*"):
            abandoned = ".part" in old.name and time.time() - old.stat().st_mtime > 3600
            if abandoned or (old.suffix == ".uint8" and old != self.data):
                with suppress(OSError):  # another process may have it open
                    old.unlink()


def _hash():
    return hashlib.blake2b(digest_size=16)


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _stack(images: Iterator[np.ndarray], count: int, size: tuple[int, int]) -> torch.Tensor:
    pixels = np.empty((count, *size, 3), np.uint8)
    for row, image in enumerate(images):
        pixels[row] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
