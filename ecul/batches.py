"""The training images, decoded once and kept where they are used: on the device, else on the host."""

import hashlib
import logging
import os
from dataclasses import dataclass

import numpy as np
import torch

from ecul import MODALITIES
from ecul.augment import train_view
from ecul.common import distributed

log = logging.getLogger("ecul")


@dataclass(frozen=True)
class Pile:
    """One modality: pixels uint8 (N, 3, H, W), cameras (N,), identities (N,) for monitors or None."""

    pixels: torch.Tensor
    cameras: torch.Tensor
    identities: np.ndarray | None

    def take(self, index, device):
        """The images at this index, a CPU tensor, on the device that trains; the host waits for neither."""
        if self.pixels.device.type == device.type:
            return self.pixels[index.to(device, non_blocking=True)]
        rows = self.pixels.permute(0, 2, 3, 1)  # as a pack stores them
        taken = torch.empty(len(index), *rows.shape[1:], dtype=torch.uint8, pin_memory=True)
        torch.index_select(rows, 0, index, out=taken)
        return taken.to(device, non_blocking=True).permute(0, 3, 1, 2)


def load_piles(dataset, size, device):
    """Both modalities' piles; pixels lie on the device when they fill at most a quarter of free memory."""
    if distributed.rank() > 0:  # the first process packs the images, the others read its pack
        distributed.wait()
    pixels, problems = {}, []
    for m in MODALITIES:
        try:
            pixels[m] = getattr(dataset, m).load(size)
        except ValueError as error:
            problems.append(f"{m}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    if distributed.rank() == 0:
        distributed.wait()
    needed = sum(p.numel() for p in pixels.values())
    on_device = device.type != "cuda" or needed <= torch.cuda.mem_get_info(device)[0] / 4
    log.info(
        "%.1f MB of images are kept %s",
        needed / 1e6,
        f"on {device}" if on_device else "on the host, each batch goes through pinned memory",
    )
    piles = {}
    for m in MODALITIES:
        images = getattr(dataset, m)
        kept = pixels[m].to(device) if on_device else pixels[m]
        piles[m] = Pile(kept, torch.as_tensor(images.camids, device=device), images.pids)
    return piles


def identity(dataset):
    """What makes this the same data set again: its name, numbers of images, a hash of names and cameras."""
    digest = hashlib.sha256()
    for m in MODALITIES:
        images = getattr(dataset, m)
        digest.update(os.fsencode("\n".join(images.names)) + images.camids.tobytes())
    counts = {f"{m}_images": len(getattr(dataset, m)) for m in MODALITIES}
    return {"dataset": dataset.name, **counts, "names_and_cameras": digest.hexdigest()[:16]}


def augmented(piles, index, config, generator, device):
    """A batch's views by modality: visible view 1 then view 2 (channel exchange), and infrared."""
    taken = {m: piles[m].take(index[m], device) for m in MODALITIES}
    visible = [
        train_view(taken["visible"], "visible", config.pad, generator, config.linear_transform),
        train_view(taken["visible"], "exchanged", config.pad, generator),
    ]
    views = {
        "visible": torch.cat(visible),
        "infrared": train_view(taken["infrared"], "infrared", config.pad, generator),
    }
    return {m: v.contiguous(memory_format=torch.channels_last) for m, v in views.items()}
