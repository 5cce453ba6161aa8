"""Models that other code bases trained, brought in by the names of their weights.

One layout covers AGW and everything that grew from it (ADCA, PGM, MBCCM and the first author's code):

    visible_module.visible.{conv1,bn1}     the visible stem; the rest of that ResNet is never run
    thermal_module.thermal.{conv1,bn1}     the infrared stem, likewise
    base_resnet.base.layer1 ... layer4     the shared part; its conv1 and bn1 are never run
    NL_2.0 ... NL_3.2                      non-local blocks, where there are any
    bottleneck                             the neck; classifier and discriminator serve training alone

AGW: https://arxiv.org/abs/2001.04193, ADCA: https://arxiv.org/abs/2208.01711
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from ecul.common.files import reading
from ecul.common.names import shorten
from ecul.common.pretrained import read_foreign
from ecul.model import BLOCKS, TwoStreamResNet

HOMES = ("visible_module.visible", "thermal_module.thermal", "base_resnet.base")
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
    path: str | os.PathLike, input_size: tuple[int, int] = (288, 144), pooling: str = "gem"
) -> tuple[TwoStreamResNet, dict[str, list[str]]]:
    """The model of a published checkpoint, and what of the file was left out.

        model, unused = import_checkpoint("model_best.pth.tar")
        model.save_pretrained("imported")

    path: a `.pth` or `.tar` that `torch.save` wrote, read with weights only (code in it never runs), or a
    `.safetensors`; `read_foreign` unwraps it. input_size: (H, W) in pixels of the training images, which the
    file does not say. pooling: "gem" or "avg" (AGW's `--method base`), or "file": non-local blocks and GeM's
    own weights say GeM. Depth, width and non-local blocks follow from the shapes. Returns a
    `TwoStreamResNet` in eval mode whose `embed` gives the published test feature, (N, num_features) unit
    rows, and a dict from a reason to the names that were left out for it.
    Errors: FileNotFoundError; ValueError for an input_size below 16 pixels, for pooling="file" where the file
    does not say it, for a file that is no checkpoint, or whose names or shapes do not all fit, with the list.
    Source: the key names of the published repositories.
    """
    path = Path(path)
    if min(input_size) < 16:
        raise ValueError(f"input_size must be (height, width) of at least 16 pixels, got {tuple(input_size)}")
    state = read_foreign(path, [f"{home}.conv1.weight" for home in HOMES])
    renamed, unused = _rename(state, path)
    settings = {**_settings(renamed, path), "input_size": (input_size[0], input_size[1])}
    told = settings["non_local"] or any(name.startswith("gem.") for name in state)
    if pooling not in ("gem", "avg", "file") or (pooling == "file" and not told):
        needs = f"--pooling must be gem, or avg for AGW's base, got {pooling!r}"
        raise ValueError(f"{path} does not say how the model pools; {needs}")
    settings["gem"] = pooling != "avg"  # AGW turns GeM on together with its non-local blocks
    with reading(path), torch.device("meta"):
        model = TwoStreamResNet(**settings)
    placed = {_place(name, sorted(model.non_local)): value for name, value in renamed.items()}
    return model.load(placed, path).eval(), unused


def _rename(
    state: dict[str, torch.Tensor], path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The weights that are used, under our names, and the names of the others by the reason."""
    renamed: dict[str, torch.Tensor] = {}
    unused: dict[str, list[str]] = {}
    for name, value in state.items():
        pattern = next((pattern for pattern in USED if re.fullmatch(pattern, name)), None)
        reason = next((reason for reason, left in UNUSED.items() if re.fullmatch(left, name)), "unknown")
        if pattern:
            renamed[re.sub(pattern, USED[pattern], name)] = value
        else:
            unused.setdefault(reason, []).append(name)
    if unknown := unused.get("unknown"):
        raise ValueError(f"{path}: nothing was imported, for no known layout has {shorten(unknown)}")
    return renamed, unused


def _settings(state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Depth, width and non-local blocks, from the names and shapes of the weights."""
    blocks = {tuple(name.split(".")[:2]) for name in state if name.startswith("layer")}
    counts = tuple(sum(layer == f"layer{stage}" for layer, _ in blocks) for stage in range(1, 5))
    bottlenecks = "layer1.0.conv3.weight" in state
    depths = [d for d, known in BLOCKS.items() if known == counts and (d >= 50) == bottlenecks]
    stem = state.get("visible.conv1.weight", torch.empty(0))
    if not depths or stem.ndim != 4:
        told = f"{counts} blocks in its layers, a visible stem of shape {tuple(stem.shape)}"
        raise ValueError(f"{path} holds no ResNet that is known: {told}")
    non_local = any(NON_LOCAL.fullmatch(name) for name in state)
    return {"depth": depths[0], "width": len(stem), "non_local": non_local}


def _place(name: str, places: list[str]) -> str:
    """`NL_2.1.g.0.weight` -> `non_local.2_3.g.weight`: the layer's n-th block, where there are so many."""
    match = NON_LOCAL.fullmatch(name)
    here = [place for place in places if match and place.startswith(f"{match[1]}_")]
    if match is None or int(match[2]) >= len(here):
        return name
    return f"non_local.{here[int(match[2])]}.{match[3].replace('g.0.', 'g.')}"
