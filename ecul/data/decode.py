"""Image files to pixels: one image, or many on every core."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ecul.common import logs

HEIC = (".heic", ".heif", ".hif")
SKIP = "; skip_unreadable=True (--skip-unreadable) leaves such images out"  # advice where it may be said
MOST_PIXELS = 2**26  # of an image; a small file may claim any number, and is decoded to all of them


@lru_cache(maxsize=1)
def pillow() -> tuple[ModuleType, ModuleType]:
    """The modules Image and ImageOps; an ImportError that says what to install."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'ecul[images]'") from error
    with suppress(ImportError):  # what telephones write, where its reader is installed
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image, ImageOps


def read_image(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """`Image.open(path).convert("RGB").resize((W, H), LANCZOS)` as a (H, W, 3) uint8 array.

    LANCZOS is what the field's preparation scripts and test loaders use (`Image.ANTIALIAS` there). EXIF
    orientation is applied first. One channel is repeated three times, alpha is dropped; 16- and 32-bit
    images are scaled linearly, their own minimum to 0 and maximum to 255 (a constant one: its high byte).
    Raises ValueError with the path when it is no regular file, cannot be decoded to its end, has more than
    2**26 pixels or some that are not finite.
    """
    image_module, operations = pillow()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ValueError("it is no regular file")
        with image_module.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            image.load()
            return resize(_eight_bits(operations.exif_transpose(image)), size)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like; the path is what a person needs
        hint = " (HEIC needs: pip install pillow-heif)" if Path(path).suffix.lower() in HEIC else ""
        reason = str(error).replace(f" {os.fspath(path)!r}", "")
        raise ValueError(f"unreadable image {os.fspath(path)!r}: {reason}{hint}") from error


def resize(image: Any, size: tuple[int, int]) -> np.ndarray:
    """A Pillow image as (H, W, 3) uint8, LANCZOS where the size differs."""
    height, width = size
    resampled = image.resize((width, height), pillow()[0].Resampling.LANCZOS)
    return np.asarray(resampled, dtype=np.uint8)


def _eight_bits(image: Any) -> Any:
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image.convert("RGB")
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("its pixels are not finite")
    scaled = (values - low) * (255 / (high - low)) if high > low else values / 257
    return pillow()[0].fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def in_parallel(function: Callable, items: Sequence | np.ndarray, progress: bool, what: str) -> Iterator:
    """`map(function, items)` in order on a thread a core, a bounded number of results ahead."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool, logs.progress(len(items), what, "image", progress) as bar:
        for start in range(0, len(items), 32 * threads):
            for result in pool.map(function, items[start : start + 32 * threads]):
                yield result
                bar.update()


def read_images(paths: Sequence, size: tuple[int, int], progress: bool, what: str) -> Iterator:
    """`read_image` of each path in order, on all cores: an image, or the ValueError that says why not."""

    def read(path: str | os.PathLike) -> np.ndarray | ValueError:
        try:
            return read_image(path, size)
        except ValueError as error:
            return error

    return in_parallel(read, paths, progress, what)


def find_unreadable(paths: Sequence, progress: bool = True) -> dict[str, ValueError]:
    """The error of each image that cannot be decoded to its end, by path."""
    decoded = zip(paths, read_images(paths, (8, 4), progress, "decoding"), strict=True)
    return {str(path): image for path, image in decoded if isinstance(image, ValueError)}


def unreadable(problems: Mapping[str, ValueError], count: int, advice: str = "") -> ValueError:
    """The error that names every one of `count` images which cannot be read, from `find_unreadable`'s."""
    listed = "".join(f"\n  {problem}" for problem in problems.values())
    return ValueError(f"{len(problems)} of {count} images cannot be read{advice}:{listed}")
