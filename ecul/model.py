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
from ecul.common.files import reading
from ecul.common.pretrained import COUNT, SIZE, Pretrained, weights_file
from ecul.common.weights import read_metadata
from ecul.data.images import check_modality
from ecul.streams import Backbone, TwoStream, make_neck, neck_rows

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


class TwoStreamResNet(Pretrained):
    """Unit embeddings of visible and infrared images.

        features = model(visible, infrared)          # training: (A + B, num_features), visible rows first
        features = model.embed(images, "infrared")   # one modality: (N, num_features)

    Inputs are normalised float images (N, 3, H, W) (`ecul.augment.normalize`); both modalities pass the
    shared layers in one batch, so batch-norm statistics are joint. The last stride is 1. After the pooling
    comes a BNNeck with its bias frozen at 0; the embedding is its L2-normalised output.

    depth: 10 or 18 (small machines), 34, 50 (as published), 101; width: channels of the first stage, 64 as
    published; non_local: two non-local blocks in layer2 and three in layer3; input_size: (H, W) in pixels,
    to which `extract` resizes; stem_stride: 2 as published, 1 keeps the detail of small images; gem: pool
    by GeM as published (p = 3, eps 1e-12), or by the average. Errors: ValueError for another depth.
    Source: ECUL and MBCCM, implementation details; their published code.
    """

    forms = {"depth": "10|18|34|50|101", "width": COUNT, "stem_stride": "1|2", "input_size": SIZE}
    forms |= {"non_local": "True|False", "gem": "True|False"}

    def __init__(
        self,
        depth: int = 50,
        width: int = 64,
        non_local: bool = False,
        input_size: tuple[int, int] = (288, 144),
        stem_stride: int = 2,
        gem: bool = True,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth!r}")
        self.settings = {"depth": depth, "width": width, "non_local": non_local}
        self.settings |= {"input_size": list(input_size), "stem_stride": stem_stride, "gem": gem}
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.infrared.load_state_dict(self.visible.state_dict())
        self.bottleneck = make_neck(inputs)

    def forward(self, visible: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
        """Unit embeddings (A + B, num_features) float32 of (A, 3, H, W) and (B, 3, H, W), visible first."""
        streams = ((self.visible, visible), (self.infrared, infrared))
        return self._shared(torch.cat([stem(x) for stem, x in streams if len(x)]))

    def embed(self, x: torch.Tensor, modality: str) -> torch.Tensor:
        """Unit embeddings (N, num_features) float32 of images of one modality, "visible" or "infrared"."""
        check_modality(modality)
        return self._shared(getattr(self, modality)(x))

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for stage in range(1, 5):
            for i, block in enumerate(getattr(self, f"layer{stage}")):
                x = _checkpointed(block, x) if recompute else block(x)
                if f"{stage}_{i}" in self.non_local:
                    x = self.non_local[f"{stage}_{i}"](x)
        x = x.float()
        gem = self.settings["gem"]
        pooled = (x.pow(3).mean((2, 3)) + 1e-12).pow(1 / 3) if gem else x.mean((2, 3))
        return neck_rows(self.bottleneck, pooled)

    def load_backbone(self, path: str | Path) -> None:
        """Start from a torchvision ResNet's weights in a local file, or from a trained model like this one.

        path: as in `read_foreign`. Both stems get the weights of the plain one; the classifier `fc.*` is left
        out. Errors: ValueError that lists every key that is missing, unknown or of another shape.
        """
        shared = [name for name in self.state_dict() if name.startswith("layer")]
        stem = self.visible.state_dict()
        homes = {name: (name,) for name in shared} | {k: tuple(f"{m}.{k}" for m in MODALITIES) for k in stem}
        self.start_from(path, homes, ("fc.",))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "TwoStreamResNet":
        """The model saved in a directory (a run directory, too) or in a `model.safetensors` file."""
        file, content, settings = cls._read(path)
        with reading(file), torch.device("meta"):
            model = cls(**settings)
        return model.load(content.tensors, file, content.sha256).eval()


def load_model(path: str | Path) -> TwoStreamResNet | Backbone:
    """The model saved at this path, a `TwoStream` or a `TwoStreamResNet`, in eval mode."""
    name = read_metadata(weights_file(path)).get("architecture")
    return (TwoStream if name == "TwoStream" else TwoStreamResNet).from_pretrained(path)


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
