"""Triton where it is installed, and the one rule by which a call reaches a kernel or its torch reference.

CUDA tensors go through the Triton kernels, CPU tensors through the reference. Two environment variables, both
read once, when `ecul.kernels` is first imported, change that:

- `ECUL_KERNELS=reference` sends every tensor through the reference: to compare, or to rule a kernel out;
- `TRITON_INTERPRET=1`, Triton's own switch, sends CPU tensors through the kernels too, in Triton's
  interpreter (slow, for tests).

Without Triton installed everything runs on the references.
"""

import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=None)  # a kernel's annotations are all that is evaluated without triton

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
ENABLED = triton is not None and os.environ.get("ECUL_KERNELS") != "reference"


def jit(function):
    """`triton.jit`, or the function itself where there is no Triton to compile it."""
    return function if triton is None else triton.jit(function)


def use_triton(tensor: torch.Tensor) -> bool:
    """True where a call on `tensor` runs the Triton kernels: the only dispatch rule of `ecul.kernels`."""
    return ENABLED and (tensor.is_cuda or INTERPRETED)
