"""Models that other code bases trained, brought in by the names of their weights.

One layout covers AGW and everything that grew from it (ADCA, PGM, MBCCM and the first author's code):

    visible_module.visible.{conv1,bn1}     the visible stem; the rest of that ResNet is never run
    thermal_module.thermal.{conv1,bn1}     the infrared stem, likewise
    base_resnet.base.layer1 ... layer4     the shared part; its conv1 and bn1 are never run
    NL_2.0 ... NL_3.2                      non-local blocks, where there are any
    bottleneck                             the neck; classifier and discriminator serve training alone

with or without `module.` in front, alone in the file or under "net" (AGW), "state_dict" (ADCA, PGM, MBCCM)
or "model". AGW: https://arxiv.org/abs/2001.04193, ADCA: https://arxiv.org/abs/2208.01711
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from ecul.common.names import shorten
from ecul.common.pretrained import WIDTH, Saved
from ecul.common.weights import read_weights, require_tensors
from ecul.model import BLOCKS, TwoStreamResNet

CONTAINERS = ("net", "state_dict", "model")
USED = {  # theirs -> ours
    r"visible_module\.visible\.((?:conv1|bn1)\..+)": r"visible.\1",
    r"thermal_module\.thermal\.((?:conv1|bn1)\..+)": r"infrared.\1",
    r"base_resnet\.base\.(layer[1-4]\..+)": r"\1",
    r"((?:bottleneck|NL_[23]\.\d+)\..+)": r"\1",
}
UNUSED = {
    "copies of the shared layers inside the stems": r"(visible_module\.visible|thermal_module\.thermal)"
    r"\.(layer[1-4]|fc)\..+",
    "a third stem inside the shared part": r"base_resnet\.base\.(conv1|bn1|fc)\..+",
    "what only training uses": r"(classifier|disnet|adnet|gem)\..+",
}
NON_LOCAL = re.compile(r"NL_([23])\.(\d+)\.(.+)")


def import_checkpoint(
    path: str | os.PathLike, input_size: tuple[int, int] = (288, 144)
) -> tuple[TwoStreamResNet, dict[str, list[str]]]:
    """The model of a published checkpoint, and what of the file was left out.

        model, unused = import_checkpoint("model_best.pth.tar")
        model.save_pretrained("imported")

    path: a `.pth` or `.tar` that `torch.save` wrote, read with weights only (plain NumPy figures beside the
    weights are let in, code never is), or a `.safetensors`. input_size: (H, W) in pixels that it was trained
    with, which the file does not say. Depth, width and non-local blocks follow from the shapes. Returns a
    `TwoStreamResNet` in eval mode whose `embed` gives the published test feature, (N, num_features) unit
    rows, and a dict from a reason to the names that were left out for it.
    Errors: FileNotFoundError; ValueError for an input_size below 16 pixels, for a file that is no checkpoint,
    or whose names or shapes do not all fit, with the list of them.
    Source: the key names of the published repositories.
    """
    path = Path(path)
    if min(input_size) < 16:
        raise ValueError(f"input_size must be (height, width) of at least 16 pixels, got {tuple(input_size)}")
    state = _open(path)
    renamed: dict[str, torch.Tensor] = {}
    unused: dict[str, list[str]] = {}
    unknown = []
    for name, value in state.items():
        if match := next(filter(None, (re.fullmatch(pattern, name) for pattern in USED)), None):
            renamed[match.expand(USED[match.re.pattern])] = value
        elif reason := next((r for r, pattern in UNUSED.items() if re.fullmatch(pattern, name)), None):
            unused.setdefault(reason, []).append(name)
        else:
            unknown.append(name)
    if "visible.conv1.weight" in state:
        raise ValueError(f"{path} is a model of this library already; use its directory as it is")
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of {len(state)} names belong to no known layout, "
            f"so nothing was imported: {shorten(unknown)}. Known are visible_module.visible.*, "
            "thermal_module.thermal.*, base_resnet.base.*, NL_*, bottleneck.* and what only training uses"
        )
    settings = {**_settings(renamed, path), "input_size": (input_size[0], input_size[1])}
    with torch.device("meta"):
        places = sorted(TwoStreamResNet(**settings).non_local)
    placed = _place_non_local(renamed, places, path)
    return TwoStreamResNet._build(Saved(path, placed, {}, settings)), unused


class _Figure:
    """In the place of NumPy's numbers and arrays (accuracies beside the weights), of which none is needed.

    NumPy's own makers would trust what the file says of their insides.
    """

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


NUMPY = [
    f"numpy.{home}.multiarray.{maker}" for home in ("core", "_core") for maker in ("_reconstruct", "scalar")
]
FIGURES: list[Any] = [(_Figure, name) for name in ("numpy.ndarray", "numpy.dtype", *NUMPY)]


def _open(path: Path) -> dict[str, torch.Tensor]:
    """The dict of tensors in a file, out of whatever it is wrapped in."""
    with torch.serialization.safe_globals(FIGURES):
        content = read_weights(path)
    for name in CONTAINERS:
        if isinstance(content.get(name), dict):
            content = content[name]
    require_tensors(content, path)
    while all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _settings(state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Depth, width and non-local blocks, from the names and shapes of the weights."""
    counts = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    )
    bottlenecks = "layer1.0.conv3.weight" in state
    depths = [d for d, blocks in BLOCKS.items() if blocks == counts and (d >= 50) == bottlenecks]
    stem = state.get("visible.conv1.weight", torch.empty(0))
    if not depths or len(stem.shape) != 4 or len(stem) not in WIDTH:
        raise ValueError(
            f"{path}: no ResNet with {counts} blocks in its four layers is known; depths are "
            f"{', '.join(map(str, BLOCKS))}, and the visible stem must be there, {WIDTH[-1]} channels at most"
        )
    return {
        "depth": depths[0],
        "width": len(stem),
        "non_local": any(NON_LOCAL.fullmatch(name) for name in state),
    }


def _place_non_local(
    state: dict[str, torch.Tensor], places: list[str], path: Path
) -> dict[str, torch.Tensor]:
    """`NL_2.1.g.0.weight` -> `non_local.2_3.g.weight`: a layer's n-th block, by where it stands."""
    placed = {}
    for name, value in state.items():
        if match := NON_LOCAL.fullmatch(name):
            stage, number, rest = match[1], int(match[2]), match[3].replace("g.0.", "g.")
            here = [place for place in places if place.startswith(f"{stage}_")]
            if number >= len(here):
                raise ValueError(
                    f"{path}: {name} is one non-local block too many; layer{stage} has {len(here)}"
                )
            if rest == "theta.weight" and len(value) != 1:
                raise ValueError(
                    f"{path}: {name} has {len(value)} inner channels; only blocks with one are known"
                )
            name = f"non_local.{here[number]}.{rest}"
        placed[name] = value
    return placed
