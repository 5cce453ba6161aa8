"""Presets and the errors of a configuration."""

import dataclasses
import json

import numpy as np
import pytest

from ecul import Config
from ecul.config import DATASETS, METHODS

ECUL, MBCCM = "arXiv 2412.19134", "arXiv 2305.12673"  # sections "implementation details", and published code
OURS = "our reconstruction, or our own choice"
# field: value in united, ecul and mbccm on SYSU-MM01, and where it is from
STATED = {
    "backbone": (None, None, None, ECUL), "depth": (50, 50, 50, ECUL), "width": (64, 64, 64, ECUL),
    "non_local": (False, False, False, OURS), "weights": (None, None, None, OURS),
    "size": ((288, 144), (288, 144), (288, 144), ECUL), "stem_stride": (2, 2, 2, ECUL),
    "identities": (8, 8, 12, ECUL + MBCCM), "instances": (16, 16, 12, ECUL + MBCCM),
    "iterations": (200, 200, 300, ECUL + MBCCM), "pad": (10, 10, 10, MBCCM),
    "pairs": ("matched", "joint", "matched", OURS), "matching": ("mutual", "mutual", "bilateral", MBCCM),
    "linear_transform": (False, False, True, MBCCM),
    "exchanged_stem": ("infrared", "visible", "visible", OURS),
    "epochs_intra": (25, 25, 40, ECUL + MBCCM), "epochs_cross": (50, 50, 40, ECUL + MBCCM),
    "lr": (3.5e-4, 3.5e-4, 3.5e-4, ECUL), "weight_decay": (5e-4, 5e-4, 5e-4, ECUL),
    "lr_milestones": ((20, 40, 60), (20, 40, 60), (20, 50, 70), ECUL + MBCCM),
    "lr_gamma": (0.1, 0.1, 0.1, ECUL),
    "k1": (30, 30, 30, OURS), "k2": (6, 6, 6, OURS), "k3": (12, 12, None, OURS),
    "k1_joint": (40, 40, 40, OURS), "k2_joint": (16, 16, 16, OURS), "k3_joint": (40, 40, 40, OURS),
    "eps": (0.6, 0.6, 0.6, OURS), "eps_joint": (0.6, 0.6, 0.6, OURS), "min_samples": (4, 4, 4, OURS),
    "k_select": (4, 4, 4, OURS), "temp": (0.05, 0.05, 0.05, ECUL), "momentum": (0.1, 0.1, 0.1, MBCCM),
    "update_rule": ("sequential", "tsmem", "sequential", ECUL), "tsmem_switch": (25, 25, 25, OURS),
    "weight_instance": (1.0, 1.0, 0.0, ECUL), "weight_joint": (0.0, 0.7, 0.0, OURS),
    "weight_agnostic": (0.9, 0.0, 0.9, MBCCM), "weight_consistency": (0.0, 0.0, 0.5, MBCCM),
    "seed": (0, 0, 0, OURS), "precision": ("auto", "auto", "auto", OURS),
    "compile": (False, False, False, OURS), "checkpointing": (False, False, False, OURS),
    "batch_extract": (256, 256, 256, OURS),
}  # fmt: skip
# what a data set changes in every method
CHANGED = {
    "sysu": {},
    "llcm": {},
    "regdb": {  # ECUL's and MBCCM's iterations; its sizes of clustering are ours
        "iterations": 100, "eps": 0.3, "eps_joint": 0.3, "k1_joint": 38, "k2_joint": 10, "k3_joint": 38,
    },
    "demo": {  # ours, for the synthetic world
        "depth": 10, "width": 32, "size": (64, 32), "pad": 4, "identities": 8, "instances": 4,
        "iterations": 40, "epochs_intra": 10, "epochs_cross": 14, "tsmem_switch": 10, "lr": 1e-3,
        "lr_milestones": (16, 21), "k1": 12, "k2": 4, "k1_joint": 20, "k2_joint": 4, "k3_joint": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_preset_is_as_stated_and_survives_json(dataset, method):
    config = Config.preset(dataset, method=method)
    stated = {name: values[("united", "ecul", "mbccm").index(method)] for name, values in STATED.items()}
    assert dataclasses.asdict(config) == {"method": method, **stated, **CHANGED[dataset]}
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_win_and_the_config_is_frozen():
    config = Config.preset("regdb", method="mbccm", iterations=7)
    assert config.iterations == 7 and config.replace(seed=3).seed == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"itterations": 3}, "no field 'itterations' .did you mean 'iterations'"),
        ({"epoch": 3}, "no field 'epoch' .did you mean 'epochs_intra'"),
        ({"method": "ecull"}, "method must be one of .*did you mean 'ecul'"),
        ({"depth": 51}, "depth must be one of"),
        ({"depth": 50.0}, "depth must be one of 10, 18, 34, 50, 101, got 50.0"),
        ({"depth": np.float64(50)}, "depth must be one of"),
        ({"update_rule": "tsmen"}, "did you mean 'tsmem'"),
        ({"tsmem_switch": -1}, "tsmem_switch must be a whole number of at least 0, got -1"),
        ({"k1": 0}, "k1 must be a whole number of at least 1, got 0"),
        ({"k1": 2.5}, "k1 must be a whole number"),
        ({"eps": 1.5}, "eps"),
        ({"k3": 3}, "k3 must be at least k2, or None for plain clustering, got 3 and 6"),
        ({"momentum": 1.0}, "momentum"),
        ({"lr": -1}, "lr must be a number above 0, got -1"),
        ({"weight_joint": -0.1}, "weight_joint"),
        ({"size": (288,)}, "size must be"),
        ({"iterations": True}, "iterations must be a whole number"),
        ({"stem_stride": True}, "stem_stride must be one of 1, 2, got True"),
        ({"k_select": 0}, "k_select must be a whole number of at least 1, or None, got 0"),
        ({"size": (288, 8)}, "size must be .height, width., whole numbers of at least 16 pixels, got"),
        ({"lr": "fast"}, "lr must be a number above 0, got 'fast'"),
        ({"lr": float("inf")}, "lr must be a number above 0, got inf"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to 2..63 - 1, got 9223372036854775808"),
        ({"compile": 1}, "compile must be True or False, got 1"),
        ({"pairs": "joint", "weight_agnostic": 0.0}, "draws joint clusters, .*: set weight_joint above 0"),
        (
            {"pairs": "joint", "weight_joint": 0.7},
            "no matched pairs: set .*weight_agnostic and weight",
        ),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(fields)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config)])
def test_every_field_is_held_to_something(name):
    with pytest.raises(ValueError, match=f"^{name} must "):
        Config(**{name: object()})


def test_numpy_scalars_become_plain_values():
    config = Config(
        depth=np.int64(10), identities=np.array(8), lr=np.float32(1e-3), compile=np.bool_(True),
        method=np.str_("united"), size=[np.int64(64), np.int32(32)], lr_milestones=(np.int64(5),),
    )  # fmt: skip
    same = Config(
        depth=10, identities=8, lr=float(np.float32(1e-3)), compile=True, size=(64, 32), lr_milestones=(5,)
    )
    assert json.dumps(config.to_dict()) == json.dumps(same.to_dict()) and config == same


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'sysu'"):
        Config.preset("sisu")
    with pytest.raises(ValueError, match="did you mean 'mbccm'"):
        Config.preset("sysu", method="mbcm")
