"""Dicts of tensors in files: safetensors with a checksum, foreign weights without code, what fits a network.

A file that `write_tensors` wrote has in its metadata the hash of all else in it, so that one flipped bit is
an error where it is read.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # the name of an error, no file of ours is a pickle
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ecul.common.files import draft
from ecul.common.names import clipped, shorten

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHECKSUM = "checksum"


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a dict of tensors as safetensors; metadata values become strings. Equal content, equal bytes.

    Tensors that share storage (tied weights) are written once each, as the format asks.
    """
    copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    data = save(copies, {k: str(v) for k, v in (metadata or {}).items()})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    digest = _digest(header)
    digest.update(memoryview(data)[end:])
    header.setdefault("__metadata__", {})[CHECKSUM] = digest.hexdigest()
    written = _dump(header)
    written += b" " * (-len(written) % 8)
    with draft(path) as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.write(memoryview(data)[end:])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Errors: FileNotFoundError; ValueError naming the file when it is none, or is not as it was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        told = clipped(e)
        raise ValueError(f"{path} cannot be read as weights: damaged, or no safetensors ({told})") from e
    if CHECKSUM in metadata and metadata[CHECKSUM] != _digest_file(path):
        raise ValueError(f"{path} is damaged: its content has another checksum than what was written")
    return tensors, metadata


def read_weights(path: str | os.PathLike) -> dict:
    """The content of a weights file: `.safetensors`, or what `torch.save` wrote, read with weights only.

    Errors: FileNotFoundError; ValueError naming the file when it cannot be read that way, would grow in
    memory, or holds no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        _refuse_packed(path)
        content = torch.load(path, "cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as e:  # a damaged file can raise anything
        code = re.search(r"GLOBAL ([\w.]*\w) ", str(e)) if isinstance(e, UnpicklingError) else None
        reason = f"it holds {code[1]}, which is code" if code else "it is damaged, or no file of weights"
        reason = str(e) if isinstance(e, _Packed) else reason
        raise ValueError(f"{path} cannot be read as weights alone: {reason}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a dict of weights")
    return content


def require_tensors(state: Mapping, path: str | os.PathLike) -> None:
    """A ValueError unless this is a dict of weights: names, each with a tensor that the file holds whole."""
    if not state:
        raise ValueError(f"{path} holds no weights")
    names = [k if isinstance(k, str) else f"a {type(k).__name__}" for k in state]
    other = [name for name, v in zip(names, state.values(), strict=True) if not _is_plain(v)]
    other += [name for name, k in zip(names, state, strict=True) if not isinstance(k, str)]
    if other:
        raise ValueError(f"{path}: {shorten(other)} are no tensors; expected a state dict")
    claimed = [name for name, v in state.items() if v.nbytes > v.untyped_storage().nbytes()]
    if claimed:
        raise ValueError(f"{path}: {shorten(claimed)} claim to be larger than what the file holds of them")


def require_fit(
    mine: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    path: str | os.PathLike,
    told: str = "this network",
    own: tuple[str, ...] = (),
) -> None:
    """A ValueError unless the tensors that were read from `path` can take the place of these, all finite.

    mine: whose names, shapes and kinds are wanted; they may be on the device "meta". told: what they are, for
    the error, which lists what is missing, unknown, of another shape or kind, or not finite. own: beginnings
    of names that need not be in the file.
    """
    wanted = {k for k in mine if not k.startswith(own)} if own else set(mine)
    wrong = [f"missing {k}" for k in sorted(wanted - set(state)) if not k.endswith("num_batches_tracked")]
    wrong += [f"unknown {k}" for k in sorted(set(state) - wanted)]
    for k in sorted(wanted & set(state)):
        if state[k].shape != mine[k].shape:
            wrong.append(f"{k} is {tuple(state[k].shape)}, expected {tuple(mine[k].shape)}")
        elif state[k].dtype != mine[k].dtype and not {state[k].dtype, mine[k].dtype} <= set(FLOATS):
            wrong.append(f"{k} is {state[k].dtype}, expected {mine[k].dtype}")
    if wrong:
        listed = shorten(wrong, between="; ")
        raise ValueError(f"{path} does not fit {told}; keys that differ: {len(wrong)}: {listed}")
    wild = [k for k, v in state.items() if v.dtype in FLOATS and not v.float().isfinite().all()]
    if wild:
        raise ValueError(f"{path} holds NaN or infinite numbers, of which nothing can come: {shorten(wild)}")


def load_weights(
    network: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike, *told: Any
) -> None:
    """Give a network these weights, read from `path`. Errors: those of `require_fit`, which has `told`."""
    mine = network.state_dict()
    require_fit(mine, state, path, *told)
    network.load_state_dict({**mine, **state})


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor as networks hold them: dense, with memory of its own."""
    kinds = (Tensor, nn.Parameter)
    return (
        type(value) in kinds
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
    )


class _Packed(Exception):
    pass


def _refuse_packed(path: Path) -> None:
    """An error for an archive that holds more than its own size, as `torch.save` never writes it."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        held = sum(entry.file_size for entry in archive.infolist())
    if held > path.stat().st_size:
        raise _Packed(f"it grows to {held:,} bytes, and torch.save writes weights as they are")


def _dump(header: Mapping) -> bytes:
    return json.dumps(header, sort_keys=True).encode()  # the library's order is arbitrary


def _digest(header: Mapping) -> Any:
    """The hash of a header without its checksum, to go on with the tensors' bytes."""
    about = {k: v for k, v in header.get("__metadata__", {}).items() if k != CHECKSUM}
    return hashlib.blake2b(_dump({**header, "__metadata__": about}), digest_size=16)


def _digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        digest = _digest(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
