"""One ordered pile of images of one modality."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ecul import MODALITIES
from ecul.data.pack import Arrays, Files


def check_modality(modality):
    """A ValueError unless it is one of the two."""
    if modality not in MODALITIES:
        raise ValueError(f'modality must be "visible" or "infrared", got {modality!r}')


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """One ordered pile of one modality.

    modality: "visible" or "infrared". names: list of str, relative to the root where there is one.
    camids: (N,) int64, 1-based as in the files, zeros where unknown. pids: (N,) int64, or None.
    source and rows: where the pixels come from, and which of its rows these images are.
    """

    modality: str
    names: list[str]
    camids: np.ndarray
    pids: np.ndarray | None
    source: Files | Arrays
    rows: np.ndarray

    def __post_init__(self):
        check_modality(self.modality)
        for name, values in (("camids", self.camids), ("pids", self.pids), ("rows", self.rows)):
            if values is not None and len(values) != len(self.names):
                raise ValueError(f"{name}: {len(values)} for {len(self.names)} {self.modality} images")

    @classmethod
    def from_array(cls, pixels, modality: str, camids=None, pids=None) -> "Images":
        """Images in memory: uint8 (N, H, W, 3), (N, 3, H, W) or (N, H, W), NumPy or torch."""
        pixels = pixels.detach().cpu().numpy() if isinstance(pixels, torch.Tensor) else np.asarray(pixels)
        if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
            pixels = pixels.transpose(0, 2, 3, 1)
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (3, 4)
            or (pixels.ndim == 4 and pixels.shape[3] != 3)
        ):
            raise ValueError(
                f"{modality}: expected uint8 images, N x H x W x 3 or N x H x W, "
                f"not {pixels.dtype} {' x '.join(map(str, pixels.shape))}"
            )
        if pixels.ndim == 3 and pixels.shape[2] == 3:
            raise ValueError(
                f"{modality}: got one image of {pixels.shape}; for a pile of one give images[None]"
            )
        names = [f"{modality}/{row:06d}" for row in range(len(pixels))]
        return cls._of(modality, names, camids, pids, Arrays(pixels))

    @classmethod
    def from_paths(cls, paths: Sequence, modality: str, camids=None, pids=None) -> "Images":
        """Images in files, read directly."""
        names = [str(path) for path in paths]
        return cls._of(modality, names, camids, pids, Files(".", names, modality))

    @classmethod
    def _of(cls, modality, names, camids, pids, source) -> "Images":
        camids = np.zeros(len(names), np.int64) if camids is None else _integers("camids", camids)
        pids = None if pids is None else _integers("pids", pids)
        return cls(modality, names, camids, pids, source, np.arange(len(names)))

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        cameras = sorted({int(camid) for camid in self.camids})
        return f"Images({len(self)} {self.modality}, cameras {cameras})"

    def identities(self) -> np.ndarray:
        """pids, or ValueError where nobody gave any."""
        if self.pids is None:
            raise ValueError(
                f"these {self.modality} images have no identities (pids), which evaluation needs"
            )
        return self.pids

    def subset(self, index) -> "Images":
        """The images at `index` (integers, a slice or a boolean mask), in that order."""
        rows = np.arange(len(self))[np.asarray(index) if not isinstance(index, slice) else index]
        return Images(
            self.modality,
            [self.names[row] for row in rows],
            self.camids[rows],
            None if self.pids is None else self.pids[rows],
            self.source,
            self.rows[rows],
        )

    def load(self, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        """All pixels as a (N, 3, H, W) uint8 tensor, resized to size = (H, W) with LANCZOS as published.

        It may be a permuted view of an (N, H, W, 3) memory map: pages are read when touched. ValueError
        names an image that is missing, or all that cannot be decoded.
        """
        height, width = size
        return self.source.load(self.rows, (height, width), progress)


def _integers(name: str, values) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError(f"{name}: expected a row of integers, not {values.dtype} of shape {values.shape}")
    return values.astype(np.int64)
