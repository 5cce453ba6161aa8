"""The network of a run, its optimiser and its learning rate."""

import logging
import threading

import torch
from torch.nn.parallel import DistributedDataParallel

from ecul.common import distributed
from ecul.config import Config
from ecul.features import require_model
from ecul.model import TwoStreamResNet
from ecul.streams import Backbone, TwoStream, row_size

log = logging.getLogger("ecul")
DRAWING = threading.Lock()  # one network at a time draws its weights from torch's default generator


def build_model(
    config: Config, device: torch.device, model: torch.nn.Module | None = None
) -> torch.nn.Module:
    """The user's network, or the one of this configuration, initialised from its seed only."""
    if model is None:
        with DRAWING, torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(config.seed)
            if config.backbone is None:
                sizes = (config.depth, config.width, config.non_local, config.size, config.stem_stride)
                model = TwoStreamResNet(*sizes)
            else:
                model = TwoStream(config.backbone, config.size)
        if config.weights is not None:
            model.load_backbone(config.weights)
    else:
        model = _own_model(model, config)
    if hasattr(model, "checkpointing"):
        model.checkpointing = config.checkpointing  # type: ignore[assignment]
    elif config.checkpointing:
        name = config.backbone or type(model).__name__
        raise ValueError(f"checkpointing is for TwoStreamResNet, not for {name}")
    if distributed.size() > 1 and device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _own_model(model: torch.nn.Module, config: Config) -> torch.nn.Module:
    """The user's network, wrapped unless it has `embed`. Errors: ValueError for settings it cannot follow."""
    if config.weights is not None:
        raise ValueError("weights are for the network that train builds; load your own model's before")
    if other := [k for k, v in model.state_dict().items() if not isinstance(v, torch.Tensor)]:
        raise ValueError(f"model: its state_dict holds {other[0]}, which is no tensor and cannot be saved")
    if not hasattr(model, "embed"):
        return Backbone(model, config.size)
    require_model(model)
    size = tuple(model.input_size)  # type: ignore[arg-type]
    if size != config.size:
        raise ValueError(f"model: its input_size is {size}, config.size is {config.size}; make them equal")
    if not isinstance(model, TwoStreamResNet | Backbone):  # which give what they should
        row_size(model, size, "training", 2)
    return model


def trainable(model: torch.nn.Module, config: Config) -> torch.nn.Module:
    """The model as the batches see it: in parallel over processes, compiled if asked for."""
    if distributed.size() > 1:  # joint batches may hold one modality alone, and leave the other's stem unused
        model = DistributedDataParallel(model, find_unused_parameters=config.pairs == "joint")
    return torch.compile(model) if config.compile else model  # type: ignore[return-value]


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam over every parameter that learns."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, config: Config, epoch: int) -> None:
    """Step decay: the rate is multiplied by lr_gamma at each milestone reached."""
    reached = sum(epoch >= milestone for milestone in config.lr_milestones)
    optimizer.param_groups[0]["lr"] = config.lr * config.lr_gamma**reached


def uses_bf16(config: Config, device: torch.device) -> bool:
    """Whether network and losses run under bf16 autocast: asked for, or "auto" on a GPU that has it."""
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return config.precision == "bf16"


def warn_about_start(config: Config, device: torch.device) -> None:
    """Warn about random initial weights, and about a large network on a CPU."""
    if config.backbone is None and config.depth < 50:
        return
    if config.weights is None:
        log.warning("weights is None: the network starts from random weights, not ImageNet's as published")
    if device.type == "cpu":
        name = config.backbone or f"ResNet-{config.depth}"
        log.warning("a %s takes hours an epoch on a CPU; preset 'demo' takes seconds", name)
