"""What torch knows of every operator: `opcheck` passes, and its callers compile into one graph."""

import pytest
import torch
import torch.nn.functional as F

from ecul import kernels
from ecul.kernels import contrast, jaccard, momentum, neighbors, pairs

FIRST, SECOND = F.normalize(torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)), dim=2)
ROWS = torch.arange(12)
LABELS, PRIORITY = ROWS % 5 - 1, ROWS / 12
CSR = torch.arange(0, 26, 2), torch.stack([ROWS // 3, 11 - ROWS // 3], 1).flatten(), torch.full((24,), 0.5)
COMPARED = FIRST.clone().requires_grad_(), SECOND, LABELS, LABELS, 0.05
LOSS = kernels.memory_contrast, contrast._memory_contrast
UPDATE = kernels.momentum_update_, momentum._momentum_update_
CASES = {  # the function, its operator, the arguments of both, and those of the operator alone
    "neighbours": (kernels.topk_similarity, neighbors._topk_similarity, (FIRST, SECOND, 3, True), ()),
    "pairs": (kernels.pair_similarity, pairs._pair_similarity, (FIRST, SECOND, ROWS, ROWS.flip(0)), ()),
    "graph": (kernels.jaccard_neighbors, jaccard._jaccard_neighbors, (*CSR, 0.5), ()),
    "loss": (*LOSS, COMPARED, (True,)),
    "loss, bfloat16": (*LOSS, (COMPARED[0].detach().bfloat16().requires_grad_(), *COMPARED[1:]), (True,)),
    "mean": (*UPDATE, (FIRST, SECOND, LABELS, 0.1, "mean"), (None,)),
    "instance": (*UPDATE, (FIRST, SECOND, LABELS, 0.1, "instance"), (PRIORITY,)),
}


def on(device, values):
    """Copies there, which an update may change."""
    copy = [value.detach().to(device, copy=True) if torch.is_tensor(value) else value for value in values]
    return [new.requires_grad_() if getattr(old, "requires_grad", False) else new
            for old, new in zip(values, copy, strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=pytest.mark.interpreted if "loss" in n else ()) for n in CASES]
)
def test_passes_opcheck(case, device):
    _, operator, arguments, more = CASES[case]
    torch.library.opcheck(operator, (*on(device, arguments), *on(device, more)))


@pytest.mark.parametrize("case", [case for case in CASES if case != "instance"])
def test_compiles_into_one_graph(case, device):
    function, _, arguments, _ = CASES[case]
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = compiled(*on(device, arguments))
    torch.testing.assert_close(got, function(*on(device, arguments)))
