"""Where the pixels of images come from: memory, or files, whose pixels one memory-mapped pack keeps.

A pack is one file `<label>-<H>x<W>-<stamp>.npy`: the (N, H, W, 3) uint8 pixels as `np.load` reads them, then
16 bytes, the hash of all before. The stamp is that of the images' names, sizes and modification times, so a
pack of other images is never found; the file is renamed into place when it is whole.
"""

import hashlib
import io
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path

import numpy as np
import torch

from ecul.common.files import draft
from ecul.data.decode import in_parallel, pillow, read_images, resize, unreadable

log = logging.getLogger("ecul")
Place = str | os.PathLike

VERSION = 2  # of a pack; part of its stamp
HASH = 16  # bytes at a pack's end
ABANDONED = 3600  # seconds without a write after which a draft is nobody's


class Arrays:
    """Pixels in memory: uint8 (N, H, W, 3) or (N, H, W)."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def load(self, rows: np.ndarray, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        """The pixels of these rows as a (n, 3, H, W) uint8 tensor, resized where their size differs."""
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
    """Image files under one root, and the folders where their pack may lie.

    label: the beginning of the pack's name. pack: False reads the files directly; True packs into
    `<root>/.ecul-pack`, or into the user's cache where the root cannot be written; a path is that folder and
    no other. advice: what to do about an image that cannot be read, for the error.
    """

    def __init__(
        self, root: Place, names: Sequence[str], label: str = "", pack: bool | Place = False, advice: str = ""
    ):
        self.root, self.names, self.label, self.advice = Path(root), list(names), label, advice
        key = hashlib.blake2b(os.fsencode(self.root.resolve()), digest_size=8).hexdigest()
        self.folders: list[Path] = []
        if pack is True:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            self.folders = [self.root / ".ecul-pack", Path(home) / "ecul" / key]
        elif pack:  # which data sets may share
            self.folders, self.label = [Path(pack)], f"{label}-{key}"

    def paths(self, rows: np.ndarray | None = None) -> list[Path]:
        """Where the images at `rows` lie, or all of them."""
        return [self.root / self.names[row] for row in (range(len(self.names)) if rows is None else rows)]

    def load(self, rows: np.ndarray, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        """The pixels of these rows as a (n, 3, H, W) uint8 tensor, from the pack where there may be one."""
        pixels = self.packed(size, progress) if self.folders else None
        if pixels is None:
            return _stack(self._read(rows, size, progress, "reading"), len(rows), size)
        whole = len(rows) == len(pixels) and (rows == np.arange(len(rows))).all()
        return torch.from_numpy(pixels if whole else pixels[rows]).permute(0, 3, 1, 2)

    def packed(self, size: tuple[int, int], progress: bool = True) -> np.ndarray | None:
        """The (N, H, W, 3) memory map of all images, written when no pack matches; None: nowhere to write.

        It is private to this process: writing to it changes no file.
        """
        name = self._name(size)
        for folder in self.folders:
            with suppress(OSError, ValueError):
                found = np.lib.format.open_memmap(folder / name, mode="c")
                if found.dtype == np.uint8 and found.shape == (len(self.names), *size, 3):
                    return found
        for folder in self.folders:
            if _can_write(folder):
                told = len(self.names), np.prod((len(self.names), *size, 3)) / 1e6, folder
                log.info("packing %d images, %.1f MB, into %s (once; pack=False reads the files)", *told)
                pixels = self._pack(folder / name, size, progress)
                self.clean({size: name})
                return pixels
        warnings.warn(
            f"no pack: none of {[str(f) for f in self.folders]} can be written; reading images directly "
            "(pass pack=<folder> to pack elsewhere, pack=False to silence this)",
            stacklevel=2,
        )
        return None

    def damaged(self) -> list[Path]:
        """Packs of these files whose bytes do not have the hash at their end."""
        found = []
        for folder in self.folders:
            for path in sorted(folder.glob(f"{escape(self.label)}-*x*.npy")):
                try:
                    content = np.memmap(path, mode="r")
                    stated = content[-HASH:].tobytes()
                    whole = hashlib.blake2b(content[:-HASH].data, digest_size=HASH).digest() == stated
                except (OSError, ValueError):
                    whole = False
                if not whole:
                    found.append(path)
        return found

    def clean(self, current: Mapping[tuple[int, ...], str] | None = None) -> list[Path]:
        """Remove packs that these images no longer match, also of earlier versions, and abandoned drafts.

        current: the names of the packs to keep, by size; only packs of these sizes are looked at. By default
        those that the images match now, of every size. Returns what was removed.
        """
        removed, form = [], re.compile(rf"\.?{re.escape(self.label)}-(\d+)x(\d+)[-.]")
        kept = dict(current or {})
        for folder in self.folders:
            for path in sorted(folder.glob(f"*{escape(self.label)}-*x*")):
                size = tuple(map(int, found.groups())) if (found := form.match(path.name)) else None
                if size is None or (current is not None and size not in current):
                    continue
                if size not in kept:
                    kept[size] = self._name(size)
                with suppress(OSError):  # another process may have it open, or have removed it
                    fresh = path.suffix == ".tmp" and time.time() - path.stat().st_mtime < ABANDONED
                    if path.name != kept[size] and not fresh:
                        path.unlink()
                        removed.append(path)
        return removed

    def _read(
        self, rows: np.ndarray | None, size: tuple[int, int], progress: bool, what: str
    ) -> Iterator[np.ndarray]:
        """The images in order; where some cannot be read, in the end an error that names all of these."""
        paths, problems = self.paths(rows), {}
        for path, image in zip(paths, read_images(paths, size, progress, what), strict=True):
            if isinstance(image, ValueError):
                problems[str(path)] = image
            elif not problems:
                yield image
        if problems:
            raise unreadable(problems, len(paths), self.advice)

    def _pack(self, path: Path, size: tuple[int, int], progress: bool) -> np.ndarray:
        """Write the pack and map it, before another process may remove it."""
        header = io.BytesIO()
        shape = (len(self.names), *size, 3)
        about = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        digest = hashlib.blake2b(header.getvalue(), digest_size=HASH)
        try:
            with draft(path) as file:
                file.write(header.getvalue())
                for image in self._read(None, size, progress, "packing"):
                    digest.update(image.data)
                    file.write(image.data)
                file.write(digest.digest())
                file.flush()
                return np.lib.format.open_memmap(file.name, mode="c")
        except OSError as error:
            raise OSError(f"cannot pack into {str(path)!r}: {error}; pack=False reads directly") from error

    def _name(self, size: tuple[int, ...]) -> str:
        return f"{self.label}-{size[0]}x{size[1]}-{self._stamp(size)}.npy"

    def _stamp(self, size: tuple[int, ...]) -> str:
        """The hash of what the pixels are made from; a ValueError names an image that is missing."""
        sources = []
        for name in self.names:
            try:
                entry = os.stat(self.root / name)
            except OSError as error:
                raise ValueError(f"missing image {str(self.root / name)!r}: {error.strerror}") from error
            sources.append([name, entry.st_size, entry.st_mtime_ns])
        made_of = json.dumps([VERSION, list(size), "lanczos", sources]).encode()
        return hashlib.blake2b(made_of, digest_size=8).hexdigest()


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _stack(images: Iterator[np.ndarray], count: int, size: tuple[int, int]) -> torch.Tensor:
    pixels = np.empty((count, *size, 3), np.uint8)
    for row, image in enumerate(images):
        pixels[row] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
