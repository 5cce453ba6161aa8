"""The two-stream ResNet: a stem per modality, everything after it shared.

ResNet: https://arxiv.org/abs/1512.03385, two-stream and BNNeck as in ECUL: https://arxiv.org/abs/2412.19134
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ecul import MODALITIES
from ecul.common.pretrained import SIDE, WIDTH, Pretrained
from ecul.common.weights import read_weights, require_tensors
from ecul.data.images import check_modality
from ecul.features import evaluating

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; torchvision's names."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; torchvision's names (stride on the 3x3)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class Pointwise(nn.Conv2d):
    """A 1x1 convolution with a stride, of every stride-th pixel: the same numbers, without a crash.

    torch's own strided backward on CPUs (oneDNN, torch 2.13) ends the process with a segmentation fault where
    the layout is channels_last and the inputs are 3 to 8 channels.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight)


class NonLocal(nn.Module):
    """Non-local block with one inner channel, starting as the identity (as in AGW's published code)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g, self.theta, self.phi = (nn.Conv2d(channels, 1, 1) for _ in range(3))
        norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(norm.weight)
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, theta, phi = (m(x).flatten(2) for m in (self.g, self.theta, self.phi))
        attention = theta.transpose(1, 2) @ phi / theta.shape[2]
        y = (attention @ g.transpose(1, 2)).transpose(1, 2)
        return x + self.W(y.reshape(x.shape[0], 1, *x.shape[2:]))


class Stem(nn.Module):
    """conv1, bn1, relu, maxpool of a ResNet: the part that each modality has for itself."""

    def __init__(self, width: int, stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, width, 7, stride), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)


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


def output_size(network: nn.Module, size: tuple[int, int]) -> int:
    """The D of the rows (N, D) that a network gives of images of this size, from one batch of it.

    Errors: ValueError for a network that cannot take such images, or gives something else.
    """
    parameter = next(network.parameters(), torch.empty(0))
    images = torch.zeros(2, 3, *size, device=parameter.device)
    with evaluating(network), torch.no_grad():
        try:
            rows = network(images)
        except (RuntimeError, ValueError, TypeError, AssertionError) as e:
            raise ValueError(f"model: {type(network).__name__} takes no images of {size} pixels: {e}") from e
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or len(rows) != 2:
        got = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise ValueError(
            f"model: {type(network).__name__} should give rows (2, num_features) of two images, got {got}; "
            "it needs its pooling, and no classifier (timm: num_classes=0)"
        )
    return rows.shape[1]


class Backbone(Pretrained):
    """Somebody's own network in the place of `TwoStreamResNet`, one for both modalities.

        embed(x, modality) = F.normalize(network(x), dim=1)

    network: any module with `num_features` that maps (N, 3, H, W) to (N, num_features); input_size: (H, W),
    which `extract` resizes to. `train(..., model=network)` makes one; afterwards
    `Backbone.from_pretrained(run, network)` is what `extract`, `export` and `report` take as a model.
    Errors: TypeError for a network without `num_features`; ValueError, before any work, where one batch gives
    rows of another size.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int]) -> None:
        super().__init__()
        if not hasattr(network, "num_features"):
            raise TypeError(
                f"model must have `num_features`, its embedding's size; {type(network).__name__} has not"
            )
        if (given := output_size(network, input_size)) != network.num_features:
            raise ValueError(
                f"model: its rows have {given} features where num_features says {network.num_features}; "
                "build it without its classifier (timm: num_classes=0)"
            )
        self.network, self.num_features, self.input_size = network, network.num_features, tuple(input_size)
        self.settings = {"network": type(network).__name__, "input_size": list(input_size)}

    def forward(self, visible: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
        """Unit embeddings of both modalities, visible rows first."""
        return self.embed(torch.cat([visible, infrared]), "both")

    def embed(self, x: torch.Tensor, modality: str) -> torch.Tensor:
        """Unit embeddings (N, num_features) float32; the modality makes no difference to this network."""
        return F.normalize(self.network(x).float(), dim=1)

    def described(self) -> str:
        """What it is, for an error message."""
        return f"this {self.settings['network']}"

    @classmethod
    def from_pretrained(cls, path: str | Path, network: nn.Module) -> "Backbone":
        """`network` with the weights that `train` wrote into a run directory, ready for `extract`.

        network: a fresh module of the class that was trained. Errors: FileNotFoundError; ValueError for
        another kind of model, or with the list of what does not fit.
        """
        saved = cls._read(path, {"input_size": (SIDE, SIDE)})
        return cls(network, saved.about["input_size"])._filled(saved)


class TwoStreamResNet(Pretrained):
    """Unit embeddings of visible and infrared images.

        features = model(visible, infrared)          # training: (A + B, num_features), visible rows first
        features = model.embed(images, "infrared")   # one modality: (N, num_features)

    Inputs are normalised float images (N, 3, H, W) (`ecul.augment.normalize`); both modalities pass the
    shared layers in one batch, so that batch-norm statistics are joint. Last stride 1, GeM pooling (p = 3,
    eps 1e-12), BNNeck with its bias frozen at 0; the embedding is the L2-normalised output of the neck.

    depth: 10 or 18 (small machines), 34, 50 (as published), 101; width: channels of the first stage, 64 as
    published; non_local: two non-local blocks in layer2 and three in layer3; input_size: (H, W) in pixels,
    which `extract` resizes to; stem_stride: 2 as published, 1 keeps the detail of small images. Errors:
    ValueError for another depth.
    Source: ECUL and MBCCM, implementation details; their published code.
    """

    def __init__(
        self,
        depth: int = 50,
        width: int = 64,
        non_local: bool = False,
        input_size: tuple[int, int] = (288, 144),
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth!r}")
        self.settings = {
            "depth": depth,
            "width": width,
            "non_local": non_local,
            "input_size": list(input_size),
            "stem_stride": stem_stride,
        }
        self.input_size = tuple(input_size)
        self.checkpointing = False  # recompute each block in backward instead of storing its activations
        block = Bottleneck if depth >= 50 else BasicBlock
        self.visible, self.infrared = Stem(width, stem_stride), Stem(width, stem_stride)
        inputs = width
        for stage, (count, stride) in enumerate(zip(BLOCKS[depth], (1, 2, 2, 1), strict=True), 1):
            layers = []
            for i in range(count):
                layers.append(block(inputs, width * 2 ** (stage - 1), stride if i == 0 else 1))
                inputs = width * 2 ** (stage - 1) * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.non_local = _non_local(width * block.expansion, BLOCKS[depth]) if non_local else nn.ModuleDict()
        self.num_features = inputs
        self.float()  # whatever torch's default is
        self._initialize()
        self.bottleneck = make_neck(inputs)

    def _initialize(self) -> None:
        if self.visible.conv1.weight.is_meta:  # shapes alone are wanted
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.infrared.load_state_dict(self.visible.state_dict())

    def forward(self, visible: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
        """Unit embeddings (A + B, num_features) float32 of (A, 3, H, W) and (B, 3, H, W), visible first."""
        streams = ((self.visible, visible), (self.infrared, infrared))
        return self._shared(torch.cat([stem(x) for stem, x in streams if len(x)]))

    def embed(self, x: torch.Tensor, modality: str) -> torch.Tensor:
        """Unit embeddings (N, num_features) float32 of images of one modality, "visible" or "infrared"."""
        check_modality(modality)
        return self._shared(getattr(self, modality)(x))

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        for stage in range(1, 5):
            for i, block in enumerate(getattr(self, f"layer{stage}")):
                recompute = self.checkpointing and self.training and torch.is_grad_enabled()
                x = _checkpointed(block, x) if recompute else block(x)
                if f"{stage}_{i}" in self.non_local:
                    x = self.non_local[f"{stage}_{i}"](x)
        pooled = (x.float().pow(3).mean(dim=(2, 3)) + 1e-12).pow(1 / 3)
        return neck_rows(self.bottleneck, pooled)

    def load_backbone(self, path: str | Path) -> None:
        """Start from a torchvision ResNet state dict in a local file; both stems start equal.

        path: `.safetensors`, or a `.pth` read with weights only. The classifier `fc.*` is left out. Every
        other key must fit: a missing, unknown or wrongly shaped one is a ValueError that lists them.
        """
        state = read_weights(path)
        require_tensors(state, path)
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
        stem = {k: state.pop(k) for k in list(state) if k.startswith(("conv1.", "bn1."))}
        state.update({f"{m}.{k}": v for m in MODALITIES for k, v in stem.items()})
        self.load(state, path, own=("bottleneck.", "non_local."))

    def described(self) -> str:
        """What it is, for an error message."""
        return f"a ResNet-{self.settings['depth']} of width {self.settings['width']}"

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "TwoStreamResNet":
        """The model saved in a directory (a run directory, too) or in a `model.safetensors` file."""
        schema = {"depth": set(BLOCKS), "width": WIDTH, "non_local": bool, "input_size": (SIDE, SIDE)}
        return cls._build(cls._read(path, schema, {"stem_stride": {1, 2}}))  # the last not in old files


def _checkpointed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`block(x)`, computed again in backward; the running statistics move once, as without it."""
    if torch.compiler.is_compiling():  # the compiler keeps the second run free of side effects by itself
        return checkpoint(block, x, use_reentrant=False)
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @contextmanager
    def statistics_kept() -> Iterator[None]:
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, kept in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = kept

    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept()))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(Pointwise(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _non_local(channels: int, counts: tuple[int, ...]) -> nn.ModuleDict:
    """Blocks after the last two of layer2 and the last three of layer3, by the name "stage_index"."""
    places = [(stage, i) for stage, last in ((2, 2), (3, 3)) for i in range(counts[stage - 1])[-last:]]
    return nn.ModuleDict({f"{stage}_{i}": NonLocal(channels * 2 ** (stage - 1)) for stage, i in places})
