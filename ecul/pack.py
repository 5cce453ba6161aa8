"""Pixels of a pile of images: decoded in parallel, resized once, kept in one memory-mapped file.

A pack is `<label>-<H>x<W>-<stamp>.uint8`, the raw (N, H, W, 3) bytes, beside `<label>-<H>x<W>.json`, its
manifest: sources with sizes and modification times, the stamp made of them, and the hash of the bytes.
The manifest is written last, and both are renamed into place, so that a half pack is never found.
"""

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

_VERSION = 1


def _pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'ecul[images]'") from error
    return Image, ImageOps


def read_image(path, size: tuple[int, int]) -> np.ndarray:
    """`Image.open(path).convert("RGB").resize((W, H), LANCZOS)` as a (H, W, 3) uint8 array.

    LANCZOS is what the field's preparation scripts and test loaders use (`Image.ANTIALIAS` there). EXIF
    orientation is applied first. One channel is repeated three times, alpha is dropped; 16- and 32-bit
    images are scaled linearly, their own minimum to 0 and maximum to 255 (a constant one: its high byte).
    Raises ValueError with the path when the file cannot be decoded to its end.
    """
    image_module, operations = _pillow()
    try:
        with image_module.open(path) as image:
            image.load()
            upright = operations.exif_transpose(image)
            return resize(_eight_bits(upright), size)
    except Exception as error:  # decoders raise whatever they like; the path is what a person needs
        raise ValueError(f"unreadable image {os.fspath(path)!r}: {error}") from error


def _eight_bits(image):
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image.convert("RGB")
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    scaled = (values - low) * (255 / (high - low)) if high > low else values / 257
    return _pillow()[0].fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def resize(image, size: tuple[int, int]) -> np.ndarray:
    """A Pillow image as (H, W, 3) uint8, LANCZOS where the size differs."""
    height, width = size
    resampled = image.resize((width, height), _pillow()[0].Resampling.LANCZOS)
    return np.asarray(resampled, dtype=np.uint8)


def in_parallel(function: Callable, items: Sequence, progress: bool, what: str) -> Iterator:
    """`map(function, items)` in order on a thread a core, a bounded number of results ahead."""
    threads = os.cpu_count() or 1
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool, _bar(len(items), progress, what) as bar:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 16 * threads:
                    yield waiting.popleft().result()
                    bar.update()
            while waiting:
                yield waiting.popleft().result()
                bar.update()
        finally:
            for future in waiting:
                future.cancel()


def _bar(total, progress, what):
    return tqdm(total=total, desc=what, unit="image", disable=None if progress else True, leave=False)


class Arrays:
    """Pixels that are already in memory: uint8 (N, H, W, 3) or (N, H, W)."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def load(self, rows: np.ndarray, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        if self.pixels.shape[1:3] == tuple(size):
            chosen = torch.from_numpy(self.pixels[rows])
            chosen = chosen if chosen.ndim == 4 else chosen[..., None].expand(-1, -1, -1, 3)
            return chosen.permute(0, 3, 1, 2)
        from_array = _pillow()[0].fromarray
        resized = in_parallel(
            lambda row: resize(from_array(self.pixels[row]).convert("RGB"), size), rows, progress, "resizing"
        )
        return _stack(resized, len(rows), size)


class Files:
    """Image files under one root; `label` names their pack, `folder` says where packs lie.

    folder: None reads directly; True is `<root>/.ecul-pack`, or the user's cache where the root cannot be
    written; a path is that folder and no other.
    """

    def __init__(self, root, names: Sequence[str], label: str, folder=None):
        self.root, self.names, self.label = Path(root), list(names), label
        if folder is True:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            key = hashlib.blake2b(str(self.root.resolve()).encode(), digest_size=8).hexdigest()
            self.folders = [self.root / ".ecul-pack", Path(home) / "ecul" / key]
        else:
            self.folders = [] if not folder else [Path(folder)]

    def paths(self, rows) -> list[Path]:
        return [self.root / self.names[row] for row in rows]

    def load(self, rows: np.ndarray, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        packed = self.packed(size, progress) if self.folders else None
        if packed is None:
            decoded = in_parallel(lambda path: read_image(path, size), self.paths(rows), progress, "reading")
            return _stack(decoded, len(rows), size)
        whole = len(rows) == len(packed) and (rows == np.arange(len(rows))).all()
        return torch.from_numpy(packed if whole else packed[rows]).permute(0, 3, 1, 2)

    def packed(self, size: tuple[int, int], progress: bool = True) -> np.ndarray | None:
        """The (N, H, W, 3) memory map of all names, written when no pack matches; None: nowhere to write."""
        sources = self._sources()
        stamp = _digest([_VERSION, list(size), "lanczos", sources])
        shape = (len(self.names), *size, 3)
        for folder in self.folders:
            if (data := self._find(folder, size, stamp)) is not None:
                return np.memmap(data, np.uint8, "c", shape=shape)
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                draft = self._data(folder, size, stamp).with_suffix(f".part{os.getpid()}")
                handle = open(draft, "wb")  # noqa: SIM115 (closed by the with below)
            except OSError:
                continue
            with handle:
                self._write(handle, draft, folder, size, stamp, sources, progress)
            return np.memmap(self._data(folder, size, stamp), np.uint8, "c", shape=shape)
        warnings.warn(
            f"no pack: none of {[str(f) for f in self.folders]} can be written; reading images directly "
            "(pass pack=<folder> to pack elsewhere, pack=False to silence this)",
            stacklevel=2,
        )
        return None

    def _sources(self) -> list:
        def stat(name):
            try:
                entry = os.stat(self.root / name)
            except OSError as error:
                raise ValueError(f"missing image {str(self.root / name)!r}: {error.strerror}") from error
            return [name, entry.st_size, entry.st_mtime_ns]

        return [stat(name) for name in self.names]

    def _data(self, folder: Path, size, stamp: str) -> Path:
        return folder / f"{self.label}-{size[0]}x{size[1]}-{stamp}.uint8"

    def _manifest(self, folder: Path, size) -> Path:
        return folder / f"{self.label}-{size[0]}x{size[1]}.json"

    def _find(self, folder: Path, size, stamp: str) -> Path | None:
        data = self._data(folder, size, stamp)
        try:
            manifest = json.loads(self._manifest(folder, size).read_text(encoding="utf-8"))
            whole = data.stat().st_size == len(self.names) * size[0] * size[1] * 3
        except (OSError, ValueError):
            return None
        return data if whole and isinstance(manifest, dict) and manifest.get("stamp") == stamp else None

    def _write(self, handle, draft: Path, folder: Path, size, stamp: str, sources, progress) -> None:
        digest = hashlib.blake2b(digest_size=16)
        paths = self.paths(range(len(self.names)))
        try:
            for pixels in in_parallel(lambda path: read_image(path, size), paths, progress, "packing"):
                digest.update(pixels)
                handle.write(pixels)
            _settle(handle, draft, self._data(folder, size, stamp))
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        manifest = {
            "version": _VERSION,
            "size": list(size),
            "filter": "lanczos",
            "stamp": stamp,
            "hash": digest.hexdigest(),
            "sources": sources,
        }
        target = self._manifest(folder, size)
        draft = target.with_suffix(f".part{os.getpid()}")
        with open(draft, "w", encoding="utf-8") as text:
            json.dump(manifest, text)
            _settle(text, draft, target)
        for old in folder.glob(f"{target.stem}-*.uint8"):
            if old != self._data(folder, size, stamp):
                old.unlink(missing_ok=True)


def _settle(handle, draft: Path, target: Path) -> None:
    handle.flush()
    os.fsync(handle.fileno())
    os.replace(draft, target)


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _stack(images: Iterator[np.ndarray], count: int, size: tuple[int, int]) -> torch.Tensor:
    pixels = np.empty((count, *size, 3), np.uint8)
    for row, image in enumerate(images):
        pixels[row] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
