"""Ordered images of one modality, and where their pixels come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ecul import MODALITIES
from ecul.common.arrays import as_tensor
from ecul.data.pack import Arrays, Files

Pixels = ArrayLike | torch.Tensor
Column = ArrayLike | None  # one integer for each image


def as_numpy(name: str, values: Any) -> np.ndarray:
    """The argument `name` as an array of real numbers; errors are those of `as_tensor`."""
    values = as_tensor(name, values).detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def check_modality(modality: Any) -> None:
    """Errors: ValueError for another value than "visible" and "infrared"."""
    if modality not in MODALITIES:
        raise ValueError(f'modality must be "visible" or "infrared", got {modality!r}')


class Images:
    """N ordered images of one modality.

    modality: "visible" or "infrared". names: list of str, relative to the root where there is one. source and
    rows: where the pixels come from, and the row of each image there, by default all in order. camids: (N,)
    int64, 1-based as in the files, zeros where unknown. pids: (N,) int64 identities, or None. A negative pid
    marks a distractor: it stays in galleries, but never queries and never matches. Errors: ValueError for a
    column of another length or beyond int64; TypeError for a column that is not a row of integers.
    """

    def __init__(
        self, modality: str, names: Sequence[str], source: Files | Arrays,
        camids: Column = None, pids: Column = None, rows: Column = None,
    ):  # fmt: skip
        check_modality(modality)
        self.modality, self.names, self.source = modality, list(names), source
        count = len(self.names)
        self.camids = self._column("camids", np.zeros(count, np.int64) if camids is None else camids)
        self.pids = None if pids is None else self._column("pids", pids)
        self.rows = self._column("rows", np.arange(count) if rows is None else rows)

    def _column(self, name: str, values: ArrayLike) -> np.ndarray:
        values = as_numpy(name, values)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise TypeError(f"{name}: expected a row of integers, not {values.dtype} of shape {values.shape}")
        if len(values) != len(self):
            raise ValueError(f"{name}: {len(values)} for {len(self)} {self.modality} images")
        return values.astype(np.int64)

    @classmethod
    def from_array(cls, pixels: Pixels, modality: str, camids: Column = None, pids: Column = None) -> Images:
        """Images in memory: uint8 (N, H, W, 3), (N, 3, H, W) or (N, H, W), NumPy or torch."""
        pixels = as_numpy(modality, pixels) if isinstance(pixels, torch.Tensor) else np.asarray(pixels)
        if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
            pixels = pixels.transpose(0, 2, 3, 1)
        gray = pixels.ndim == 3 and pixels.shape[2] != 3  # one colour image has 3 there
        if pixels.dtype != np.uint8 or not (gray or pixels.ndim == 4 and pixels.shape[3] == 3):
            raise ValueError(
                f"{modality}: expected uint8 images, N x H x W x 3 or N x H x W, "
                f"not {pixels.dtype} {' x '.join(map(str, pixels.shape))}"
            )
        if min(pixels.strides) < 0:  # BGR turned to RGB by [..., ::-1], which torch cannot hold
            pixels = pixels.copy()
        names = [f"{modality}/{row:06d}" for row in range(len(pixels))]
        return cls(modality, names, Arrays(pixels), camids, pids)

    @classmethod
    def from_paths(
        cls, paths: Sequence[str | os.PathLike], modality: str, camids: Column = None, pids: Column = None
    ) -> Images:
        """Images in files, read directly."""
        names = [str(path) for path in paths]
        return cls(modality, names, Files(".", names), camids, pids)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Images({len(self)} {self.modality}, cameras {np.unique(self.camids).tolist()})"

    def identities(self) -> np.ndarray:
        """pids; ValueError where they are unknown."""
        if self.pids is None:
            raise ValueError(
                f"these {self.modality} images have no identities (pids), which evaluation needs"
            )
        return self.pids

    def people(self) -> np.ndarray:
        """The identities, each once, ascending, without distractors."""
        return np.unique(self.identities()[self.identities() >= 0])

    def subset(self, index: ArrayLike | slice) -> Images:
        """The images at `index` (integers, a slice or a boolean mask), in that order."""
        if not isinstance(index, slice):
            index = np.asarray(index)
            index = index if index.size else index.astype(np.int64)  # an empty list makes an array of floats
        rows = np.arange(len(self))[index]
        names = [self.names[row] for row in rows]
        pids = None if self.pids is None else self.pids[rows]
        return Images(self.modality, names, self.source, self.camids[rows], pids, self.rows[rows])

    def load(self, size: tuple[int, int], progress: bool = True) -> torch.Tensor:
        """All pixels as a (N, 3, H, W) uint8 tensor, resized to size = (H, W) with LANCZOS as published.

        The tensor may be a view of a memory map or of the array that was given: do not write to it.
        FileNotFoundError names a missing image, ValueError all that cannot be decoded.
        """
        height, width = size
        return self.source.load(self.rows, (height, width), progress)
