"""Arguments at the public edges: arrays of any kind become tensors, and those of `emcc` are checked."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def as_tensor(name: str, values: Any, device: torch.device | str | None = None) -> torch.Tensor:
    """The argument `name` as a dense tensor: a tensor as it is, or what NumPy reads as real numbers.

    Nested lists, data frames, and reversed, big-endian or read-only arrays are taken. Memory is shared where
    torch can read it. Unsigned integers of more than a byte become int64, long doubles float64.
    Errors: TypeError for other values, and for sparse or meta tensors; ValueError for lists of uneven length
    or numbers beyond int64.
    """
    if isinstance(values, torch.Tensor):
        if values.layout != torch.strided or values.is_meta:
            raise TypeError(f"{name} must be a dense tensor, got {values.layout} on {values.device}")
        return values.to(device)
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of real numbers, got {array.dtype}")
    if array.dtype.kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be numbers of int64, got {array.max()}")
    wide = {"u": "i8" if array.itemsize > 1 else "u1", "f": f"f{min(array.itemsize, 8)}"}
    native = np.dtype(wide.get(array.dtype.kind, array.dtype.newbyteorder("=")))
    flags, steps = array.flags, array.strides
    if not (flags.writeable and flags.aligned and all(s >= 0 and s % array.itemsize == 0 for s in steps)):
        array = array.copy()
    return torch.from_numpy(array.astype(native, copy=False)).to(device)


def same_kind(function: Callable) -> Callable[..., Any]:
    """Let a function of tensors take arrays of any kind; it returns NumPy where no argument is a tensor."""
    signature, plain = inspect.signature(function), int | float | str | np.generic | None

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        tensors = any(isinstance(value, torch.Tensor) for value in bound.arguments.values())
        for name, value in bound.arguments.items():
            if not isinstance(value, plain):
                bound.arguments[name] = as_tensor(name, value)
        result = function(*bound.args, **bound.kwargs)
        if tensors:
            return result
        return tuple(part.numpy() for part in result) if isinstance(result, tuple) else result.numpy()

    return wrapper


def check_codes(cameras: Any, modalities: Any, points: torch.Tensor) -> list[torch.Tensor]:
    """Cameras and modalities of the points as (N,) int64 on their device, zeros for None."""
    checked = []
    for name, codes, largest in (("cameras", cameras, None), ("modalities", modalities, 1)):
        codes = as_tensor(name, torch.zeros(len(points)).long() if codes is None else codes, points.device)
        if codes.is_floating_point() or codes.is_complex():
            raise TypeError(f"{name} must be integers, got {codes.dtype}")
        if codes.shape != (len(points),):
            raise ValueError(
                f"{name} must have one entry a point, ({len(points)},), got {tuple(codes.shape)}"
            )
        checked.append(codes.long())
        if len(codes) and (codes.min() < 0 or (largest is not None and codes.max() > largest)):
            expected = "not be negative" if largest is None else f"lie in 0..{largest}"
            raise ValueError(f"{name} must {expected}, got {int(codes.min())}..{int(codes.max())}")
    return checked


def check_sizes(**sizes: Any) -> None:
    """Integers of at least 1; k3 at least k2, or None."""
    for name, size in sizes.items():
        if name == "k3" and size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
        if name == "k3" and size < sizes["k2"]:
            raise ValueError(
                f"k3 must be at least k2 = {sizes['k2']}, or None for the k2 nearest, got {size}"
            )
