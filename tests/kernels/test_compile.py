"""Every shipped configuration, compiled ahead of time for GPUs that need not be there."""

import re

import pytest
import torch

pytest.importorskip("triton")
from compiling import GFX942, SM80, SM90, assembler_messages, compiling, resources
from triton.backends import backends

from ecul.kernels import _overlaps, _shortlist, contrast, momentum, pairs

pytestmark = pytest.mark.compiled

FULL, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
LIMITS = {SM80: 163 * 1024, SM90: 227 * 1024}  # bytes of shared memory a program may have
PRODUCTS = {"_candidates_kernel"}
ASSERTIONS = {"_weights_kernel", "_update_kernel"}  # of labels, which the host does not read
ATOMICS = {"_candidates_kernel", "_add_overlaps"}


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


def loss(dtype, bank_dtype, with_gradient=True):
    x, bank = zeros(384, 2048, dtype=dtype), zeros(3417, 2048, dtype=bank_dtype)
    contrast._launch(x, bank, zeros(3417), zeros(384), 0.05, with_gradient)
    return {"_weights_kernel": 4096}


def search(dtype, rows, columns):
    x = zeros(rows, 2048, dtype=dtype)
    y = zeros(columns, 2048, dtype=dtype) if columns else x
    _shortlist.shortlist(x, y, 4)
    pairs._launch(x, y, zeros(48), zeros(48))
    return {"_candidates_kernel": 131072, "_pairs_kernel": 2048}


def update(rule, features, dtype=FULL):
    priority = zeros(384, dtype=FULL) if rule == "instance" else None
    x = zeros(384, features, dtype=dtype)
    momentum._launch(zeros(99, features, dtype=dtype), x, zeros(384), 0.1, rule, priority)
    return {"_update_kernel": 16384}


def graph():
    indptr, indices, values = torch.arange(71), torch.arange(70) // 7, torch.ones(70)
    list(_overlaps.pairs_on_device((indptr, indices, values), 0.5, lambda: None, 0, 1))
    found, whole = zeros(2, 3), zeros(9, dtype=torch.int32)  # as if three pairs were found
    _overlaps._measure[(1,)](found, whole, indptr, whole, whole, 3, STEPS=9, **_overlaps.OPTIONS)
    return dict.fromkeys(["_add_overlaps", "_measure"], 4096)


LAUNCHES = {
    "loss, bfloat16": lambda: loss(BRAIN, BRAIN),
    "loss, float16": lambda: loss(HALF, FULL),
    "loss, float32": lambda: loss(FULL, FULL),
    "loss without gradient": lambda: loss(BRAIN, BRAIN, with_gradient=False),
    "search, one set": lambda: search(FULL, 1001, None),
    "search, one set, float16": lambda: search(HALF, 1001, None),
    "search, two sets": lambda: search(BRAIN, 301, 1001),
    "update, sequential": lambda: update("sequential", 2048),
    "update, instance": lambda: update("instance", 2048),
    "update, mean": lambda: update("mean", 2048, BRAIN),
    "update, hard": lambda: update("hard", 2048),
    "update, widest rows": lambda: update("hard", momentum.WIDEST),
    "graph": graph,
}


@pytest.mark.parametrize("target", [SM80, SM90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_spills_nothing_and_multiplies_on_tensor_cores(launch, target):
    with compiling(target) as compiled:
        stated = launch()
    assert {name for name, _ in compiled} == set(stated)
    for name, kernel in compiled:
        used = resources(kernel)
        assert used["stack"] == 0, f"{name} spills: {used}"
        assert used["shared"] <= min(stated[name], LIMITS[target]), f"{name}: {used}"
        instruction = "wgmma.mma_async" if target is SM90 else "mma.sync"
        assert (instruction in kernel.asm["ptx"]) == (name in PRODUCTS)
        assert ("__assertfail" in kernel.asm["ptx"]) == (name in ASSERTIONS)
        assert bool(re.search(r"red\.relaxed|atom\.", kernel.asm["ptx"])) == (name in ATOMICS)


@pytest.mark.skipif("amd" not in backends, reason="this Triton has no AMD backend")
@pytest.mark.parametrize(
    "launch", ["loss, bfloat16", "loss, float32", "search, one set", "update, sequential", "graph"]
)
def test_compiles_for_amd(launch):
    with compiling(GFX942) as compiled:
        LAUNCHES[launch]()
    for name, kernel in compiled:
        assert kernel.metadata.shared <= 65536
        assert ".vgpr_spill_count: 0" in kernel.asm["amdgcn"]
        assert ("v_mfma" in kernel.asm["amdgcn"]) == (name in PRODUCTS)


@pytest.mark.parametrize("launch", [l for l in LAUNCHES if l.startswith("search")])
def test_asynchronous_products_are_safe_and_run_side_by_side(launch):
    """What threads copied into shared memory is fenced off, operands lie there, nothing is serialised."""
    with compiling(SM90) as compiled:
        LAUNCHES[launch]()
    for name, kernel in compiled:
        ptx = kernel.asm["ptx"]
        products = re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\}, *(\S)", ptx)
        assert set(products) == ({"%"} if name in PRODUCTS else set()), name  # a descriptor, not registers
        if products and re.search(r"cp\.async\.c[ag]", ptx):
            assert "fence.proxy.async" in ptx, name
        assert "serialized" not in assembler_messages(kernel), name
