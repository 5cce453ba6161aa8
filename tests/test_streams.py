"""Any backbone in two streams: its first layer apart, the rest shared, known by name to every command."""

import copy
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import TINY, same, tiny
from torch import nn

from ecul import Config, extract, train
from ecul.cli import main
from ecul.model import BasicBlock, load_model
from ecul.optim import build_model
from ecul.streams import Backbone, TwoStream

SIZE = (32, 32)


class ResNet(nn.Module):
    """torchvision's ResNet with one block, by its names."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.fc = nn.Sequential(BasicBlock(8, 64, 2)), nn.Linear(64, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layer1(x).mean((2, 3)))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """torchvision's ConvNeXt with one block, by its names."""

    def __init__(self, classes=10):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 12, 4, 4), LayerNorm2d(12))
        block = nn.Sequential(
            nn.Conv2d(12, 12, 7, 1, 3, groups=12), LayerNorm2d(12), nn.Conv2d(12, 12, 1), nn.GELU()
        )
        self.features = nn.Sequential(stem, block)
        self.classifier = nn.Sequential(LayerNorm2d(12), nn.Flatten(1), nn.Linear(12, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))


class ViT(nn.Module):
    """A ViT tiny as in torchvision: it must know the images' size."""

    def __init__(self, image_size=224, classes=10):
        super().__init__()
        self.image_size = image_size
        self.conv_proj = nn.Conv2d(3, 16, 16, 16)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embedding = nn.Parameter(torch.randn(1, (image_size // 16) ** 2 + 1, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(16, classes))

    def forward(self, x):
        torch._assert(x.shape[3] == self.image_size, "Wrong image width!")
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.heads(self.encoder(x)[:, 0])


NETWORKS = {"resnet18": ResNet, "convnext_tiny": ConvNeXt, "vit_tiny": ViT}
STEMS = {
    "resnet18": ("conv1", "bn1"), "vit_tiny": ("conv_proj",),
    "convnext_tiny": ("features.0.0", "features.0.1"),
}  # fmt: skip


def get_model(name, weights, **options):
    if name not in NETWORKS:
        raise ValueError(f"Unknown model {name}")
    return NETWORKS[name](**options)


@pytest.fixture(autouse=True)
def torchvision(monkeypatch):
    models = types.ModuleType("torchvision.models")
    models.get_model = get_model
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    torch.manual_seed(0)


def images(count, seed=0):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stem_is_each_modalitys_own_and_the_rest_is_shared(name):
    model = TwoStream(f"torchvision:{name}", SIZE)
    assert model.stems == STEMS[name]
    assert model.num_features == {"resnet18": 64, "convnext_tiny": 12, "vit_tiny": 16}[name]
    for stem in map(model.network.get_submodule, model.stems):
        assert same(stem.visible, stem.infrared)
    model.eval()
    visible, infrared = images(3), images(2, seed=1)
    assert torch.equal(model.embed(visible, "visible"), model.embed(visible, "infrared"))
    for stem in map(model.network.get_submodule, model.stems):
        for parameter in stem.infrared.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    both = model(visible, infrared)
    apart = torch.cat([model.embed(visible, "visible"), model.embed(infrared, "infrared")])
    assert torch.allclose(both, apart, atol=1e-5) and torch.allclose(both.norm(dim=1), torch.ones(5))
    assert not torch.allclose(model.embed(visible, "visible"), model.embed(visible, "infrared"), atol=1e-3)
    assert model(visible, infrared[:0]).shape == (3, model.num_features)
    model.train()(visible, infrared).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_batch_statistics_are_joint_after_the_stem():
    model, seen, x = TwoStream("torchvision:resnet18", SIZE), [], images(6)
    model.network.layer1[0].bn1.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    model(x[:4], x[4:])
    assert seen == [6]


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_the_plain_network_come_in_without_its_classifier(name, tmp_path):
    source = get_model(name, None, **({"image_size": 32} if name == "vit_tiny" else {}))
    save_file(source.state_dict(), tmp_path / "plain.safetensors")
    model = TwoStream(f"torchvision:{name}", SIZE)
    model.load_backbone(tmp_path / "plain.safetensors")
    first = source.get_submodule(STEMS[name][0]).weight
    stem = model.network.get_submodule(STEMS[name][0])
    assert torch.equal(stem.visible.weight, first) and torch.equal(stem.infrared.weight, first)
    for end in ("fc", "classifier.2", "heads.head"):
        if end in dict(source.named_modules()):
            source.set_submodule(end, nn.Identity())
    x = images(2)
    with torch.no_grad():
        expected = F.normalize(model.eval().bottleneck(source.eval()(x)), dim=1)
    assert torch.allclose(model.embed(x, "infrared"), expected, atol=1e-6)
    save_file({**source.state_dict(), "odd": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"does not fit this torchvision:{name}.*unknown odd"):
        model.load_backbone(tmp_path / "odd.safetensors")


def test_a_librarys_own_filter_fits_position_tables_to_the_images(tmp_path, monkeypatch):
    """As timm's files have one: it gets the plain network, whose patches have their own weights."""

    def resample(state, network):
        side = network.image_size // network.conv_proj.weight.shape[2]
        table = state["pos_embedding"]
        grid = table[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side)).flatten(2).transpose(1, 2)
        return state | {"pos_embedding": torch.cat([table[:, :1], grid], 1)}

    source = ViT(image_size=64)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    model = TwoStream("torchvision:vit_tiny", SIZE)
    with pytest.raises(ValueError, match=r"pos_embedding is \(1, 17, 16\), expected \(1, 5, 16\)"):
        model.load_backbone(tmp_path / "vit.safetensors")
    monkeypatch.setattr(sys.modules[__name__], "checkpoint_filter_fn", resample, raising=False)
    model.load_backbone(tmp_path / "vit.safetensors")
    assert torch.equal(model.network.pos_embedding[:, 1], source.pos_embedding[:, 1])
    assert torch.equal(model.network.pos_embedding[:, 4], source.pos_embedding[:, 1 + 10])
    save_file({"pos_embedding": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="odd.safetensors does not fit this torchvision:vit_tiny: "):
        model.load_backbone(tmp_path / "odd.safetensors")


class Reid(nn.Module):
    """A network that gives something else in training."""

    num_features = 8

    def __init__(self, kind):
        super().__init__()
        body = [nn.Conv2d(3, 8, 7, 4), nn.BatchNorm2d(8), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.kind, self.body, self.head = kind, nn.Sequential(*body), nn.Linear(8, 5)

    def forward(self, x):
        f = self.body(x)
        other = {"tuple": (self.head(f), f), "dict": {"feat": f}, "logits": self.head(f), "map": f[..., None]}
        return other.get(self.kind, f) if self.training else f


@pytest.mark.parametrize("wrap", [Backbone, TwoStream])
def test_what_a_network_gives_in_training_is_looked_at_before_any_work(wrap):
    for kind, got in {"tuple": "got tuple", "dict": "got dict", "map": r"got \(2, 8, 1\)"}.items():
        with pytest.raises(ValueError, match=f"^model: Reid should give rows .* of 2 images, {got} in train"):
            wrap(Reid(kind), SIZE)
    with pytest.raises(ValueError, match="^model: Reid gives rows of 8 features in evaluation and of 5 in"):
        wrap(Reid("logits"), SIZE)
    own = Reid("tuple")
    own.input_size, own.embed = (32, 16), lambda x, modality: own.body(x)
    own.forward = lambda visible, infrared: (own.body(visible), own.body(infrared))
    with pytest.raises(ValueError, match=r"Reid should give rows \(4, num_features\) of 4 images, got"):
        build_model(tiny(), torch.device("cpu"), own)
    network = Reid("same").eval()
    network.body[1].train()
    before, state = copy.deepcopy(network), torch.get_rng_state()
    wrap(network, SIZE)
    assert torch.equal(torch.get_rng_state(), state) or wrap is TwoStream  # whose neck is drawn
    assert same(network, before)
    assert [network.training, network.body[1].training] == [False, True]


def test_one_network_in_two_models():
    network = Reid("same")
    first, second = TwoStream(network, SIZE).eval(), TwoStream(network, SIZE).eval()
    assert not any("visible" in name for name in network.state_dict())
    x = images(6)
    for model in (first, second):
        rows = model(x[:4], x[4:])
        assert torch.allclose(rows[:2], model(x[:2], x[4:])[:2], atol=1e-6)
        assert torch.allclose(rows[4:], model.embed(x[4:], "infrared"), atol=1e-6)
    first.network.num_features = 8
    for wrap in (TwoStream, Backbone):
        with pytest.raises(ValueError, match="model: Reid has a stem for each modality already"):
            wrap(first.network, SIZE)


def test_a_backbone_by_name_is_trained_and_used_from_the_shell(world, tmp_path, capsys):
    run, photos = str(tmp_path / "run"), f"{world}/cam1"
    fields = {**TINY, "epochs_cross": 0, "iterations": 1, "size": [32, 32]}
    command = ["train", "sysu", world, "-o", run, "--preset", "demo"]
    for field in fields.keys() - {"depth", "width"}:
        command += ["--set", f"{field}={json.dumps(fields[field])}"]
    assert main([*command, "--set", "backbone=torchvision:vit_tiny"]) == 0
    assert main([*command, "--set", "backbone=torchvision:vit_tiny", "--resume"]) == 0
    assert main(["evaluate", "sysu", world, "--model", run, "--modes", "all"]) == 0
    assert "SYSU-MM01" in capsys.readouterr().out
    assert main(["report", run, "--queries", "1", "--top", "2"]) == 0
    assert (tmp_path / "run" / "report" / "ranked.png").is_file()
    modalities = ["--query-modality", "infrared", "--gallery-modality", "visible"]
    assert main(["search", run, "--query", photos, "--gallery", photos, *modalities, "--top", "1"]) == 0
    model = load_model(run)
    assert isinstance(model, TwoStream) and model.described() == "this torchvision:vit_tiny"
    pixels = (255 * torch.rand(3, 3, *SIZE)).to(torch.uint8)
    assert main(["export", run, "-o", f"{run}/i.pt2", "--modality", "infrared"]) == 0
    expected = extract(model, pixels, "infrared", progress=False)
    assert torch.allclose(torch.export.load(f"{run}/i.pt2").module()(pixels.float()), expected, atol=1e-5)


def test_what_does_not_fit_is_said_before_any_work(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    by_name = {"backbone": "torchvision:resnet18", "checkpointing": True}
    for make, message in (
        (lambda: TwoStream("resnet18", SIZE), "must be timm:NAME or torchvision:NAME, got 'resnet18'"),
        (lambda: Config(backbone="resnet18"), "backbone must be timm:NAME or torchvision:NAME"),
        (lambda: TwoStream("torchvision:x", SIZE), "'torchvision:x' cannot be built: Unknown model x"),
        (lambda: TwoStream("torchvision:vit_tiny", (32, 48)), "ViT takes no images of .* Wrong image width!"),
        (lambda: TwoStream("timm:vit", SIZE), "timm"),
        (lambda: train(dataset, tiny(size=SIZE, **by_name)), "for TwoStreamResNet, not for torchvision:res"),
        (lambda: TwoStream(nn.Sequential(ResNet().conv1), SIZE), r"rows \(2, num_features\) of 2 images"),
    ):
        with pytest.raises((ValueError, ImportError), match=message):
            make()


def test_ones_own_network_is_saved_and_needs_its_owner(tmp_path):
    own, fresh = ConvNeXt(), ConvNeXt()
    own.classifier[2] = fresh.classifier[2] = nn.Identity()
    model = TwoStream(own, SIZE).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds one's own ConvNeXt: TwoStream.from_pretrained\(path, net"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="holds TwoStream, not Backbone; .*from_pretrained of its own class"):
        Backbone.from_pretrained(tmp_path, own)
    again = TwoStream.from_pretrained(tmp_path, fresh)
    assert torch.equal(again.embed(images(2), "visible"), model.embed(images(2), "visible"))


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_networks_of_timm_start_from_weights_of_another_image_size(name, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.delitem(sys.modules, "torchvision.models")
    timm = pytest.importorskip("timm")
    save_file(timm.create_model(name).state_dict(), tmp_path / "w.safetensors")
    model = TwoStream(f"timm:{name}", (288, 144)).eval()
    model.load_backbone(tmp_path / "w.safetensors")
    assert model.embed(torch.randn(2, 3, 288, 144), "infrared").shape == (2, model.num_features)
