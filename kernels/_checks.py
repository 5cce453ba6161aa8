"""Argument checks shared by the kernels: shapes, dtypes and devices, nothing that reads a tensor's values."""

import torch

Dtypes = tuple[torch.dtype, ...]
FLOATS: Dtypes = (torch.float32, torch.bfloat16, torch.float16)


def check_matrix(
    name: str, tensor: torch.Tensor, columns: int | None = None, dtypes: Dtypes = FLOATS
) -> None:
    """Rows of `columns` features, in one of `dtypes`."""
    _check_tensor(name, tensor, 2, dtypes)
    if columns is not None and tensor.shape[1] != columns:
        raise ValueError(f"{name} must have {columns} columns, as the other rows have; got {tensor.shape[1]}")


def check_vector(
    name: str, tensor: torch.Tensor, length: int | None = None, dtypes: Dtypes = (torch.int64,)
) -> None:
    """One entry for each of `length` rows, in one of `dtypes`."""
    _check_tensor(name, tensor, 1, dtypes)
    if length is not None and tensor.shape[0] != length:
        raise ValueError(f"{name} must have one entry a row, {length}; got {tensor.shape[0]}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """On the same device as the tensors before it."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}: move it there first")


def _check_tensor(name: str, tensor: object, dimensions: int, dtypes: Dtypes) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor; got {type(tensor).__name__}")
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension(s); got shape {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}; got {str(tensor.dtype).removeprefix('torch.')}")
