"""Where the pixels of images come from: memory, or files, whose pixels one memory-mapped pack keeps.

A pack is one file `<label>-<H>x<W>-<stamp>.npy`: the (N, H, W, 3) uint8 pixels as `np.load` reads them, then
the CRC-32 of each image, to which its pixels are held when they are loaded. The stamp is that of the images'
names, sizes and modification times, so a pack of other images is never found; the file is renamed into place
when it is whole.
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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path

import numpy as np
import torch

from ecul.common.files import draft
from ecul.common.names import printable
from ecul.data.decode import in_parallel, pillow, read_images, resize, unreadable

log = logging.getLogger("ecul")
Place = str | os.PathLike

VERSION = 3  # of a pack; part of its stamp
SUMS = np.dtype("<u4")  # at a pack's end, one an image
ABANDONED = 3600  # seconds without a write after which a draft is nobody's


class Arrays:
    """Pixels in memory: uint8 (N, H, W, 3) or (N, H, W)."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def load(self, rows: np.ndarray, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        """The pixels of these rows as a (n, 3, H, W) uint8 tensor, resized where their size differs.

        Rows that follow one another, in their own size, are a view, not a copy.
        """
        if self.pixels.shape[1:3] == tuple(size):
            chosen = _taken(self.pixels, rows)
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
        pixels = self.packed(size, progress, rows) if self.folders else None
        if pixels is None:
            return _stack(self._read(rows, size, progress, "reading"), len(rows), size)
        return _taken(pixels, rows).permute(0, 3, 1, 2)

    def packed(
        self, size: tuple[int, int], progress: bool = True, rows: np.ndarray | None = None
    ) -> np.ndarray | None:
        """The (N, H, W, 3) memory map of all images, written when no pack matches; None: nowhere to write.

        It is private to this process: writing to it changes no file. rows: the images that are wanted, by
        default all; a pack in which one of these is not as it was written is made again.
        """
        name = self._name(size)
        rows = np.arange(len(self.names)) if rows is None else rows
        for path in (folder / name for folder in self.folders):
            if not os.access(path, os.R_OK):
                continue
            with suppress(OSError):
                if (found := self._whole(path, size, rows, progress)) is not None:
                    return found
                log.warning("the pack %s is damaged: it is made again from the images", printable(path))
        for folder in self.folders:
            if _can_write(folder):
                told = len(self.names), np.prod((len(self.names), *size, 3)) / 1e6, folder
                text = "packing %d images, %.1f MB, into %s (once; pack=False, --option pack=false: none)"
                log.info(text, *told)
                pixels = self._pack(folder / name, size, progress)
                self.clean({size: name})
                return pixels
        warnings.warn(
            f"no pack: none of {[str(f) for f in self.folders]} can be written; reading images directly "
            "(pass pack=<folder> to pack elsewhere, pack=False to silence this)",
            stacklevel=2,
        )
        return None

    def damaged(self, progress: bool = True) -> list[Path]:
        """Packs of these files, as they are now, in which an image is not as it was written."""
        found = []
        for folder in self.folders:
            with suppress(OSError):  # a folder that cannot be read holds no pack that would be used
                for path in sorted(folder.iterdir()):
                    size = re.fullmatch(
                        rf"{re.escape(self.label)}-(\d{{1,5}})x(\d{{1,5}})-[^-]*\.npy", path.name
                    )
                    if size and path.name == self._name(shape := (int(size[1]), int(size[2]))):
                        rows = np.arange(len(self.names))
                        found += [path] if self._whole(path, shape, rows, progress) is None else []
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

    def _whole(
        self, path: Path, size: tuple[int, int], rows: np.ndarray, progress: bool
    ) -> np.ndarray | None:
        """The memory map of a pack where these rows are as they were written, else None."""
        shape = (len(self.names), *size, 3)
        try:
            pixels = np.lib.format.open_memmap(path, mode="c")
        except ValueError:
            return None
        if pixels.dtype != np.uint8 or pixels.shape != shape or not pixels.flags.c_contiguous:
            return None
        end = pixels.offset + pixels.nbytes  # type: ignore[attr-defined]
        sums = np.fromfile(path, SUMS, offset=end)
        if path.stat().st_size != end + SUMS.itemsize * len(self.names):
            return None
        held = in_parallel(lambda row: zlib.crc32(pixels[row].data), rows, progress, "verifying")
        return pixels if all(sums[row] == found for row, found in zip(rows, held, strict=True)) else None

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
        sums = []
        try:
            with draft(path) as file:
                file.write(header.getvalue())
                for image in self._read(None, size, progress, "packing"):
                    sums.append(zlib.crc32(image.data))
                    file.write(image.data)
                file.write(np.array(sums, SUMS).tobytes())
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


def _taken(pixels: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """`pixels[rows]`: a view where the rows follow one another, else a copy."""
    first = int(rows[0]) if len(rows) else 0
    following = np.array_equal(rows, np.arange(first, first + len(rows)))
    with warnings.catch_warnings():  # of an array that cannot be written to, as no pixels are
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(pixels[first : first + len(rows)] if following else pixels[rows])


def _stack(images: Iterator[np.ndarray], count: int, size: tuple[int, int]) -> torch.Tensor:
    pixels = np.empty((count, *size, 3), np.uint8)
    for row, image in enumerate(images):
        pixels[row] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
