"""The training images in one numbering.

Row i of every (N, ...) table of an epoch - features, labels, cameras, modalities - is training image i;
the visible ones come first, so that `table[:num_visible]` is theirs.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ecul.common import distributed
from ecul.data.dataset import Dataset
from ecul.features import warn_if_other


@dataclass(frozen=True)
class TrainImages:
    """All N training images, visible ones first, decoded once and kept on the device or on the host.

    pixels: visible and infrared uint8 (n, 3, H, W); cameras: (N,) int64; identities: (N,) int64 for the
    monitors, None unless those of both modalities are known.
    """

    pixels: tuple[torch.Tensor, torch.Tensor]
    cameras: torch.Tensor
    identities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.cameras)

    @property
    def num_visible(self) -> int:
        return len(self.pixels[0])

    @property
    def device(self) -> torch.device:
        """The device that trains; the pixels may lie on the host."""
        return self.cameras.device

    @cached_property
    def modalities(self) -> torch.Tensor:
        """(N,) int64: 0 visible, 1 infrared."""
        return (torch.arange(len(self), device=self.cameras.device) >= self.num_visible).long()

    def take(self, rows: torch.Tensor, modality: int) -> torch.Tensor:
        """The pixels of these rows, images of one modality, on the device that trains, without a wait."""
        pixels, device = self.pixels[modality], self.device
        index = rows - modality * self.num_visible
        if pixels.device.type == device.type:
            return pixels[index.to(device, non_blocking=True)]
        stored = pixels.permute(0, 2, 3, 1)  # as a pack stores them
        taken = torch.empty(len(index), *stored.shape[1:], dtype=torch.uint8, pin_memory=True)
        torch.index_select(stored, 0, index, out=taken)
        return taken.to(device, non_blocking=True).permute(0, 3, 1, 2)


def load_images(dataset: Dataset, size: tuple[int, int], device: torch.device) -> TrainImages:
    """Decode both modalities; pixels lie on the device if they fill at most a quarter of its free memory."""
    if distributed.rank() > 0:  # the first process packs the images, the others read its pack
        distributed.wait()
    sides, pixels, problems = [dataset.visible, dataset.infrared], [], []
    for side in sides:
        try:
            pixels.append(side.load(size))
            warn_if_other(pixels[-1], side.modality)
        except ValueError as error:
            problems.append(f"{side.modality}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    if distributed.rank() == 0:
        distributed.wait()
    needed = sum(p.numel() for p in pixels)
    on_device = device.type != "cuda" or needed <= torch.cuda.mem_get_info(device)[0] / 4
    visible, infrared = (p.to(device) if on_device else p for p in pixels)
    cameras = torch.from_numpy(np.concatenate([side.camids for side in sides])).to(device)
    pids = [side.pids for side in sides if side.pids is not None]
    return TrainImages((visible, infrared), cameras, np.concatenate(pids) if len(pids) == 2 else None)
