"""Image files to pixels: one image, or many on every core."""

import os
import re
import stat
from collections import deque
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
SKIP = "; skip_unreadable=True (--skip-unreadable) leaves such images out"  # where an error may advise it
MOST_PIXELS = 2**26  # of an image: a small file may claim any number of pixels
CLIPPED = 200  # one in so many pixels of a deep image is clipped at each end, and always one
TURNS = (  # from EXIF orientation 2 to 8, the way to turn an image upright
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90",
)  # fmt: skip


@lru_cache(maxsize=1)
def pillow() -> ModuleType:
    """The module PIL.Image; an ImportError that says what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'ecul[images]'") from error
    with suppress(ImportError):  # many phones write HEIC
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image


def load_pixels(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """The pixels that the network gets: `Image.open(path).convert("RGB").resize((W, H), LANCZOS)`.

    size: (H, W). Returns (H, W, 3) uint8; `pixels.transpose(2, 0, 1)[None].astype("float32")` is what an
    exported model takes. EXIF orientation is applied, one channel is repeated three times, alpha is dropped.
    An image of one channel with 16 or 32 bits is scaled linearly to 0..255 by its own range. The range
    leaves out the 0.5 % of the pixels that are lowest and highest, at least one each: a dead or hot pixel.
    Colours with more than 8 bits a channel are refused.
    LANCZOS is what the field's preparation scripts and test loaders use (`Image.ANTIALIAS` there).
    Raises ValueError with the path when it is no regular file, cannot be decoded to its end, has more than
    2**26 pixels or some that are not finite.
    """
    opened = pillow().open
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise ValueError("it is no regular file")
        with opened(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            return resize(_upright(_eight_bits(image).convert("RGB"), image), size)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything; people need the path
        hint = " (HEIC needs: pip install pillow-heif)" if Path(path).suffix.lower() in HEIC else ""
        reason = str(error).replace(f" {os.fspath(path)!r}", "")
        raise ValueError(f"unreadable image {os.fspath(path)!r}: {reason}{hint}") from error


read_image = load_pixels  # an earlier name, which scripts of others import


def resize(image: Any, size: tuple[int, int]) -> np.ndarray:
    """A Pillow image as (H, W, 3) uint8, LANCZOS where the size differs."""
    height, width = size
    return np.asarray(image.resize((width, height), pillow().Resampling.LANCZOS), dtype=np.uint8)


def _upright(pixels: Any, image: Any) -> Any:
    """The pixels turned as the EXIF orientation of `image` says; other or broken metadata does not matter."""
    with suppress(Exception):
        orientation = int(image.getexif().get(0x0112, 1))
        if 2 <= orientation <= 8 and image.format != "TIFF":  # which Pillow turns itself
            return pixels.transpose(getattr(pillow().Transpose, TURNS[orientation - 2]))
    return pixels


def _eight_bits(image: Any) -> Any:
    """The image with 8 bits a channel. Errors: ValueError for deeper colours: Pillow keeps a byte of each."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return pillow().fromarray(_scaled(np.asarray(image, dtype=np.float64)))
    decoder, _, _, coded = image.tile[0][:4] if image.tile else ("", (), 0, "")  # how it will be decoded
    bits = getattr(image, "tag_v2", {}).get(258, 8)  # of TIFF, for each channel
    portable = decoder.startswith("ppm") and isinstance(coded, tuple) and coded[1] > 255  # its largest value
    if portable or np.max(bits) > 8 or re.search(";16[BLN]", str(coded)):
        raise ValueError("it has more than 8 bits a channel; save it with one channel, or with 8 bits")
    return image


def _scaled(values: np.ndarray) -> np.ndarray:
    """uint8 of finite values: their range, without a few at its ends, becomes 0 to 255."""
    if not np.isfinite(values).all():
        raise ValueError("its pixels are not finite")
    ordered = np.sort(values, axis=None)
    cut = min(1 + len(ordered) // CLIPPED, (len(ordered) - 1) // 2)
    low, high = ordered[cut], ordered[-1 - cut]
    if low == high:
        low, high = ordered[0], ordered[-1]
    scaled = (values - low) * (255 / (high - low)) if high > low else values / 257  # constant: its high byte
    return scaled.round().clip(0, 255).astype(np.uint8)


def in_parallel(function: Callable, items: Sequence | np.ndarray, progress: bool, what: str) -> Iterator:
    """`map(function, items)` in order on a thread a core, a bounded number of results ahead."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool, logs.progress(len(items), what, "image", progress) as bar:
        for start in range(0, len(items), 32 * threads):
            for result in pool.map(function, items[start : start + 32 * threads]):
                yield result
                bar.update()


def read_images(
    paths: Sequence, size: tuple[int, int], progress: bool, what: str, problems: dict[str, ValueError]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each path, in order, with its pixels, on all cores; the errors of the others go into `problems`."""

    def read(path: str | os.PathLike) -> np.ndarray | ValueError:
        try:
            return load_pixels(path, size)
        except ValueError as error:
            return error

    for path, image in zip(map(str, paths), in_parallel(read, paths, progress, what), strict=True):
        if isinstance(image, ValueError):
            problems[path] = image
        else:
            yield path, image


def find_unreadable(paths: Sequence, progress: bool = True) -> dict[str, ValueError]:
    """The error of each image that cannot be decoded to its end, by path."""
    problems: dict[str, ValueError] = {}
    deque(read_images(paths, (8, 4), progress, "decoding", problems), maxlen=0)
    return problems


def unreadable(problems: Mapping[str, ValueError], count: int, advice: str = "") -> ValueError:
    """The error that names every image, of `count`, that cannot be read."""
    listed = "".join(f"\n  {problem}" for problem in problems.values())
    return ValueError(f"{len(problems)} of {count} images cannot be read{advice}:{listed}")
