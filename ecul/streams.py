"""Any backbone as a model of two modalities: one stream for both, or a stem for each and the rest shared.

Two streams and BNNeck as in ECUL: https://arxiv.org/abs/2412.19134
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ecul.common.names import printable
from ecul.common.pretrained import SIZE, Pretrained
from ecul.data.images import check_modality


def make_neck(features: int) -> nn.BatchNorm1d:
    """BNNeck of two streams: a weight that starts near 1, a bias that stays 0."""
    neck = nn.BatchNorm1d(features, dtype=torch.float32)
    nn.init.normal_(neck.weight, 1.0, 0.01)
    neck.bias.requires_grad_(False)
    return neck


def neck_rows(neck: nn.BatchNorm1d, x: torch.Tensor) -> torch.Tensor:
    """Unit embeddings (N, D) float32 of features (N, D): through the neck in full precision."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(neck(x.float()), dim=1)


class PerModality(nn.Module):
    """A layer that each modality has for itself.

    stream: the modality of all rows, or the number of visible rows, which come first.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.visible, self.infrared = layer, copy.deepcopy(layer)
        self.stream: str | int = "visible"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.stream, str):
            return getattr(self, self.stream)(x)
        parts = zip((self.visible, self.infrared), x.tensor_split([self.stream]), strict=True)
        return torch.cat([layer(part) for layer, part in parts if len(part)])


class Backbone(Pretrained):
    """Somebody's own network in the place of `TwoStreamResNet`, one stream for both modalities.

        embed(x, modality) = F.normalize(network(x), dim=1)

    network: a module with `num_features` that maps (N, 3, H, W) to (N, num_features), in training too. It is
    not copied: training changes its weights. input_size: (H, W), to which `extract` resizes.
    `train(..., model=network)` makes a `Backbone`; afterwards `Backbone.from_pretrained(run, network)` is a
    model for `extract`, `export` and `report`. Errors: AttributeError for a network without `num_features`;
    ValueError, before any work, where a batch gives other rows, in training or in evaluation.
    """

    forms = {"input_size": SIZE}

    def __init__(self, network: nn.Module, input_size: tuple[int, int]) -> None:
        self._wrap(network, input_size, type(network).__name__)
        if self.num_features != network.num_features:
            told = f"{self.num_features} features where num_features says {network.num_features}"
            raise ValueError(f"model: its rows have {told}; build it without its classifier")

    def _wrap(self, network: nn.Module, input_size: tuple[int, int], name: str) -> None:
        super().__init__()
        if any(isinstance(module, PerModality) for module in network.modules()):
            raise ValueError(f"model: {name} has a stem for each modality already; give the plain network")
        size, learning = (row_size(network, input_size, mode) for mode in ("evaluation", "training"))
        if size != learning:
            told = f"{name} gives rows of {size} features in evaluation and of {learning} in training"
            raise ValueError(f"model: {told}; both must be the features, without the classifier")
        self.num_features = size
        self.network, self.input_size = network, tuple(input_size)
        self.settings = {"network": name, "input_size": [*input_size]}

    def forward(self, visible: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
        """Unit embeddings (A + B, num_features) float32 of (A, 3, H, W) and (B, 3, H, W), visible first."""
        return self._rows(torch.cat([visible, infrared]), len(visible))

    def embed(self, x: torch.Tensor, modality: str) -> torch.Tensor:
        """Unit embeddings (N, num_features) float32 of images of one modality, "visible" or "infrared"."""
        check_modality(modality)
        return self._rows(x, modality)

    def _rows(self, x: torch.Tensor, stream: str | int) -> torch.Tensor:
        return F.normalize(self.network(x).float(), dim=1)

    @classmethod
    def from_pretrained(cls, path: str | Path, network: nn.Module | None = None) -> "Backbone":
        """The model saved in a run or another directory, in eval mode.

        network: a fresh module of the class that was trained; not needed for one of timm or torchvision by
        name. Errors: FileNotFoundError; ValueError for another kind of model, a missing network, or with the
        list of what does not fit.
        """
        file, content, settings = cls._read(path)
        name = content.metadata.get("network", "")
        if network is None and ":" not in name:
            told = f"{cls.__name__}.from_pretrained(path, network) loads it"
            raise ValueError(f"{file} holds one's own {printable(name)}: {told}")
        made_of: Any = name if network is None else network  # `TwoStream` takes a name
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = cls(made_of, tuple(settings["input_size"]))
        return model.load(content.tensors, file, content.sha256).eval()


class TwoStream(Backbone):
    """A network of timm, of torchvision or your own as a model of two modalities.

        model = TwoStream("timm:convnext_tiny", (288, 144))       # from the shell: --set backbone=timm:...
        model = TwoStream("torchvision:resnet18", (288, 144))
        model = TwoStream(network, (288, 144))                    # a copy, with the weights that it has

    Each modality has its own stem: the layer that the images enter and the normalisation beside it (a
    ResNet's conv1 and bn1, the patches of a ConvNeXt or a ViT). Both stems start equal. Everything after the
    stem is shared, with both modalities in one batch, and ends in a BNNeck as in `TwoStreamResNet`.
    torchvision's classifier is removed; timm builds none with `num_classes=0`. input_size: (H, W). Networks
    that must know it, such as ViTs, are told (torchvision's take squares alone).

    A model by name is saved with the name, so `load_model` and every command load it. Your own network needs
    `TwoStream.from_pretrained(path, network)`. Errors: ValueError, before any work, for an unknown
    name or a network that does not give rows (N, num_features), in training or in evaluation; ImportError
    without its package.
    """

    def __init__(self, network: str | nn.Module, input_size: tuple[int, int]) -> None:
        name = network if isinstance(network, str) else type(network).__name__
        built = _build(network, input_size) if isinstance(network, str) else copy.deepcopy(network)
        layers = _layers(built, input_size)
        ends = getattr(built, "default_cfg", {}).get("classifier") or ()  # where timm has a classifier
        classifier = (ends,) if isinstance(ends, str) else tuple(ends)
        last = [*layers][-1]
        if name.startswith("torchvision:") and isinstance(layers[last], nn.Linear):
            classifier += (last,)
            built.set_submodule(last, nn.Identity())
        self._wrap(built, input_size, name)
        self.classifier, self.stems = tuple(f"{end}." for end in classifier), tuple(_stem(layers))
        for stem in self.stems:
            built.set_submodule(stem, PerModality(built.get_submodule(stem)))
        self.bottleneck = make_neck(self.num_features)

    def _rows(self, x: torch.Tensor, stream: str | int) -> torch.Tensor:
        for name in self.stems:
            stem = self.network.get_submodule(name)
            if stem.stream != stream:
                stem.stream = stream  # type: ignore[assignment]
        return neck_rows(self.bottleneck, self.network(x))

    def load_backbone(self, path: str | Path) -> None:
        """Start from the plain network's weights in a local file, or from a trained model like this one.

        path: as in `read_foreign`. Both stems get the weights of the plain one, and the classifier is left
        out. timm's own filter resamples position tables to this input_size. Errors: ValueError that lists
        every key that is missing, unknown or of another shape.
        """
        plain = copy.deepcopy(self.network)
        for name in self.stems:
            plain.set_submodule(name, plain.get_submodule(name).visible)  # type: ignore[arg-type]
        homes = {}
        for name in plain.state_dict():
            layer, _, leaf = name.rpartition(".")
            kinds = (".visible.", ".infrared.") if layer in self.stems else ("." * bool(layer),)
            homes[name] = tuple(f"network.{layer}{kind}{leaf}" for kind in kinds)
        resample = getattr(sys.modules[type(plain).__module__], "checkpoint_filter_fn", None)
        fit = dict if resample is None else lambda state: resample(state, plain)
        self.start_from(path, homes, self.classifier, fit)


def row_size(network: nn.Module, size: tuple[int, int], mode: str, streams: int = 1) -> int:
    """The D of the rows (N, D) that a network gives of two images of this size in each of its inputs.

    mode: "evaluation" or "training". A copy is tried, so the network's statistics, its mode and torch's
    random state stay as they are. Errors: ValueError where the network cannot take such images, or gives
    something else.
    """
    name, count = type(network).__name__, 2 * streams
    device = next(network.parameters(), torch.empty(0)).device
    images = [torch.zeros(2, 3, *size, device=device) for _ in range(streams)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            rows = copy.deepcopy(network).train(mode == "training")(*images)
        except Exception as e:  # somebody's code can raise anything
            raise ValueError(f"model: {name} takes no images of {size} pixels in {mode}: {e}") from e
    got = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or len(rows) != count:
        told = f"should give rows ({count}, num_features) of {count} images, got {got} in {mode}"
        raise ValueError(f"model: {name} {told}; give it with its pooling and without its classifier")
    return rows.shape[1]


def _build(name: str, size: tuple[int, int]) -> nn.Module:
    library, _, architecture = name.partition(":")
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0}
    sized: dict[str, Any] = {"img_size": size}
    if library == "timm":
        from timm import create_model as build
    elif library == "torchvision":
        from torchvision.models import get_model as build

        options, sized = {"weights": None}, {"image_size": size[0]}
    else:
        raise ValueError(f"backbone must be timm:NAME or torchvision:NAME, got {name!r}")
    try:
        try:
            return build(architecture, **options, **sized)
        except TypeError:  # most networks take any size, and no argument for it
            return build(architecture, **options)
    except (RuntimeError, ValueError, KeyError) as e:
        raise ValueError(f"backbone {name!r} cannot be built: {e}") from e


def _layers(network: nn.Module, size: tuple[int, int]) -> dict[str, nn.Module]:
    """The innermost layers that have weights, by name, in the order in which images pass them."""
    passed: dict[str, nn.Module] = {}
    watched = copy.deepcopy(network)
    for name, layer in watched.named_modules():
        if not any(layer.children()) and any(True for _ in layer.parameters()):
            layer.register_forward_hook(lambda m, *_, name=name: passed.setdefault(name, m) and None)
    row_size(watched, size, "evaluation")
    return passed


def _stem(layers: dict[str, nn.Module]) -> Iterator[str]:
    """The names of the first layer and of the normalisation that follows it in the same module."""
    first, *rest = layers
    yield first
    for name in rest:
        if name.rpartition(".")[0] != first.rpartition(".")[0] or "Norm" not in type(layers[name]).__name__:
            return
        yield name
