"""Image files to pixels, on every core: one image, or many with what cannot be read told apart."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

HEIC = (".heic", ".heif", ".hif")


@lru_cache(maxsize=1)
def pillow():
    """The modules Image and ImageOps; an ImportError that says what to install."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'ecul[images]'") from error
    with suppress(ImportError):  # what telephones write, where its reader is installed
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image, ImageOps


def read_image(path, size: tuple[int, int]) -> np.ndarray:
    """`Image.open(path).convert("RGB").resize((W, H), LANCZOS)` as a (H, W, 3) uint8 array.

    LANCZOS is what the field's preparation scripts and test loaders use (`Image.ANTIALIAS` there). EXIF
    orientation is applied first. One channel is repeated three times, alpha is dropped; 16- and 32-bit
    images are scaled linearly, their own minimum to 0 and maximum to 255 (a constant one: its high byte).
    Raises ValueError with the path when the file cannot be decoded to its end.
    """
    image_module, operations = pillow()
    try:
        with image_module.open(path) as image:
            image.load()
            upright = operations.exif_transpose(image)
            return resize(_eight_bits(upright), size)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like; the path is what a person needs
        hint = " (HEIC needs: pip install pillow-heif)" if Path(path).suffix.lower() in HEIC else ""
        reason = str(error).replace(f" {os.fspath(path)!r}", "")
        raise ValueError(f"unreadable image {os.fspath(path)!r}: {reason}{hint}") from error


def read_images(paths: Sequence, size: tuple[int, int], progress: bool, what: str) -> Iterator:
    """`read_image` of each path in order, on all cores: an image, or the ValueError that says why not."""

    def read(path):
        try:
            return read_image(path, size)
        except ValueError as error:
            return error

    return in_parallel(read, paths, progress, what)


def unreadable(problems: Sequence[ValueError], count: int, advice: str = "") -> ValueError:
    """The error that names every one of `count` images which cannot be read."""
    listed = "".join(f"\n  {problem}" for problem in problems)
    return ValueError(f"{len(problems)} of {count} images cannot be read{advice}:{listed}")


def read_all(paths: Sequence, size: tuple[int, int], progress: bool, what: str, advice: str = "") -> Iterator:
    """The images in order; when there is one that cannot be read, in the end an error that names them all."""
    problems = []
    for image in read_images(paths, size, progress, what):
        if isinstance(image, ValueError):
            problems.append(image)
        elif not problems:
            yield image
    if problems:
        raise unreadable(problems, len(paths), advice)


def _eight_bits(image):
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image.convert("RGB")
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    scaled = (values - low) * (255 / (high - low)) if high > low else values / 257
    return pillow()[0].fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def resize(image, size: tuple[int, int]) -> np.ndarray:
    """A Pillow image as (H, W, 3) uint8, LANCZOS where the size differs."""
    height, width = size
    resampled = image.resize((width, height), pillow()[0].Resampling.LANCZOS)
    return np.asarray(resampled, dtype=np.uint8)


def in_parallel(function: Callable, items: Sequence | np.ndarray, progress: bool, what: str) -> Iterator:
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
