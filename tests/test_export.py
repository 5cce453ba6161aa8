"""Exported programs give what the library gives, for every batch size."""

import json

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


def opened(file):
    """What an exported file says of itself, and its program as a function of pixels."""
    if file.suffix == ".pt2":
        about = {"about.json": ""}
        program = torch.export.load(file, extra_files=about).module()
        return json.loads(about["about.json"]), program
    onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    about = {p.key: p.value for p in onnx.load(file).metadata_props}
    session = runtime.InferenceSession(str(file))
    assert session.get_inputs()[0].shape[0] == "batch"
    return about, lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


@pytest.mark.parametrize("modality", ["visible", "infrared"])
@pytest.mark.parametrize(("suffix", "error"), [(".pt2", 1e-5), (".onnx", 2e-4)])
def test_a_program_agrees_with_extract_for_every_batch_size(model, suffix, error, modality, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="the export extra is not installed")
    model.train()
    export(model, tmp_path / f"model{suffix}", modality)
    assert model.training and [p.name for p in tmp_path.iterdir()] == [f"model{suffix}"]
    about, program = opened(tmp_path / f"model{suffix}")
    assert about["modality"] == modality and "LANCZOS" in about["resize"]
    assert str(about["input_size"]) == "[32, 16]"
    for count in (1, 2, 7):
        found = program(images(count).float())
        rows = {m: extract(model.eval(), images(count), m, progress=False) for m in ("visible", "infrared")}
        assert (found - rows.pop(modality)).abs().max() < error
        assert (found - rows.popitem()[1]).abs().max() > 1e-2


def test_refusals(model, tmp_path):
    with pytest.raises(ValueError, match="modality"):
        export(model, tmp_path / "m.onnx", "thermal")
    with pytest.raises(ValueError, match=r"\.onnx or \.pt2, got 'm.pth'"):
        export(model, tmp_path / "m.pth", "visible")
