"""Any backbone in two streams: its first layer for each modality, everything after it shared.

Two streams and BNNeck as in ECUL: https://arxiv.org/abs/2412.19134
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecul.common.names import printable
from ecul.common.pretrained import SIDE, Pretrained
from ecul.common.weights import read_weights, require_tensors
from ecul.data.images import check_modality
from ecul.model import TwoStreamResNet, make_neck, neck_rows, output_size

LIBRARIES: dict[str, tuple[str, dict[str, Any], Callable[[tuple[int, int]], dict[str, Any]]]] = {
    # the function that builds a network by its name, its arguments, and those that tell it the images' size
    "timm": ("timm.create_model", {"pretrained": False, "num_classes": 0}, lambda size: {"img_size": size}),
    "torchvision": ("torchvision.models.get_model", {"weights": None}, lambda size: {"image_size": size[0]}),
}


class PerModality(nn.Module):
    """A layer that each modality has for itself. stream: whose rows come, or how many are visible ones."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.visible, self.infrared = layer, copy.deepcopy(layer)
        self.stream: str | int = "visible"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.stream, str):
            return getattr(self, self.stream)(x)
        parts = zip((self.visible, self.infrared), x.tensor_split([self.stream]), strict=True)
        return torch.cat([layer(part) for layer, part in parts if len(part)])


class TwoStream(Pretrained):
    """A network of timm, of torchvision or of one's own as a model of two modalities.

        model = TwoStream("timm:convnext_tiny", (288, 144))       # from the shell: --set backbone=timm:...
        model = TwoStream("torchvision:resnet18", (288, 144))
        model = TwoStream(network, (288, 144))                    # with the weights that it has

    The stem, which each modality has for itself, is the layer that the images enter, with the normalisation
    beside it: a ResNet's conv1 and bn1, the patches of a ConvNeXt or a ViT; both start equal. All after it is
    shared, both modalities in one batch, and ends in a BNNeck as in `TwoStreamResNet`. The classifier of a
    torchvision model is taken away; timm's have none with `num_classes=0`. input_size: (H, W); where a
    network must know it, as ViTs do, it is told (torchvision's take squares alone).

    A model by name is saved with it and loaded by `load_model`, so by every command. One's own network is
    loaded by `TwoStream.from_pretrained(path, network)`. Errors: ValueError, before any work, for an unknown
    name or a network that gives no rows (N, num_features) of these images; ImportError without its package.
    """

    def __init__(self, network: str | nn.Module, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.input_size = (input_size[0], input_size[1])
        named = isinstance(network, str)
        self.network = _build(network, self.input_size) if isinstance(network, str) else network
        self.settings = {"network": network if named else type(network).__name__, "input_size": [*input_size]}
        self.classifier = _classifiers(self.network)
        layers = _layers(self.network, self.input_size)
        if named and isinstance(layers[-1][1], nn.Linear) and str(network).startswith("torchvision:"):
            self.classifier += (layers[-1][0],)
            self.network.set_submodule(layers[-1][0], nn.Identity())
        self.num_features = output_size(self.network, self.input_size)
        self.stems = tuple(_stem(layers))
        for name in self.stems:
            self.network.set_submodule(name, PerModality(self.network.get_submodule(name)))
        self.bottleneck = make_neck(self.num_features)

    def forward(self, visible: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
        """Unit embeddings (A + B, num_features) float32 of (A, 3, H, W) and (B, 3, H, W), visible first."""
        return self._rows(torch.cat([visible, infrared]), len(visible))

    def embed(self, x: torch.Tensor, modality: str) -> torch.Tensor:
        """Unit embeddings (N, num_features) float32 of images of one modality, "visible" or "infrared"."""
        check_modality(modality)
        return self._rows(x, modality)

    def _rows(self, x: torch.Tensor, stream: str | int) -> torch.Tensor:
        for name in self.stems:
            stem = self.network.get_submodule(name)
            if stem.stream != stream:
                stem.stream = stream  # type: ignore[assignment]
        return neck_rows(self.bottleneck, self.network(x))

    def load_backbone(self, path: str | Path) -> None:
        """Start from the network's own state dict in a local file; both stems start equal.

        path: `.safetensors`, or a `.pth` read with weights only; the classifier is left out. Errors:
        ValueError that lists every other key that is missing, unknown or of another shape.
        """
        state = read_weights(path)
        require_tensors(state, path)
        renamed = {}
        for name, value in state.items():
            layer, _, leaf = name.rpartition(".")
            if not any(f"{name}.".startswith(f"{end}.") for end in self.classifier):
                kinds = (".visible", ".infrared") if layer in self.stems else ("",)
                renamed.update(
                    {f"network.{layer}{kind}.{leaf}" if layer else f"network.{leaf}": value for kind in kinds}
                )
        self.load(renamed, path, own=("bottleneck.",))

    def described(self) -> str:
        """What it is, for an error message."""
        return f"this {self.settings['network']}"

    @classmethod
    def from_pretrained(cls, path: str | Path, network: nn.Module | None = None) -> "TwoStream":
        """The model saved in a run or another directory; network: a fresh one where it was one's own.

        Errors: FileNotFoundError; ValueError for another kind of model, or one that only its owner can build.
        """
        saved = cls._read(path, {"input_size": (SIDE, SIDE)})
        name = saved.metadata.get("network", "")
        if network is None and ":" not in name:
            raise ValueError(
                f"{saved.file} holds one's own {printable(name)}: "
                "TwoStream.from_pretrained(path, network) loads it"
            )
        return cls(name if network is None else network, tuple(saved.about["input_size"]))._filled(saved)


def load_model(path: str | Path) -> TwoStreamResNet | TwoStream:
    """The model saved at this path, a `TwoStream` or a `TwoStreamResNet`, in eval mode."""
    kind = TwoStream if TwoStream.holds(path) else TwoStreamResNet
    return kind.from_pretrained(path)


def _build(name: str, size: tuple[int, int]) -> nn.Module:
    library, _, architecture = name.partition(":")
    if library not in LIBRARIES or not architecture:
        raise ValueError(f"backbone must be timm:NAME or torchvision:NAME, got {name!r}")
    function, arguments, sized = LIBRARIES[library]
    module, _, attribute = function.rpartition(".")
    try:
        build = getattr(importlib.import_module(module), attribute)
    except ImportError as e:
        raise ImportError(f"backbone {name!r} needs {library}: pip install {library}") from e
    try:
        try:
            return build(architecture, **arguments, **sized(size))
        except TypeError:  # most networks take any size, and no argument for it
            return build(architecture, **arguments)
    except (RuntimeError, ValueError, KeyError) as e:
        raise ValueError(f"backbone {name!r} cannot be built: {e}") from e


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    """Where timm says that a network's classifier is, or was before `num_classes=0`."""
    named = getattr(network, "default_cfg", {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _layers(network: nn.Module, size: tuple[int, int]) -> list[tuple[str, nn.Module]]:
    """The innermost layers that have weights, and their names, in the order in which images pass them."""
    passed: dict[str, nn.Module] = {}
    innermost = ((name, m) for name, m in network.named_modules() if not any(m.children()))
    leaves = [(name, m) for name, m in innermost if any(True for _ in m.parameters())]
    with _watched(leaves, passed):
        output_size(network, size)
    return list(passed.items())


@contextmanager
def _watched(leaves: list[tuple[str, nn.Module]], passed: dict[str, nn.Module]) -> Iterator[None]:
    handles = [
        m.register_forward_hook(lambda module, *_, name=name: passed.setdefault(name, module) and None)
        for name, m in leaves
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stem(layers: list[tuple[str, nn.Module]]) -> Iterator[str]:
    """The names of the first layer and of the normalisation that follows it in the same module."""
    (first, _), *rest = layers
    yield first
    for name, layer in rest:
        if name.rpartition(".")[0] != first.rpartition(".")[0] or "Norm" not in type(layer).__name__:
            return
        yield name
