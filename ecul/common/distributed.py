"""Helpers for running under torchrun: several processes share one run.

Every process draws the same batches and holds the same memories, and embeds its share of the images. The
features are gathered in a fixed order, so that losses, gradients and updates are those of one process. On
GPUs batch norm is synchronised; on CPUs torch cannot do that, and each process normalises its own share.
"""

import gc
import hashlib
import os
from datetime import timedelta

import torch
from torch import distributed as dist

from ecul.kernels.neighbors import Team


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """This device, by default the GPU if there is one. Errors: ValueError for a GPU that is absent."""
    found = torch.cuda.is_available()
    try:
        device = torch.device(device or ("cuda" if found else "cpu"))
    except RuntimeError as e:
        raise ValueError(f"device: expected cpu, cuda or cuda:0, cuda:1 ..., got {device!r}") from e
    if device.type == "cuda" and not found:
        raise ValueError(f"device: {device} was asked for, but torch finds no CUDA GPU here; use cpu")
    return device


def start(device: torch.device | str | None = None) -> torch.device:
    """Join the process group if torchrun started this process; returns this process's device."""
    device = choose_device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return device


def size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; process 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def _bounds(count: int) -> list[int]:
    return [round(count * r / size()) for r in range(size() + 1)]


def share(count: int) -> slice:
    """This process's slice of `count` rows: contiguous, sizes differing by at most one."""
    return slice(*_bounds(count)[rank() : rank() + 2])


def require_shares(count: int, advice: str) -> None:
    """A ValueError, which ends in `advice`, where `count` rows are too few to give each process one."""
    if size() > count:
        raise ValueError(f"{size()} processes share batches of as few as {count} images a modality: {advice}")


def join(rows: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """All processes' rows, in the order of the processes; gradients flow into one's own rows.

    count: the rows of all `share`s together; without it, each process may give any number of rows.
    """
    if size() == 1:
        return rows
    if count is None:
        counts = torch.cat(_collect(torch.tensor([len(rows)], device=rows.device), [1] * size())).tolist()
    else:
        bounds = _bounds(count)
        counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    parts = _collect(rows.detach(), counts)
    parts[rank()] = rows
    return torch.cat(parts)


def _collect(rows: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """The rows of each process, and their numbers."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def team(together: bool = True) -> Team:
    """The processes that share a work; this one alone if not together."""
    return Team(rank(), size(), join) if together else Team()


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Process 0's tensor, in place, on every process."""
    if size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def require_same(text: str, what: str) -> None:
    """A RuntimeError in each process whose text is not process 0's."""
    device = "cuda" if size() > 1 and dist.get_backend() == "nccl" else "cpu"
    own = torch.tensor(list(hashlib.sha256(text.encode()).digest()), device=device)
    if not torch.equal(broadcast(own.clone()), own):
        raise RuntimeError(f"{what} are not those of process 0; every process must see the same files")


def wait() -> None:
    """Wait until every process has come this far."""
    if size() > 1:
        dist.barrier()


def stop() -> None:
    """Leave the process group together, at the end of a command."""
    if dist.is_initialized():
        dist.barrier()
        gc.collect()  # a wrapped model in a reference cycle would outlive the group and end the process badly
        dist.destroy_process_group()
