"""The source of pixels: memory, or image files, decoded once into one memory-mapped pack.

A pack is one file `<label>-<H>x<W>-<stamp>.npy`, as `np.load` reads it: (N, H, W, 3) uint8 pixels. The stamp
is a hash of the images' names, sizes and modification times: a pack of other images is never used.
"""

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path

import numpy as np
import torch

from ecul.common.files import draft
from ecul.data.decode import in_parallel, pillow, read_images, resize, unreadable

log = logging.getLogger("ecul")
Place = str | os.PathLike
Size = tuple[int, int]


class Arrays:
    """Pixels in memory: uint8 (N, H, W, 3) or (N, H, W)."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def load(self, rows: np.ndarray, size: Size, progress: bool = True) -> torch.Tensor:
        """The pixels of these rows as a (n, 3, H, W) uint8 tensor, resized where their size differs.

        Rows that follow one another, in their own size, are a view, not a copy.
        """

        def resized(row: int) -> np.ndarray:
            return resize(pillow().fromarray(self.pixels[row]).convert("RGB"), size)

        if self.pixels.shape[1:3] != tuple(size):
            return _stack(in_parallel(resized, rows, progress, "resizing"), len(rows), size)
        first = int(rows[0]) if len(rows) else 0
        following = np.array_equal(rows, np.arange(first, first + len(rows)))
        with warnings.catch_warnings():  # pixels may be read-only; nothing here writes to them
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            taken = torch.from_numpy(
                self.pixels[first : first + len(rows)] if following else self.pixels[rows]
            )
        return (taken if taken.ndim == 4 else taken[..., None].expand(-1, -1, -1, 3)).permute(0, 3, 1, 2)


class Files:
    """Image files under one root, and the folder of their pack.

    label: the beginning of the pack's name. pack: True packs into `<root>/.ecul-pack`, a path into that
    folder, False not at all. advice: the end of the error about images that cannot be read.
    """

    def __init__(
        self, root: Place, names: Sequence[str], label: str = "", pack: bool | Place = False, advice: str = ""
    ):
        self.root, self.names, self.label, self.advice = Path(root), list(names), label, advice
        self.folder = self.root / ".ecul-pack" if pack is True else Path(pack) if pack else None
        if self.folder and pack is not True:  # data sets may share it
            key = hashlib.blake2b(os.fsencode(self.root.resolve()), digest_size=8).hexdigest()
            self.label = f"{label}-{key}"

    def paths(self, rows: np.ndarray | None = None) -> list[Path]:
        """Where the images at `rows` lie, or all of them."""
        return [self.root / self.names[row] for row in (range(len(self.names)) if rows is None else rows)]

    def load(self, rows: np.ndarray, size: Size, progress: bool = True) -> torch.Tensor:
        """The pixels of these rows as a (n, 3, H, W) uint8 tensor, from a pack or directly."""
        pixels = self._packed(self.folder, size, progress) if self.folder else None
        if pixels is None:
            return _stack(self._read(rows, size, progress, "reading"), len(rows), size)
        return Arrays(pixels).load(rows, size)

    def _packed(self, folder: Path, size: Size, progress: bool) -> np.ndarray | None:
        """The (N, H, W, 3) memory map of all images, packed where no pack matches; None: read directly.

        It is private to this process: writing to it changes no file.
        """
        shape, kind = (len(self.names), *size, 3), f"{self.label}-{size[0]}x{size[1]}-"
        path = folder / f"{kind}{self._stamp(size)}.npy"
        if (pixels := _mapped(path, shape)) is not None:
            return pixels
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with draft(path) as file:  # not written through a map: a full disk would kill the process
                text = "packing %d images, %.1f MB, into %s (once; pack=False, --option pack=false: none)"
                log.info(text, len(self.names), np.prod(shape) / 1e6, folder)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for image in self._read(np.arange(len(self.names)), size, progress, "packing"):
                    file.write(image.data)
        except OSError as error:
            told = "reading images directly; pack=<folder> packs elsewhere, pack=False silences this"
            why = error.strerror or error  # without the pack's name: one warning a folder
            warnings.warn(f"cannot pack into {str(folder)!r}: {why}; {told}", stacklevel=2)
            return None
        others = [*folder.glob(f"{escape(kind)}*")]  # of images that have changed since
        killed, hour = folder.glob(f".{'[0-9a-f]' * 16}.tmp"), time.time() - 3600
        for other in (*others, *killed):  # a draft without a write for an hour has no writer any more
            with suppress(OSError):  # another process may have it open, or have removed it
                if other != path and (other in others or other.stat().st_mtime < hour):
                    other.unlink()
        return _mapped(path, shape)  # None where another process removed it

    def _read(self, rows: np.ndarray, size: Size, progress: bool, what: str) -> Iterator:
        """The images in order. If some cannot be read, one error at the end names all of them."""
        problems: dict[str, ValueError] = {}
        for _, image in read_images(self.paths(rows), size, progress, what, problems):
            if not problems:
                yield image
        if problems:
            raise unreadable(problems, len(rows), self.advice)

    def _stamp(self, size: Size) -> str:
        """The hash of the files' names, sizes and times. Errors: FileNotFoundError with a missing image."""
        entries = zip(self.names, map(os.stat, self.paths()), strict=True)
        sources = [[name, entry.st_size, entry.st_mtime_ns] for name, entry in entries]
        made_of = json.dumps([list(size), "lanczos", sources]).encode()
        return hashlib.blake2b(made_of, digest_size=8).hexdigest()


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The memory map of a whole pack, else None."""
    with suppress(OSError, ValueError):
        pixels = np.lib.format.open_memmap(path, mode="c")
        if (pixels.dtype, pixels.shape) == (np.uint8, shape) and pixels.flags.c_contiguous:
            return pixels
    return None


def _stack(images: Iterator[np.ndarray], count: int, size: Size) -> torch.Tensor:
    pixels = np.empty((count, *size, 3), np.uint8)
    for row, image in enumerate(images):
        pixels[row] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
