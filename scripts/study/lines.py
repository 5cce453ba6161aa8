"""What is compared: the worlds, and the configurations ("lines") that run on each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

PRESET = "demo"


@dataclass(frozen=True)
class World:
    """A synthetic world: what renders it, and the settings that all lines share on it.

    render: the arguments of `synthesize` for a seed; fields: of `Config`, beside the preset's; plain: of
    lines with the plain Jaccard distance; start: whether the network begins with the weights that
    `study.start` makes.
    """

    render: Callable[[int], dict]
    fields: dict = field(default_factory=dict)
    plain: dict = field(default_factory=dict)
    start: bool = False


# The family: each seed draws its own world from these ranges, so that no choice is made for one generator.
PEOPLE = {"identities": (150, 400), "images": (2, 6)}
APART = (0.3, 1.0)  # scales the gap
FAMILY = {
    "law": (0.4, 0.8), "alike": (0.0, 0.2), "redrawn": (0.0, 0.1), "weave": (0.0, 0.1),
    "slope": (0.0, 0.4), "cast": (0.0, 0.2), "clutter": (0.0, 0.3),
}  # fmt: skip


def family(seed: int) -> dict:
    """What renders the family's world of this seed: people, images of each and camera, and the gap."""
    rng = np.random.default_rng([seed, 23])
    people, images = (int(rng.integers(low, high + 1)) for low, high in PEOPLE.values())
    apart, gap = rng.uniform(*APART), {name: rng.uniform(*ends) for name, ends in FAMILY.items()}
    gap = {name: round(apart * value, 4) for name, value in gap.items()}
    return {"identities": people, "test_identities": 96, "images": images, "gap": gap}


GAP = {"identities": 320, "test_identities": 96, "images": 3, "gap": 1.0}
STARTED = {"identities": 16, "instances": 2, "iterations": 60, "precision": "bf16", "min_samples": 3}
WORLDS = {
    "shared": World(lambda seed: {}),
    "gap": World(
        lambda seed: GAP,
        fields={
            **STARTED, "k1": 8, "k2": 3, "k3": 6, "k1_joint": 14, "k2_joint": 3, "k3_joint": 14,
            "epochs_intra": 6, "epochs_cross": 18, "tsmem_switch": 6, "lr": 2e-3, "lr_milestones": (18, 22),
        },
        start=True,
    ),
    "family": World(
        family,
        fields={
            **STARTED, "k1": 8, "k2": 3, "k3": 6, "eps": 0.55,
            "k1_joint": 8, "k2_joint": 3, "k3_joint": 8, "eps_joint": 0.55,
            "epochs_intra": 4, "epochs_cross": 8, "tsmem_switch": 4, "lr": 1e-3, "lr_milestones": (9, 11),
        },
        plain={"eps": 0.5},
        start=True,
    ),
}  # fmt: skip
ALONE = {"stages": 1}
ECUL, MBCCM = {"method": "ecul"}, {"method": "mbccm"}
SEQUENTIAL = {**ECUL, "update_rule": "sequential"}
# name: (the line it is compared with, its fields). "stages": 1, the whole schedule in stage 1.
LINES = {
    "untrained": (None, {}),
    "supervised": (None, {}),
    # ECUL, part by part
    "baseline": (None, {**ALONE, "k3": None}),
    "+ EMCC (stage 1)": ("baseline", ALONE),
    "+ inter-modality clustering": ("+ EMCC (stage 1)", {**SEQUENTIAL, "k_select": None}),
    "+ instance selection": ("+ inter-modality clustering", SEQUENTIAL),
    "+ TSMem, first step alone": ("+ instance selection", {**ECUL, "tsmem_switch": 10**6}),
    "+ TSMem, second step alone": ("+ instance selection", {**ECUL, "tsmem_switch": 0}),
    "ecul (+ TSMem)": ("+ instance selection", ECUL),
    # MBCCM, part by part
    "mbccm, stage 1 alone": (None, {**MBCCM, **ALONE}),
    "mbccm, no consistency": ("mbccm, stage 1 alone", {**MBCCM, "weight_consistency": 0.0}),
    "mbccm": ("mbccm, no consistency", MBCCM),
    # united, and what it is without a part
    "united": ("+ EMCC (stage 1)", {}),
    "united with TSMem": ("united", {"update_rule": "tsmem"}),
    "united, plain Jaccard instead of EMCC": ("united", {"k3": None, "k3_joint": None}),
    "united, no contrast of matches": ("united", {"weight_agnostic": 0.0}),
    "united, exchanged views in their own stem": ("united", {"exchanged_stem": "visible"}),
}
