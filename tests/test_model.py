"""The two-stream network: shapes, joint statistics, weights in and out, errors."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ecul import TwoStreamResNet
from ecul.model import Pointwise

SMALL = {"depth": 10, "width": 8, "input_size": (32, 16)}


def images(count, size=(32, 16), seed=0):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_forward_gives_unit_rows_visible_first():
    model = TwoStreamResNet(**SMALL)
    visible, infrared = images(3), images(2, seed=1)
    both = model(visible, infrared)
    assert both.shape == (5, model.num_features) and torch.allclose(
        both.norm(dim=1), torch.ones(5), atol=1e-5
    )
    model.eval()
    separate = torch.cat([model.embed(visible, "visible"), model.embed(infrared, "infrared")])
    assert torch.allclose(model(visible, infrared), separate, atol=1e-5)


@pytest.mark.parametrize(("depth", "features"), [(10, 64), (18, 64), (34, 64), (50, 256), (101, 256)])
def test_depths(depth, features):
    model = TwoStreamResNet(depth, width=8)
    assert model.num_features == features
    assert model.eval().embed(images(2), "visible").shape == (2, features)


def test_published_size_keeps_an_18_by_9_map():
    model = TwoStreamResNet(50, width=8).eval()
    shapes = []
    model.layer4[-1].register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape[2:]))
    )
    model.embed(images(1, (288, 144)), "visible")
    assert shapes == [(18, 9)]


def test_pooling_is_gem_and_the_neck_has_no_shift():
    model = TwoStreamResNet(**SMALL)
    assert not model.bottleneck.bias.requires_grad and not model.bottleneck.bias.any()
    maps = []
    model.layer4[-1].register_forward_hook(lambda module, inputs, output: maps.append(output))
    model.eval()
    embedded = model.embed(images(2), "visible")
    pooled = (maps[0].pow(3).mean((2, 3)) + 1e-12).pow(1 / 3)
    assert torch.allclose(embedded, F.normalize(model.bottleneck(pooled), dim=1), atol=1e-6)


def test_one_empty_modality_still_trains():
    model = TwoStreamResNet(**SMALL)
    assert model(images(3), images(0)).shape == (3, model.num_features)


def test_stems_start_equal_and_are_their_own():
    model = TwoStreamResNet(**SMALL)
    pairs = list(zip(model.visible.parameters(), model.infrared.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_non_local_blocks_start_as_the_identity():
    torch.manual_seed(0)
    model = TwoStreamResNet(50, width=8, non_local=True).eval()
    assert sorted(model.non_local) == ["2_2", "2_3", "3_3", "3_4", "3_5"]
    plain = TwoStreamResNet(50, width=8).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("non_local")})
    assert torch.allclose(model.embed(images(2), "visible"), plain.embed(images(2), "visible"), atol=1e-5)


def torchvision_names(model):
    """The model's weights under the names that torchvision's ResNet has."""
    state = {k.removeprefix("visible."): v.clone() for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if not k.startswith(("infrared.", "bottleneck."))}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_backbone_from_a_torchvision_file(tmp_path, suffix):
    source, model = TwoStreamResNet(18, width=8), TwoStreamResNet(18, width=8)
    state = torchvision_names(source) | {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
    file = tmp_path / f"resnet{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    model.load_backbone(file)
    assert torch.equal(model.layer3[1].conv2.weight, source.layer3[1].conv2.weight)
    assert torch.equal(model.infrared.conv1.weight, source.visible.conv1.weight)


def test_backbone_names_what_does_not_fit(tmp_path):
    state = torchvision_names(TwoStreamResNet(18, width=8))
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="missing layer1.0.conv1.weight; unknown layer9.weight"):
        TwoStreamResNet(18, width=8).load_backbone(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="expected"):
        save_file(torchvision_names(TwoStreamResNet(18, width=16)), tmp_path / "wide.safetensors")
        TwoStreamResNet(18, width=8).load_backbone(tmp_path / "wide.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        TwoStreamResNet(18, width=8).load_backbone(tmp_path / "absent.pth")
    broken = {"text.pth": b"text", "text.safetensors": b"text", "empty.pth": b"", "stop.pth": b"."}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
            TwoStreamResNet(18, width=8).load_backbone(tmp_path / name)
    for content in (torch.zeros(2), [1], {1: torch.zeros(1)}, {"conv1.weight": 3}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match="odd.pth"):
            TwoStreamResNet(18, width=8).load_backbone(tmp_path / "odd.pth")


def test_save_and_load_give_the_same_embeddings(tmp_path):
    model = TwoStreamResNet(**SMALL)
    model(images(8), images(8))
    model.eval().save_pretrained(tmp_path / "m", {"dataset": "sysu"})
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        loaded = TwoStreamResNet.from_pretrained(path)
        assert loaded.input_size == (32, 16) and not loaded.training
        assert torch.equal(loaded.embed(images(2), "infrared"), model.embed(images(2), "infrared"))


def test_loading_something_else_is_a_clear_error(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no named network, not TwoStreamResNet; give a model"):
        TwoStreamResNet.from_pretrained(tmp_path)
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match="text.safetensors cannot be read"):
        TwoStreamResNet.from_pretrained(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="no model file"):
        TwoStreamResNet.from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="depth must be one of"):
        TwoStreamResNet(depth=20)
    with pytest.raises(ValueError, match="modality"):
        TwoStreamResNet(**SMALL).embed(images(1), "thermal")


def test_narrow_networks_learn_in_the_layout_of_training():
    """In a process of its own: what this is about ends the process."""
    code = """
import torch
from ecul import TwoStreamResNet
torch.set_num_threads(1)
for depth, width in ((10, 3), (10, 4), (10, 6), (10, 8), (10, 16), (50, 1), (50, 2), (50, 8)):
    model = TwoStreamResNet(depth, width, input_size=(64, 32)).eval()
    x = torch.randn(8, 3, 64, 32)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout).zero_grad()
        rows = model.embed(x.contiguous(memory_format=layout), "visible")
        rows[:, 0].sum().backward()
        found.append((rows.detach(), model.layer2[0].conv1.weight.grad.clone()))
    for plain, other in zip(*found):
        assert torch.allclose(other, plain, atol=1e-4 * float(plain.abs().max())), (depth, width)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])


def test_a_strided_pointwise_convolution_is_torchs():
    torch.manual_seed(0)
    ours = Pointwise(5, 7, 1, 2, bias=False)
    x = torch.randn(3, 5, 9, 6)
    torch.testing.assert_close(ours(x), torch.nn.functional.conv2d(x, ours.weight, stride=2))
