"""Every number of a run, in one flat frozen dataclass.

    Config.preset("sysu")                                  # the library's default: the united method
    Config.preset("regdb", method="mbccm", seed=1)

A method and a data set are rows of numbers here, never branches elsewhere: the loop reads weights and
sizes, and a loss whose weight is 0 is not computed. Values marked [R] are our reconstruction where the
papers' public description is silent.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from ecul.common.names import did_you_mean

# Stage 2 of the three methods: MBCCM has no instance and no joint loss, ECUL no matched pairs. TSMem is
# ECUL's alone: united moves its memories as MBCCM does, which was better in scripts/ablation.
METHODS: dict[str, dict[str, Any]] = {
    "united": {},
    "ecul": {"update_rule": "tsmem", "pairs": "joint", "weight_agnostic": 0.0, "weight_consistency": 0.0},
    "mbccm": {
        "weight_instance": 0.0,
        "weight_joint": 0.0,
        "linear_transform": True,
        "k3": None,
        "identities": 12,
        "instances": 12,
        "iterations": 300,
        "epochs_intra": 40,
        "epochs_cross": 40,
        "lr_milestones": (20, 50, 70),
    },
}

DATASETS: dict[str, dict[str, Any]] = {
    "sysu": {},
    "regdb": {
        "eps": 0.3,
        "eps_joint": 0.3,
        "k1_joint": 38,
        "k2_joint": 10,
        "k3_joint": 38,
        "iterations": 100,
    },
    "llcm": {},
    "demo": {
        "depth": 10,
        "width": 32,
        "size": (64, 32),
        "pad": 4,
        "identities": 8,
        "instances": 4,
        "iterations": 40,
        "epochs_intra": 10,
        "epochs_cross": 14,
        "tsmem_switch": 10,
        "lr": 1e-3,
        "lr_milestones": (16, 21),
        "k1": 12,
        "k2": 4,
        "k1_joint": 20,
        "k2_joint": 4,
        "k3_joint": 20,
    },
}


@dataclass(frozen=True)
class Config:
    """All settings of a training run; the defaults are those of ECUL on SYSU-MM01 with MBCCM's stage 2
    and updates.

    Errors: an unknown field or value is a ValueError that names the nearest real one.
    """

    method: str = "united"

    # network: the two-stream ResNet
    depth: int = field(default=50, metadata={"choices": (10, 18, 34, 50, 101)})
    width: int = 64
    non_local: bool = False
    weights: str | None = None  # a local torchvision ResNet state dict, .safetensors or .pth
    size: tuple[int, int] = (288, 144)  # height, width in pixels

    # batches: identities x instances images from each modality
    identities: int = 8
    instances: int = 16
    iterations: int = 200
    pairs: str = field(default="matched", metadata={"choices": ("matched", "joint")})  # joint [R]
    matching: str = field(default="bilateral", metadata={"choices": ("bilateral", "nearest")})
    pad: int = 10
    linear_transform: bool = False

    # schedule; epochs are counted over the whole run
    epochs_intra: int = 25
    epochs_cross: int = 50
    lr: float = 3.5e-4
    weight_decay: float = 5e-4
    lr_milestones: tuple[int, ...] = (20, 40, 60)
    lr_gamma: float = 0.1

    # clustering, all sizes [R]; k3=None is the plain k-reciprocal Jaccard clustering
    k1: int = 30
    k2: int = 6
    k3: int | None = 12
    k1_joint: int = 40
    k2_joint: int = 16
    k3_joint: int | None = 40
    eps: float = 0.6
    eps_joint: float = 0.6
    min_samples: int = 4
    k_select: int | None = 4  # inter-modality instance selection [R]; None keeps every image

    # memories
    temp: float = 0.05
    momentum: float = 0.1
    update_rule: str = field(
        default="sequential", metadata={"choices": ("tsmem", "sequential", "mean", "instance", "hard")}
    )
    tsmem_switch: int = 25  # TSMem's second step begins at this epoch [R]

    # loss weights
    weight_instance: float = 1.0
    weight_joint: float = 0.7  # [R]
    weight_agnostic: float = 0.9
    weight_consistency: float = 0.5

    # engine
    seed: int = (
        0  # the same weights again: bit for bit on a CPU with as many threads, on a GPU up to rounding
    )
    precision: str = field(default="auto", metadata={"choices": ("auto", "fp32", "bf16")})
    compile: bool = False
    checkpointing: bool = False  # recompute activations in backward: less memory, more time, the same result
    keep: str = field(default="last", metadata={"choices": ("last", "score")})
    batch_extract: int = 256

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(
                    f"{f.name} must be one of {_joined(choices)}, got {value!r}{did_you_mean(value, choices)}"
                )
            if isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
            if isinstance(value, os.PathLike):
                object.__setattr__(self, f.name, os.fspath(value))
        if self.method not in METHODS:
            raise ValueError(
                f"method must be one of {_joined(METHODS)}, got {self.method!r}"
                f"{did_you_mean(self.method, METHODS)}"
            )
        self._check_numbers()

    def _check_numbers(self):
        least = {
            "width": 1, "identities": 2, "instances": 1, "iterations": 1, "pad": 0, "epochs_intra": 0,
            "epochs_cross": 0, "k1": 1, "k2": 1, "k3": 1, "k1_joint": 1, "k2_joint": 1, "k3_joint": 1,
            "min_samples": 1, "k_select": 1, "tsmem_switch": 0, "seed": 0, "batch_extract": 1,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and name in ("k3", "k3_joint", "k_select"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        for name in ("non_local", "linear_transform", "compile", "checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("size", "lr_milestones"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(v, int) and v >= 0 for v in value):
                raise ValueError(f"{name} must be whole numbers like {Config.__dict__[name]}, got {value!r}")
        self._check_reals()
        if len(self.size) != 2 or min(self.size) < 16:
            raise ValueError(f"size must be (height, width) of at least 16 pixels each, got {self.size!r}")
        if self.pairs == "joint" and max(self.weight_agnostic, self.weight_consistency) > 0:
            raise ValueError(
                'pairs="joint" has no matched pairs: set weight_agnostic and weight_consistency to 0'
            )

    def _check_reals(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type in (float, "float") and (isinstance(value, bool) or not isinstance(value, float | int)):
                raise ValueError(f"{f.name} must be a number, got {value!r}")
        for name in ("lr", "temp", "eps", "eps_joint", "lr_gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in (
            "weight_decay",
            "weight_instance",
            "weight_joint",
            "weight_agnostic",
            "weight_consistency",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for small, large in (("k2", "k3"), ("k2_joint", "k3_joint")):
            if getattr(self, large) is not None and getattr(self, large) < getattr(self, small):
                got = f"{getattr(self, large)} and {getattr(self, small)}"
                raise ValueError(f"{large} must be at least {small}, or None for plain clustering, got {got}")
        if max(self.eps, self.eps_joint) > 1:
            raise ValueError(
                f"eps and eps_joint are Jaccard distances in (0, 1], got {self.eps} and {self.eps_joint}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")

    @property
    def epochs(self):
        """Epochs of the whole run: stage 1 (intra-modality), then stage 2 (cross-modality)."""
        return self.epochs_intra + self.epochs_cross

    @classmethod
    def preset(cls, dataset, method="united", **overrides):
        """The settings of `dataset` ("sysu", "regdb", "llcm", "demo") with `method`, then `overrides`.

        Source: the papers' implementation details. "demo" is our own small recipe for the synthetic world on
        two CPU cores.
        """
        for name, value, known in (("dataset", dataset, DATASETS), ("method", method, METHODS)):
            if value not in known:
                raise ValueError(
                    f"{name} must be one of {_joined(known)}, got {value!r}{did_you_mean(value, known)}"
                )
        return cls.from_dict({**METHODS[method], **DATASETS[dataset], "method": method, **overrides})

    @classmethod
    def from_dict(cls, values):
        """The configuration with these fields; a name that is no field is an error with the nearest one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                hint = did_you_mean(name, names)
                raise ValueError(f"Config has no field {name!r}{hint}; its fields are {_joined(names)}")
        return cls(**values)

    def replace(self, **overrides):
        """A copy with some fields changed."""
        return type(self).from_dict({**self.to_dict(), **overrides})

    def to_dict(self):
        """The fields as plain JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def _joined(names):
    return ", ".join(map(str, names))
