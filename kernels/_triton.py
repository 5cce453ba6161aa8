"""Triton if it is installed, and the rule that sends a call to a kernel or to its torch reference.

CUDA tensors go to the Triton kernels, CPU tensors to the reference. Two environment variables change
this. Both are read once, when `ecul.kernels` is imported:

- `ECUL_KERNELS=reference` sends every tensor through the reference, to compare or to exclude a kernel;
- `TRITON_INTERPRET=1`, Triton's own switch, sends CPU tensors through the kernels in Triton's interpreter
  (slow, for tests).

Without Triton, or with a version before 3.4, everything runs on the references.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor  # since Triton 3.4
except ImportError:
    triton = TensorDescriptor = None
    tl = SimpleNamespace(constexpr=None)  # Python evaluates the annotations of the kernels

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
REFERENCE = os.environ.get("ECUL_KERNELS") == "reference"
ENABLED = triton is not None and not REFERENCE
MIXED = torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()  # since torch 2.8


def jit(function: Callable) -> Any:
    """`triton.jit`, or the function itself without Triton."""
    return function if triton is None else triton.jit(function)


def use_triton(tensor: Tensor) -> bool:
    """Whether a call on `tensor` runs the Triton kernels: the only dispatch rule of `ecul.kernels`."""
    return ENABLED and (tensor.is_cuda or INTERPRETED)


def has_tma() -> bool:
    """Whether kernels load tiles by descriptors. These are slow on hardware without TMA."""
    if INTERPRETED:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def rows_contiguous(matrix: Tensor) -> Tensor:
    """`matrix`, copied only if the entries of a row are not contiguous."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def same_rows(x: Tensor, y: Tensor) -> bool:
    """Whether x and y are one matrix in memory."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` summed and returned in float32."""
    if a.dtype != torch.float32 and a.is_cuda and MIXED:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
