"""The two-stream ResNet: torchvision's names and shapes, joint statistics, weights in and out, errors."""

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


def torchvision_names(model):
    """The model's weights under the names that torchvision's ResNet has."""
    state = {k.removeprefix("visible."): v.clone() for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if not k.startswith(("infrared.", "bottleneck."))}


def published_shapes(blocks, bottleneck):
    """Names and shapes of torchvision's ResNet without its classifier, from the paper's table."""
    shapes = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name, channels):
        shapes.update({f"{name}.{k}": (channels,) for k in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    inputs, expansion = 64, 4 if bottleneck else 1
    for stage, count in enumerate(blocks, 1):
        width = 64 * 2 ** (stage - 1)
        for i in range(count):
            sides = ((1, inputs, width), (3, width, width), (1, width, 4 * width))
            sides = sides if bottleneck else ((3, inputs, width), (3, width, width))
            for j, (kernel, before, after) in enumerate(sides, 1):
                shapes[f"layer{stage}.{i}.conv{j}.weight"] = (after, before, kernel, kernel)
                norm(f"layer{stage}.{i}.bn{j}", after)
            if i == 0 and inputs != expansion * width:
                shapes[f"layer{stage}.0.downsample.0.weight"] = (expansion * width, inputs, 1, 1)
                norm(f"layer{stage}.0.downsample.1", expansion * width)
            inputs = expansion * width
    return shapes


BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@pytest.mark.parametrize("depth", BLOCKS)
def test_names_and_shapes_are_torchvisions(depth):
    with torch.device("meta"):
        model = TwoStreamResNet(depth)
    expected = published_shapes(BLOCKS[depth], depth >= 50)
    found = {name: tuple(value.shape) for name, value in torchvision_names(model).items()}
    assert found == expected
    assert model.num_features == (2048 if depth >= 50 else 512) and model.input_size == (288, 144)


def test_stems_start_equal_and_forward_gives_unit_rows_visible_first():
    model = TwoStreamResNet(**SMALL)
    pairs = list(zip(model.visible.parameters(), model.infrared.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    visible, infrared = images(3), images(2, seed=1)
    both = model(visible, infrared)
    assert both.shape == (5, model.num_features) and torch.allclose(both.norm(dim=1), torch.ones(5))
    assert model(visible, infrared[:0]).shape == (3, model.num_features)
    model.eval()
    separate = torch.cat([model.embed(visible, "visible"), model.embed(infrared, "infrared")])
    assert torch.allclose(model(visible, infrared), separate, atol=1e-5)


@pytest.mark.parametrize(("stride", "size"), [(2, (18, 9)), (1, (36, 18))])
def test_the_last_map_at_the_published_size(stride, size):
    model = TwoStreamResNet(50, width=8, stem_stride=stride).eval()
    shapes = []
    model.layer4[-1].register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[2:])))
    model.embed(images(1, (288, 144)), "visible")
    assert shapes == [size]


@pytest.mark.parametrize("gem", [True, False])
def test_pooling_a_neck_without_shift_and_the_same_rows_from_a_file(gem, tmp_path):
    model = TwoStreamResNet(**SMALL, gem=gem, stem_stride=1)
    model(images(8), images(8))
    model.eval().save_pretrained(tmp_path / "m", {"dataset": "sysu"})
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        loaded = TwoStreamResNet.from_pretrained(path)
        assert loaded.settings == model.settings and not loaded.training
        assert torch.equal(loaded.embed(images(2), "infrared"), model.embed(images(2), "infrared"))
    assert not model.bottleneck.bias.requires_grad and not model.bottleneck.bias.any()
    maps = []
    model.layer4[-1].register_forward_hook(lambda _, __, output: maps.append(output))
    embedded = model.embed(images(2), "visible")
    pooled = (maps[0].pow(3).mean((2, 3)) + 1e-12).pow(1 / 3) if gem else maps[0].mean((2, 3))
    assert torch.allclose(embedded, F.normalize(model.bottleneck(pooled), dim=1), atol=1e-6)


def test_non_local_blocks_start_as_the_identity():
    torch.manual_seed(0)
    model = TwoStreamResNet(50, width=8, non_local=True).eval()
    assert sorted(model.non_local) == ["2_2", "2_3", "3_3", "3_4", "3_5"]
    plain = TwoStreamResNet(50, width=8).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("non_local")})
    assert torch.allclose(model.embed(images(2), "visible"), plain.embed(images(2), "visible"), atol=1e-5)


def before(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def moco(plain):
    key = {name: 0 * value for name, value in plain.items()}
    both = before("module.encoder_q.", plain) | before("module.encoder_k.", key)
    return {"epoch": 3, "state_dict": both, "optimizer": {"state": {}}}


WRAPPED = {  # from torchvision's names to the content of a file, and what is said of it
    "plain": (lambda plain: plain, ""),
    "state_dict": (lambda plain: {"state_dict": plain, "best": torch.ones(1)}, "behind 'state_dict.'; "),
    "model": (lambda plain: {"model": before("module.", plain)}, "are behind 'model.module.'"),
    "own name": (lambda plain: {"weights_ema": plain, "epoch": 1}, "are behind 'weights_ema.'"),
    "compiled": (lambda plain: before("module._orig_mod.", plain), "are behind 'module._orig_mod.'"),
    "nested": (lambda plain: {"model": {"state_dict": plain}}, "are behind 'model.state_dict.'"),
    "head": (lambda plain: before("backbone.", plain) | {"head.weight": torch.ones(2)}, "out: head.weight"),
    "MoCo": (moco, "behind 'state_dict.module.encoder_q.'; left out: module.encoder_k.conv1.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_come_out_of_whatever_wraps_them(name, tmp_path, caplog):
    caplog.set_level("INFO", "ecul")
    source, model = TwoStreamResNet(18, width=8), TwoStreamResNet(18, width=8)
    plain = torchvision_names(source)
    wrap, told = WRAPPED[name]
    torch.save(wrap(plain | {"fc.weight": torch.zeros(10, 64)}), tmp_path / "w.pth")
    model.load_backbone(tmp_path / "w.pth")
    assert all(torch.equal(value, plain[key]) for key, value in torchvision_names(model).items())
    assert torch.equal(model.infrared.conv1.weight, source.visible.conv1.weight)
    assert told in caplog.text and bool(caplog.text) == bool(told)


def test_a_trained_model_is_a_start_with_all_its_weights(tmp_path, caplog):
    caplog.set_level("INFO", "ecul")
    source, model = TwoStreamResNet(**SMALL), TwoStreamResNet(**SMALL)
    source(images(8), images(8, seed=1)).sum().backward()
    torch.nn.init.normal_(source.infrared.conv1.weight)
    source.save_pretrained(tmp_path)
    torch.save({"model": before("module.", source.state_dict())}, tmp_path / "ddp.pth")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "ddp.pth"):
        model = TwoStreamResNet(**SMALL)
        model.load_backbone(path)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert caplog.text.count("a trained model; all its weights are taken, its neck too") == 3


def test_backbone_names_what_does_not_fit(tmp_path):
    model, state = TwoStreamResNet(18, width=8), torchvision_names(TwoStreamResNet(18, width=8))
    del state["layer1.0.conv1.weight"]
    save_file({**state, "layer9.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="missing layer1.0.conv1.weight; unknown layer9.weight"):
        model.load_backbone(tmp_path / "odd.safetensors")
    save_file(torchvision_names(TwoStreamResNet(18, width=16)), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"conv1.weight is \(16, 3, 7, 7\), expected \(8, 3, 7, 7\)"):
        model.load_backbone(tmp_path / "wide.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        model.load_backbone(tmp_path / "absent.pth")
    for content in (torch.zeros(2), [1], {1: torch.zeros(1)}, {"conv1.weight": 3}, {"model": {}}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match="odd.pth"):
            model.load_backbone(tmp_path / "odd.pth")


def test_loading_something_else_is_a_clear_error(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no network, not TwoStreamResNet; give a model"):
        TwoStreamResNet.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
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
torch.manual_seed(0)
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
