"""Argument checks of the kernels: types, shapes, dtypes and devices. Only `check_csr` reads values."""

import numpy as np
import torch
from torch import Tensor

Dtypes = tuple[torch.dtype, ...]
FLOATS: Dtypes = (torch.float32, torch.bfloat16, torch.float16)
LABELS: Dtypes = (torch.int64,)
INTEGERS: Dtypes = (torch.int64, torch.int32)
WEIGHTS: Dtypes = (torch.float32, torch.float64)


def check_tensor(name: str, tensor: object, *shape: int | None, dtypes: Dtypes = FLOATS) -> None:
    """Require a dense tensor of this shape, None for any size, in one of these dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(f"{name} must be a dense tensor with data; got {tensor.layout} on {tensor.device}")
    if tensor.dim() != len(shape):
        raise ValueError(f"{name} must have {len(shape)} dimension(s); got shape {tuple(tensor.shape)}")
    wanted, got = shape[-1], tensor.shape[-1]
    if wanted is not None and wanted != got:
        what = "columns" if len(shape) == 2 else "entries"
        raise ValueError(f"{name} must have {wanted} {what}, as the other arguments; got {got}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {names}; got {str(tensor.dtype).removeprefix('torch.')}")


def check_number(name: str, value: object, integer: bool = False) -> None:
    """Require a Python or NumPy number; a tensor with one element is refused, too."""
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        what = "an integer" if integer else "a number"
        raise TypeError(f"{name} must be {what}; got {type(value).__name__}")


def check_device(device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, as the other tensors are; got {tensor.device}")


def check_csr(indptr: Tensor, indices: Tensor, values: Tensor) -> None:
    """Require a sparse (N, N) matrix in CSR form: offsets (N + 1,), columns (nnz,), values (nnz,).

    Values must not be negative, and each row must sum to 1 at most. SciPy and torch read these arrays without
    checks: with wrong offsets or columns they would read beyond the ends.
    """
    check_tensor("indptr", indptr, None, dtypes=INTEGERS)
    check_tensor("indices", indices, None, dtypes=INTEGERS)
    if len(indptr) == 0:
        raise ValueError("indptr must hold N + 1 offsets, a single 0 for no rows; got none")
    if indptr[0] != 0 or indptr[-1] != len(indices) or (indptr.diff() < 0).any():
        raise ValueError(f"indptr must rise from 0 to the number of entries, {len(indices)}, and never fall")
    if len(indices) == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= len(indptr) - 1:
        raise ValueError(f"indices must lie in 0..{len(indptr) - 2}, the rows; got {low}..{high}")
    check_tensor("values", values, len(indices), dtypes=WEIGHTS)
    most = torch.segment_reduce(values, "sum", offsets=indptr.long()).max()
    if not ((values >= 0).all() and most <= 1.001):
        raise ValueError(f"values must not be negative or NaN and sum to 1 at most in a row; got {most}")
