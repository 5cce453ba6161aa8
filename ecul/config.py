"""Every number of a run, in one flat frozen dataclass.

    Config.preset("sysu")                                  # the library's default: the united method
    Config.preset("regdb", method="mbccm", seed=1)

A method and a data set are rows of numbers here, never branches elsewhere: the loop reads weights and sizes.
A loss with weight 0 is not computed. Exception: the agnostic losses, if consistency reads their memories.
[R] marks our reconstruction where the papers' public description is silent. TSMem, ECUL's two-step memory
updating, runs if `update_rule` is "tsmem". Of the methods only "ecul" sets this.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ecul import MODALITIES
from ecul.common.files import read_json, reading
from ecul.common.names import did_you_mean

# Stage 2 of the three methods: ECUL has joint clusters and no matched pairs, MBCCM pairs and consistency.
# United has MBCCM's agnostic memories on matches of its own [R] alone; scripts/results/tuning-gap.md has why.
METHODS: dict[str, dict[str, Any]] = {
    "united": {},
    "ecul": {
        "update_rule": "tsmem", "pairs": "joint", "exchanged_stem": "visible",
        "weight_joint": 0.7, "weight_agnostic": 0.0,
    },
    "mbccm": {
        "weight_instance": 0.0, "weight_consistency": 0.5, "linear_transform": True, "k3": None,
        "matching": "bilateral", "exchanged_stem": "visible",
        "identities": 12, "instances": 12, "iterations": 300,
        "epochs_intra": 40, "epochs_cross": 40, "lr_milestones": (20, 50, 70),
    },
}  # fmt: skip

DATASETS: dict[str, dict[str, Any]] = {
    "sysu": {},
    "regdb": {
        "eps": 0.3, "eps_joint": 0.3, "k1_joint": 38, "k2_joint": 10, "k3_joint": 38, "iterations": 100,
    },
    "llcm": {},
    "demo": {
        "depth": 10, "width": 32, "size": (64, 32), "pad": 4,
        "identities": 8, "instances": 4, "iterations": 40,
        "epochs_intra": 10, "epochs_cross": 14, "tsmem_switch": 10, "lr": 1e-3, "lr_milestones": (16, 21),
        "k1": 12, "k2": 4, "k1_joint": 20, "k2_joint": 4, "k3_joint": 20,
    },
}  # fmt: skip


class Rule(NamedTuple):
    """What a value must do, in words and as a test; the names to choose from, where there are any."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple = ()

    def or_none(self) -> "Rule":
        return Rule(f"{self.words}, or None", lambda v: v is None or self.holds(v))

    def require(self, name: str, value: Any) -> None:
        if not self.holds(value):
            raise ValueError(f"{name} must {self.words}, got {value!r}{did_you_mean(value, self.choices)}")


def _at_least(least: int) -> Rule:
    return Rule(f"be a whole number of at least {least}", lambda v: type(v) is int and v >= least)


def _number(words: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(f"be a number {words}", lambda v: type(v) in (int, float) and abs(v) < math.inf and holds(v))


def _one_of(*choices: str | int) -> Rule:
    told = f"be one of {', '.join(map(str, choices))}"  # the type too: 50.0 and True are no whole numbers
    return Rule(told, lambda v: type(v) is type(choices[0]) and v in choices, choices)


FLAG = Rule("be True or False", lambda v: isinstance(v, bool))
ABOVE_0 = _number("above 0", lambda v: v > 0)
NOT_NEGATIVE = _number("of at least 0", lambda v: v >= 0)
DISTANCE = _number("in (0, 1]", lambda v: 0 < v <= 1)
MOMENTUM = _number("in [0, 1)", lambda v: 0 <= v < 1)
FILE = Rule("be the path of a file", lambda v: isinstance(v, str))
BACKBONE = Rule("be timm:NAME or torchvision:NAME", lambda v: str(v).startswith(("timm:", "torchvision:")))
EPOCHS = Rule(
    "be whole numbers like (20, 40, 60)",
    lambda v: isinstance(v, tuple) and all(map(_at_least(0).holds, v)),
)
SEED = Rule("be a whole number from 0 to 2**63 - 1", lambda v: type(v) is int and 0 <= v < 2**63)
PIXELS = Rule(
    "be (height, width), whole numbers of at least 16 pixels",
    lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_at_least(16).holds, v)),
)


def _plain(value: Any) -> Any:
    """The value as JSON and the rules know it: no NumPy scalar, no path object."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _held(default: Any, rule: Rule, about: str) -> Any:
    """A field of this default that keeps a rule; about: what it is, for a list of all fields."""
    return field(default=default, metadata={"rule": rule, "about": about})


@dataclass(frozen=True)
class Config:
    """All settings of a training run; the defaults are those of the united method on SYSU-MM01.

    Each field's metadata has its `rule` and what it is `about`. Errors: an unknown field or value is a
    ValueError that names the nearest real one.
    """

    method: str = _held("united", _one_of(*METHODS), "the method that the other fields come from")

    # network: the two-stream ResNet, or any backbone in two streams
    backbone: str | None = _held(None, BACKBONE.or_none(), "another network than the two-stream ResNet")
    depth: int = _held(50, _one_of(10, 18, 34, 50, 101), "layers of the ResNet")
    width: int = _held(64, _at_least(1), "channels of the ResNet's first stage")
    non_local: bool = _held(False, FLAG, "non-local blocks in the ResNet's layer2 and layer3")
    weights: str | None = _held(None, FILE.or_none(), "the backbone's first weights, .safetensors or .pth")
    size: tuple[int, int] = _held((288, 144), PIXELS, "height and width of the images")
    stem_stride: int = _held(2, _one_of(1, 2), "stride of the ResNet's stem: 1 for small images")

    # batches: identities x instances images from each modality
    identities: int = _held(8, _at_least(2), "P, the clusters in a batch")
    instances: int = _held(16, _at_least(1), "K, the images of each cluster in a batch")
    iterations: int = _held(200, _at_least(1), "steps of an epoch")
    pairs: str = _held("matched", _one_of("matched", "joint"), "clusters of a batch in stage 2; joint [R]")
    matching: str = _held("mutual", _one_of("bilateral", "mutual"), "cluster matching; mutual [R]")
    pad: int = _held(10, _at_least(0), "pixels of zeros around an image before it is cropped")
    linear_transform: bool = _held(False, FLAG, "MBCCM's linear transform of view 1")
    # with "infrared", mutual matching extracts the visible images three times more
    exchanged_stem: str = _held("infrared", _one_of(*MODALITIES), "stem of exchanged views in stage 2 [R]")

    # schedule; epochs are counted over the whole run
    epochs_intra: int = _held(25, _at_least(0), "epochs of stage 1, within the modalities")
    epochs_cross: int = _held(50, _at_least(0), "epochs of stage 2, across the modalities")
    lr: float = _held(3.5e-4, ABOVE_0, "Adam's learning rate at the start")
    weight_decay: float = _held(5e-4, NOT_NEGATIVE, "Adam's weight decay")
    lr_milestones: tuple[int, ...] = _held((20, 40, 60), EPOCHS, "epochs that multiply the rate by lr_gamma")
    lr_gamma: float = _held(0.1, ABOVE_0, "factor of the learning rate at each milestone")

    # clustering, all sizes [R]
    k1: int = _held(30, _at_least(1), "neighbours of an image within its modality")
    k2: int = _held(6, _at_least(1), "EMCC's small area within a modality")
    k3: int | None = _held(12, _at_least(1).or_none(), "EMCC's large area; None: plain Jaccard clustering")
    k1_joint: int = _held(40, _at_least(1), "k1 of both modalities together")
    k2_joint: int = _held(16, _at_least(1), "k2 of both modalities together")
    k3_joint: int | None = _held(40, _at_least(1).or_none(), "k3 of both modalities together")
    eps: float = _held(0.6, DISTANCE, "DBSCAN's radius within a modality")
    eps_joint: float = _held(0.6, DISTANCE, "DBSCAN's radius for both modalities together")
    min_samples: int = _held(4, _at_least(1), "DBSCAN's neighbours of a core point, itself among them")
    k_select: int | None = _held(4, _at_least(1).or_none(), "instance selection [R]; None keeps every image")

    # memories; TSMem has a momentum of its own, 0
    temp: float = _held(0.05, ABOVE_0, "temperature of the losses")
    momentum: float = _held(0.1, MOMENTUM, "part of a memory's old row that an update keeps")
    update_rule: str = _held(
        "sequential",
        _one_of("tsmem", "sequential", "mean", "instance", "hard"),
        'how memories move; "tsmem" runs TSMem, in both stages',
    )
    tsmem_switch: int = _held(25, _at_least(0), "epoch at which TSMem's second step begins [R]")

    # loss weights
    weight_instance: float = _held(1.0, NOT_NEGATIVE, "of the instance-level losses")
    weight_joint: float = _held(0.0, NOT_NEGATIVE, "of the losses of joint clusters [R]")
    weight_agnostic: float = _held(0.9, NOT_NEGATIVE, "of the modality-agnostic losses")
    weight_consistency: float = _held(0.0, NOT_NEGATIVE, "of the consistency constraint")

    # engine
    # the same seed, the same weights: bit for bit on a CPU with as many threads, on a GPU up to rounding
    seed: int = _held(0, SEED, "of everything that is drawn")
    precision: str = _held("auto", _one_of("auto", "fp32", "bf16"), "auto: bf16 on a GPU that has it")
    compile: bool = _held(False, FLAG, "torch.compile the network")
    checkpointing: bool = _held(False, FLAG, "recompute activations in backward: less memory, more time")
    batch_extract: int = _held(256, _at_least(1), "images that are embedded at once")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            value = tuple(map(_plain, value)) if isinstance(value, list | tuple) else _plain(value)
            object.__setattr__(self, f.name, value)
            f.metadata["rule"].require(f.name, value)
        for small, large in (("k2", "k3"), ("k2_joint", "k3_joint")):
            least, most = getattr(self, small), getattr(self, large)
            if most is not None and most < least:
                told = f"at least {small}, or None for plain clustering, got {most} and {least}"
                raise ValueError(f"{large} must be {told}")
        if self.pairs == "joint" and (self.weight_joint == 0 or self.reads_matches):
            told = "set weight_joint above 0, weight_agnostic and weight_consistency to 0"
            raise ValueError(f'pairs="joint" draws joint clusters, and no matched pairs: {told}')

    def exchanged_crosses(self, stage: int) -> bool:
        """Whether channel-exchanged views pass the infrared stem in this stage."""
        return stage == 2 and self.exchanged_stem == "infrared"

    @property
    def reads_matches(self) -> bool:
        """Whether a loss of stage 2 reads which clusters were matched: agnostic contrast, or consistency."""
        return max(self.weight_agnostic, self.weight_consistency) > 0

    @property
    def epochs(self) -> int:
        """Epochs of the whole run: stage 1 (intra-modality), then stage 2 (cross-modality)."""
        return self.epochs_intra + self.epochs_cross

    @classmethod
    def preset(cls, dataset: str, method: str = "united", **overrides: Any) -> "Config":
        """The settings of `dataset` ("sysu", "regdb", "llcm", "demo") with `method`, then `overrides`.

        Source: the papers' implementation details. "demo" is our own small recipe for the synthetic world on
        two CPU cores.
        """
        _one_of(*DATASETS).require("dataset", dataset)
        _one_of(*METHODS).require("method", method)
        return cls.from_dict({**METHODS[method], **DATASETS[dataset], "method": method, **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The configuration with these fields; a name that is no field is an error with the nearest one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                hint = did_you_mean(name, names)
                raise ValueError(f"Config has no field {name!r}{hint}; its fields are {', '.join(names)}")
        return cls(**values)

    def replace(self, **overrides: Any) -> "Config":
        """A copy with some fields changed. Errors: ValueError for another method: it has other fields too."""
        if overrides.get("method", self.method) != self.method:
            raise ValueError(f"replace keeps the method {self.method}; take Config.preset(..., method=...)")
        return type(self).from_dict({**self.to_dict(), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def read_fields(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of Config in a JSON file, for example the `config.json` of a run.

    Errors: those of `reading`.
    """
    with reading(path):
        return {name: value for name, value in read_json(path).items() if name != "model"}
