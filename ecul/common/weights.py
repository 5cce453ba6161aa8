"""Dicts of tensors in files: safetensors with a checksum, foreign weights without code, and their fit."""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # the name of an error; no file of ours is a pickle
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ecul.common.files import reading, write_file
from ecul.common.names import shorten

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHECKSUM = "checksum"  # in the metadata: the hash of all tensors and of the other metadata


class Content(NamedTuple):
    """What a safetensors file holds, and the SHA-256 of the file, all from one reading."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a dict of tensors as safetensors with a checksum; metadata values become strings.

    Tensors that share storage (tied weights) are written once each, as the format asks.
    """
    copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    # a path may hold bytes that are not UTF-8: they are written as escapes
    about = {k: str(v).encode("utf-8", "backslashreplace").decode() for k, v in (metadata or {}).items()}
    write_file(path, save(copies, {**about, CHECKSUM: _checksum(copies, about)}))


def read_tensors(path: str | os.PathLike) -> Content:
    """The tensors and the metadata of a safetensors file.

    Errors: those of `reading`, also where the content does not have the checksum that it was written with.
    """
    with reading(path), open(path, "rb") as file:
        metadata = _metadata(file)
        file.seek(0)
        data = file.read()
        digest, tensors = hashlib.sha256(data).hexdigest(), load(data)
        if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, metadata):
            raise ValueError("its content has another checksum than the one that was written")
        return Content(tensors, metadata, digest)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Errors: those of `reading`."""
    with reading(path), open(path, "rb") as file:
        return _metadata(file)


def _metadata(file: Any) -> dict[str, str]:
    size = min(int.from_bytes(file.read(8), "little"), 10**8)  # the format's own limit
    return {k: str(v) for k, v in json.loads(file.read(size)).get("__metadata__", {}).items()}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    about = {k: v for k, v in metadata.items() if k != CHECKSUM}
    shapes = {k: [str(tensors[k].dtype), *tensors[k].shape] for k in sorted(tensors)}
    digest = hashlib.blake2b(json.dumps([about, shapes], sort_keys=True).encode(), digest_size=16)
    for name in shapes:
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Ignored:
    """Takes the place of NumPy values and of argparse's options beside the weights: nothing of them is read.

    NumPy's own constructors would trust the file about their memory.
    """

    def __init__(self, *_: Any) -> None:
        pass

    __setstate__ = __init__


MAKERS = ["numpy.ndarray", "numpy.dtype", "argparse.Namespace"]
MAKERS += [f"numpy.{c}.multiarray.{name}" for c in ("core", "_core") for name in ("_reconstruct", "scalar")]
BESIDE: list[Any] = [(_Ignored, maker) for maker in MAKERS]


def read_weights(path: str | os.PathLike) -> dict:
    """The content of a weights file: `.safetensors`, or what `torch.save` wrote, read with weights only.

    Errors: those of `reading`, also for code, for an archive that grows in memory, and for another content
    than a dict.
    """
    if Path(path).suffix == ".safetensors":
        return read_tensors(path).tensors
    with reading(path), open(path, "rb") as file, torch.serialization.safe_globals(BESIDE):
        if zipfile.is_zipfile(file):  # torch.save writes weights as they are, and never packs them
            held = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
            if held > os.fstat(file.fileno()).st_size:
                raise ValueError(f"it grows to {held:,} bytes, and no file of torch.save does")
        file.seek(0)
        try:
            content = torch.load(file, "cpu", weights_only=True)
        except UnpicklingError as e:
            code = re.search(r"GLOBAL ([\w.]*\w) ", str(e))
            told = f"it holds {code[1]}, which is code" if code else "it is no file of weights"
            raise ValueError(told) from e
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, expected a dict of weights")
        return content


def is_weight(name: Any, value: Any) -> bool:
    """Whether it is a named tensor as networks hold them: dense, and whole in the memory of its file."""
    if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter) or value.is_nested:
        return False
    held = value.layout == torch.strided and value.device.type == "cpu"
    return held and value.nbytes <= value.untyped_storage().nbytes()


def require_fit(
    mine: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | os.PathLike, told: str
) -> None:
    """A ValueError unless the tensors that were read from `path` can take the place of these, all finite.

    mine: the names, shapes and kinds that are wanted, on any device ("meta" too). told: what they are, for
    the error, which lists the tensors that are missing, unknown, of another shape or kind, or not finite.
    """
    wrong = [f"missing {k}" for k in sorted(set(mine) - set(state)) if not k.endswith("num_batches_tracked")]
    wrong += [f"unknown {k}" for k in sorted(set(state) - set(mine))]
    for k in sorted(set(mine) & set(state)):
        if state[k].shape != mine[k].shape:
            wrong.append(f"{k} is {tuple(state[k].shape)}, expected {tuple(mine[k].shape)}")
        elif state[k].dtype != mine[k].dtype and not {state[k].dtype, mine[k].dtype} <= set(FLOATS):
            wrong.append(f"{k} is {state[k].dtype}, expected {mine[k].dtype}")
    if wrong:
        listed = shorten(wrong, between="; ")
        raise ValueError(f"{path} does not fit {told}; keys that differ: {len(wrong)}: {listed}")
    wild = [k for k, v in state.items() if v.dtype in FLOATS and not v.float().isfinite().all()]
    if wild:
        raise ValueError(f"{path} is damaged: it holds NaN or infinite numbers: {shorten(wild)}")
