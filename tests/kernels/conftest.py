"""Two ways to run these tests: `pytest tests/kernels` tests the references and compiles every kernel ahead of
time, `TRITON_INTERPRET=1 pytest tests/kernels` sends the same CPU tensors through the kernels.

In the interpreter programs take turns, and each operation is slow: worlds are smaller there, and so are
the blocks that they must exceed (`few`).
"""

import numpy as np
import pytest
import torch

from ecul.kernels import _triton

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")  # log(0)


def pytest_collection_modifyitems(items):
    for item in items:
        if "interpreted" in item.keywords and not _triton.INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="runs the kernels: set TRITON_INTERPRET=1"))
        if "host" in item.keywords and _triton.INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="no kernel's: tested without TRITON_INTERPRET"))
        if "compiled" in item.keywords and (_triton.INTERPRETED or _triton.triton is None):
            item.add_marker(pytest.mark.skip(reason="compiles: needs Triton, without TRITON_INTERPRET"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def few():
    """few(a, b): a rows where the kernels are interpreted, b elsewhere."""
    return lambda interpreted, otherwise: interpreted if _triton.INTERPRETED else otherwise


@pytest.fixture(autouse=True, scope="session")
def faithful_bfloat16():
    """Triton's interpreter multiplies bfloat16 as integers and truncates to it; a GPU widens, and rounds."""
    if not _triton.INTERPRETED:
        yield
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(handle):
        if handle.dtype.scalar != bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), float32)

    def rounded_cast(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (float32, bfloat16):
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), bfloat16)

    def widened_product(self, a, b, *rest):
        return product(self, widen(a), widen(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", widened_product)
        patch.setattr(InterpreterBuilder, "cast_impl", rounded_cast)
        yield
