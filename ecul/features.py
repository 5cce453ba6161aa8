"""From images to unit feature rows."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ecul.augment import normalize
from ecul.common import logs
from ecul.common.names import printable
from ecul.data.decode import SKIP, read_images, unreadable
from ecul.data.images import Images, check_modality

log = logging.getLogger("ecul")
CHUNK = 4096  # image files decoded before they are embedded and forgotten
GRAY, COLOURED = 3.0, 10.0  # mean spread of an image's channels, 0 to 255: at most, at least
LOOKED_AT = 256  # images of a modality


@dataclass(frozen=True)
class FolderFeatures:
    """(N, num_features) float32 unit rows of image files, their paths, and the paths of those skipped.

    model_sha256: the hash of the file of weights that made the rows, where the model was read from one.
    """

    features: torch.Tensor
    paths: list[str]
    modality: str
    unreadable: list[str]
    model_sha256: str | None = None


def extract(
    model: Any, images: Any, modality: str, *, batch_size: int = 256, flip: bool = True, progress: bool = True
) -> torch.Tensor:
    """Embeddings of one modality's images: the re-normalised mean with the mirror image.

        F.normalize(model.embed(x, modality) + model.embed(x.flip(3), modality), dim=1)

    model: anything with `embed(x, modality)`, `input_size` and `num_features`, on any device; it is put back
    into the mode it was in. images: an `Images`, a list of paths, or uint8 images (N, H, W, 3), (N, 3, H, W)
    or (N, H, W), NumPy or torch. flip=False skips the mirror image. Returns (N, num_features) float32 unit
    rows on the CPU. Errors: ValueError for an unknown modality, images of another kind, or files that cannot
    be read, naming them all; TypeError for a path in the place of the model or of the list.
    Source: the test feature of ECUL's and MBCCM's published code.
    """
    check_modality(modality)
    require_model(model)
    if isinstance(images, np.ndarray | torch.Tensor):
        images = Images.from_array(images, modality)
    if isinstance(images, Images):
        pixels = images.load(model.input_size, progress)
        return embed_pixels(model, pixels, modality, batch_size, flip, progress).cpu()
    listed = isinstance(images, Iterable) and not isinstance(images, str)
    paths = list(images) if listed else [None]
    if not all(isinstance(path, str | os.PathLike) for path in paths):
        kinds = "an Images, a list of paths, or one uint8 array or tensor"
        raise TypeError(f"images must be {kinds}, got {type(images).__name__}")
    return extract_files(model, paths, modality, batch_size=batch_size, flip=flip, progress=progress).features


def extract_sides(
    model: Any, images: Sequence[Images], progress: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`extract` of visible and infrared images in one table: rows (N, D), cameras (N,), modalities (N,)."""
    rows = [extract(model, side, side.modality, progress=progress) for side in images]
    cameras = torch.from_numpy(np.concatenate([side.camids for side in images]))
    modalities = torch.cat([torch.full((len(side),), number) for number, side in enumerate(images)])
    return torch.cat(rows), cameras, modalities


def extract_files(
    model: Any,
    paths: Sequence,
    modality: str,
    *,
    skip_unreadable: bool = False,
    batch_size: int = 256,
    flip: bool = True,
    progress: bool = True,
) -> FolderFeatures:
    """`extract` of image files, a chunk at a time: memory is bounded however many there are.

    skip_unreadable: leave out and list files that cannot be read. Otherwise, or where no file can be read,
    a ValueError names them all.
    """
    check_modality(modality)
    require_model(model)
    kept: list[str] = []
    rows = [torch.empty(0, model.num_features, dtype=torch.float32)]
    problems: dict[str, ValueError] = {}
    decoded = read_images(paths, model.input_size, progress, "reading", problems)
    while chunk := list(islice(decoded, CHUNK)):
        if skip_unreadable or not problems:
            pixels = torch.from_numpy(np.stack([image for _, image in chunk])).permute(0, 3, 1, 2)
            if not kept:
                warn_if_other(pixels, modality)
            kept += [path for path, _ in chunk]
            rows.append(embed_pixels(model, pixels, modality, batch_size, flip, progress).cpu())
    if problems and not (skip_unreadable and kept):
        raise unreadable(problems, len(paths), "" if skip_unreadable else SKIP)
    for path in problems:
        log.warning("skipped, cannot be read: %s", printable(path))
    sha256 = getattr(model, "sha256", None)
    return FolderFeatures(torch.cat(rows), kept, modality, list(problems), sha256)


def warn_if_other(pixels: torch.Tensor, modality: str) -> None:
    """Warn where images, uint8 (N, 3, H, W), look like the other modality's: nearly all gray, or coloured."""
    looked = pixels[:: 1 + len(pixels) // LOOKED_AT]
    spread = (looked.amax(1) - looked.amin(1)).float().mean((1, 2))
    odd, kind = (spread <= GRAY, "gray") if modality == "visible" else (spread >= COLOURED, "coloured")
    if 10 * int(odd.sum()) > 9 * len(looked):
        told = (modality, int(odd.sum()), len(looked), kind)
        log.warning("%s: %d of %d images looked at are %s; is the modality right?", *told)


def require_model(model: Any) -> None:
    """A TypeError unless the model can embed: a path, or a backbone without `embed`, cannot."""
    lacking = [name for name in ("embed", "input_size", "num_features") if not hasattr(model, name)]
    if lacking:
        got = repr(model) if isinstance(model, str | os.PathLike) else type(model).__name__
        told = f"got {got} without {', '.join(lacking)}; TwoStreamResNet.from_pretrained loads one"
        raise TypeError(f"model must have embed(x, modality), input_size and num_features, {told}")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """In here the model is in eval mode; afterwards each of its modules is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU or of the machine was too small."""
    full = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return full or "can't allocate memory" in str(error)  # a RuntimeError of torch on a CPU


@torch.no_grad()
def embed_pixels(
    model: Any,
    pixels: torch.Tensor,
    modality: str,
    batch_size: int = 256,
    flip: bool = True,
    progress: bool = False,
    autocast: bool = False,
) -> torch.Tensor:
    """`extract` for a uint8 tensor (N, 3, H, W); the rows stay on the model's device.

    autocast: embed in bf16; otherwise in the model's own precision, whatever the caller's autocast.
    batch_size is halved while a batch does not fit the memory. Errors: ValueError for a batch_size below 1,
    and for features that are not finite; torch's own error when one image does not fit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    rows = torch.empty(len(pixels), model.num_features, dtype=torch.float32, device=device)
    done = 0
    with evaluating(model), logs.progress(len(pixels), f"extract {modality}", "image", progress) as bar:
        while done < len(pixels):
            part = pixels[done : done + batch_size]
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
                    x = normalize(part.to(device)).contiguous(memory_format=torch.channels_last)
                    features = model.embed(x, modality).float()
                    if flip:
                        features = F.normalize(features + model.embed(x.flip(3), modality), dim=1)
                rows[done : done + len(part)] = features
            except (RuntimeError, MemoryError) as error:
                if len(part) == 1 or not out_of_memory(error):
                    raise
                batch_size = len(part) // 2
                continue
            done += len(part)
            bar.update(len(part))
    if wild := int((~rows.isfinite().all(1)).sum()):
        told = f"NaN or infinite features of {wild} of {len(rows)} {modality} images"
        raise ValueError(f"model: {told}; its weights are not finite, or too large for its precision")
    return rows
