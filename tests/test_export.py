"""Exported programs give what the library gives, for every batch size."""

import json

import numpy as np
import pytest
import torch

from ecul import TwoStreamResNet, extract
from ecul.augment import normalize
from ecul.tools.export import export


@pytest.fixture(scope="module", params=[10, 50], ids=["plain", "bottlenecks and non-local"])
def model(request):
    torch.manual_seed(0)
    model = TwoStreamResNet(request.param, 8, request.param == 50, (32, 16))
    for block in model.non_local.values():
        torch.nn.init.normal_(block.W[1].weight, std=0.1)  # at first such a block is the identity
    for p in model.infrared.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for _ in range(30):  # until the running statistics fit
        model(*(normalize(images(8)) for _ in range(2)))
    return model.eval()


def images(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 32, 16), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_torch_program(model, modality, tmp_path):
    export(model, tmp_path / "model.pt2", modality)
    files = {"about.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    assert json.loads(files["about.json"])["modality"] == modality
    for count in (1, 2, 5):
        expected = extract(model, images(count), modality, progress=False)
        assert torch.allclose(program(images(count).float()), expected, atol=1e-5)


@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_onnx_agrees_with_torch_for_every_batch_size(model, modality, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model.train()
    export(model, tmp_path / "model.onnx", modality)
    assert model.training
    model.eval()
    program = onnx.load(tmp_path / "model.onnx")
    about = {p.key: p.value for p in program.metadata_props}
    assert (
        about["modality"] == modality and about["input_size"] == "[32, 16]" and "LANCZOS" in about["resize"]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert program.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for count in (1, 2, 7):
        expected = extract(model, images(count), modality, progress=False).numpy()
        (found,) = session.run(None, {"pixels": images(count).float().numpy()})
        assert np.abs(found - expected).max() < 2e-4
        other = extract(model, images(count), {"visible": "infrared", "infrared": "visible"}[modality])
        assert np.abs(found - other.numpy()).max() > 1e-2


def test_refusals(model, tmp_path):
    with pytest.raises(ValueError, match="modality"):
        export(model, tmp_path / "m.onnx", "thermal")
    with pytest.raises(ValueError, match=r"\.onnx or \.pt2, got 'm.pth'"):
        export(model, tmp_path / "m.pth", "visible")
