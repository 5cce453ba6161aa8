"""Compile what a launcher launches, for a GPU that is not there.

A stand-in for Triton's driver names the target, and `JITFunction.run` compiles without launching. So the
kernels are compiled from the very arguments, constants and options that the library's own launchers pass.
"""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SM80, SM90 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)
GFX942 = GPUTarget("hip", "gfx942", 64)


@contextmanager
def compiling(target):
    """Inside, a launch compiles for `target` and does nothing else; yields the list of (name, kernel)."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    stand_in = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: str(target),
        get_current_stream=lambda device: 0,
    )
    previous = driver._active
    driver.set_active(stand_in)
    try:
        hip = "7" if target.backend == "hip" else None
        with patch.object(JITFunction, "run", compile_only), patch.object(torch.version, "hip", hip):
            yield compiled
    finally:
        driver._active = previous


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def assembler_messages(kernel) -> str:
    """What ptxas says of a kernel compiled for compute capability 9.0."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", Path(folder) / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def resources(kernel) -> dict[str, int]:
    """What a kernel compiled for CUDA takes, as its binary says; a spilled register lies on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", binary.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"([A-Z]+):(\d+)", report))
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": kernel.metadata.shared,
    }
