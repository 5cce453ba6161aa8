"""What is compared: the worlds, and the configurations ("lines") that run on each of them."""

from dataclasses import dataclass, field

PRESET = "demo"


@dataclass(frozen=True)
class World:
    """A synthetic world: what renders it, and the settings that all lines share on it.

    render: arguments of `synthesize`; fields: of `Config`, beside the preset's; start: whether the network
    begins with the weights that `study.start` makes.
    """

    render: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)
    start: bool = False


WORLDS = {
    "shared": World(),
    "gap": World(
        render={"identities": 320, "test_identities": 96, "images": 3, "gap": 1.0},
        fields={
            "identities": 16, "instances": 2, "iterations": 60, "precision": "bf16", "min_samples": 3,
            "k1": 8, "k2": 3, "k3": 6, "k1_joint": 14, "k2_joint": 3, "k3_joint": 14,
            "epochs_intra": 6, "epochs_cross": 18, "tsmem_switch": 6, "lr": 2e-3, "lr_milestones": (18, 22),
        },
        start=True,
    ),
}  # fmt: skip
NO_CROSS = {"weight_agnostic": 0.0, "weight_consistency": 0.0}
# What a line changes: fields of `Config`; "stages": 1, the whole schedule in stage 1; "halved" and
# "doubled": fields times 1/2 and 2 (the P x K in a name is that of the shared world).
PARTS = {
    "plain Jaccard instead of EMCC": {"k3": None, "k3_joint": None},
    "k3 halved": {"halved": ("k3", "k3_joint")},
    "k3 doubled": {"doubled": ("k3", "k3_joint")},
    "no cross-modality stage": {"stages": 1},
    "no contrast of matches": {"weight_agnostic": 0.0},
    "exchanged views in their own stem": {"exchanged_stem": "visible"},
    "half the images, P x K = 8 x 2": {"halved": ("instances",)},
    "half the identities, P x K = 4 x 4": {"halved": ("identities",)},
}
# Stage 2 of both papers together, joint clusters, pairs and consistency, and that without some of it.
BOTH = {
    "weight_joint": 0.7, "weight_consistency": 0.5, "matching": "bilateral", "exchanged_stem": "visible",
}  # fmt: skip
PARTS_OF_BOTH = {
    "no instance selection": {"k_select": None},
    "no joint contrast": {"weight_joint": 0.0},
    "no consistency": {"weight_consistency": 0.0},
    "no consistency, no agnostic contrast": NO_CROSS,
}
TSMEM, MBCCM = {"update_rule": "tsmem"}, {"method": "mbccm"}


def _parts(base: str, name: str, fields: dict) -> dict:
    """The lines that change one part of the line `base`, named `name`, ...; `fields`: what base itself is."""
    both = f"{name}, stage 2 of both papers"
    return {
        both: (base, {**fields, **BOTH}),
        **{f"{name}, {part}": (base, {**fields, **changed}) for part, changed in PARTS.items()},
        **{f"{name}, {part}": (both, {**fields, **BOTH, **less}) for part, less in PARTS_OF_BOTH.items()},
    }


LINES = {  # name: (the line it is compared with, its fields)
    "untrained": (None, {}),
    "supervised": (None, {}),
    "united": (None, {}),
    "united with TSMem": ("united", TSMEM),
    "ecul": ("united", {"method": "ecul"}),
    "mbccm": ("united", MBCCM),
    **_parts("united", "united", {}),
    **_parts("united with TSMem", "TSMem", TSMEM),
    "TSMem, first step alone": ("united with TSMem", {**TSMEM, "tsmem_switch": 10**6}),
    "TSMem, second step alone": ("united with TSMem", {**TSMEM, "tsmem_switch": 0}),
    "mbccm, no consistency": ("mbccm", {**MBCCM, "weight_consistency": 0.0}),
    "mbccm, no consistency, no agnostic contrast": ("mbccm", {**MBCCM, **NO_CROSS}),
}
