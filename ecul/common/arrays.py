"""Arrays of any kind at the public edges: one function makes tensors of them."""

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
    Errors: TypeError for other values, and for sparse or meta tensors; ValueError for lists of uneven length.
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
