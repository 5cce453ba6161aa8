"""The images of a report with their features: what its pictures are made of."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ecul import MODALITIES
from ecul.data.decode import read_image
from ecul.data.images import Images
from ecul.data.pack import Arrays
from ecul.features import embed_pixels
from ecul.report import pictures
from ecul.report.pictures import Cell


@dataclass(frozen=True)
class Embedded:
    """Visible and infrared images, pixels uint8 (n, 3, H, W) each, and features (N, D), visible first."""

    images: tuple[Images, Images]
    pixels: tuple[torch.Tensor, torch.Tensor]
    features: torch.Tensor

    def by_modality(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The visible and the infrared part of a tensor over all N images."""
        return rows.split([len(images) for images in self.images])

    def pids(self) -> np.ndarray | None:
        """(N,) identities, None where they are not known."""
        known = [images.pids for images in self.images if images.pids is not None]
        return np.concatenate(known) if len(known) == len(self.images) else None

    def side(self, row: int) -> tuple[Images, int, bool]:
        """The images that a row of N belongs to, its place among them, and whether they are infrared ones."""
        infrared = row >= len(self.images[0])
        return self.images[infrared], row - infrared * len(self.images[0]), infrared

    def thumbnail(self, row: int) -> np.ndarray:
        """The image at a row of N as its file has it, (H, W, 3) uint8 of a sheet's height."""
        images, place, infrared = self.side(row)
        pixels = self.pixels[infrared][place].permute(1, 2, 0).numpy()
        size = (2 * pictures.HEIGHT, max(1, round(2 * pictures.HEIGHT * pixels.shape[1] / pixels.shape[0])))
        if isinstance(images.source, Arrays):
            return images.source.load(images.rows[[place]], size, False)[0].permute(1, 2, 0).numpy()
        try:
            return read_image(images.source.paths(images.rows[[place]])[0], size)
        except ValueError:  # gone since it was packed
            return pixels

    def cell(self, row: int, color: str | None = None, head: str = "", foot: str = "") -> Cell:
        """The image at a row of N with its camera between two lines; by default in its modality's colour."""
        images, place, _ = self.side(row)
        camera = f"camera {images.camids[place]}" if images.camids[place] else ""
        caption = "\n".join(filter(None, (head, camera, foot)))
        return Cell(self.thumbnail(row), caption, color or pictures.MODALITY[images.modality])


def embed(model: Any, images: tuple[Images, Images], progress: bool) -> Embedded:
    """Both modalities' images with their features by this model."""
    visible, infrared = (side.load(model.input_size, progress=progress) for side in images)
    pairs = zip((visible, infrared), MODALITIES, strict=True)
    features = torch.cat([embed_pixels(model, *pair, progress=progress).cpu() for pair in pairs])
    return Embedded(images, (visible, infrared), features)
