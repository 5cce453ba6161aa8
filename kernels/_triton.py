"""Triton where it is installed, and the one rule by which a call reaches a kernel or its torch reference.

CUDA tensors go through the Triton kernels, CPU tensors through the reference. Two environment variables, both
read once, when `ecul.kernels` is first imported, change that:

- `ECUL_KERNELS=reference` sends every tensor through the reference: to compare, or to rule a kernel out;
- `TRITON_INTERPRET=1`, Triton's own switch, sends CPU tensors through the kernels too, in Triton's
  interpreter (slow, for tests).

Without Triton installed, or with one older than 3.4, everything runs on the references.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor  # since Triton 3.4
except ImportError:
    triton = TensorDescriptor = None
    tl = SimpleNamespace(constexpr=None)  # a kernel's annotations are all that is evaluated without triton

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
REFERENCE = os.environ.get("ECUL_KERNELS") == "reference"
ENABLED = triton is not None and not REFERENCE


def jit(function: Callable) -> Any:
    """`triton.jit`, or the function itself where there is no Triton to compile it."""
    return function if triton is None else triton.jit(function)


def use_triton(tensor: torch.Tensor) -> bool:
    """True where a call on `tensor` runs the Triton kernels: the only dispatch rule of `ecul.kernels`."""
    return ENABLED and (tensor.is_cuda or INTERPRETED)


def has_tma() -> bool:
    """Whether kernels are to load tiles by descriptors: where the hardware has none, they are slow."""
    if INTERPRETED:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


class Launch(NamedTuple):
    """One fixed way to launch a kernel: block sizes, warps, pipeline stages.

    `shared` states the bytes of shared memory that a program takes at most, and no register is ever spilled:
    the tests hold the compiler to both, for compute capabilities 8.0 and 9.0.
    """

    blocks: dict[str, Any]
    warps: int
    stages: int
    shared: int

    def start(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Start `kernel` over `grid`, on the stream and device of its tensors; `constants` may be options."""
        stages = min(self.stages, 2) if torch.version.hip else self.stages
        kernel[grid](*args, **constants, **self.blocks, num_warps=self.warps, num_stages=stages)


def rows_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix`, copied only if the entries of a row do not lie side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
