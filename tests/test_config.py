"""Presets and the errors of a configuration."""

import dataclasses
import json

import numpy as np
import pytest

from ecul import Config
from ecul.config import DATASETS, METHODS

# The united method on SYSU-MM01. What `Config` marks [R] is our reconstruction. The rest follows ECUL and
# MBCCM (arXiv 2412.19134 and 2305.12673, sections "implementation details", and published code).
UNITED = {
    "backbone": None, "depth": 50, "width": 64, "non_local": False, "weights": None, "size": (288, 144),
    "stem_stride": 2, "identities": 8, "instances": 16, "iterations": 200, "pad": 10, "pairs": "matched",
    "matching": "mutual", "linear_transform": False, "exchanged_stem": "infrared",
    "epochs_intra": 25, "epochs_cross": 50, "lr": 3.5e-4, "weight_decay": 5e-4,
    "lr_milestones": (20, 40, 60), "lr_gamma": 0.1, "k1": 30, "k2": 6, "k3": 12,
    "k1_joint": 40, "k2_joint": 16, "k3_joint": 40, "eps": 0.6, "eps_joint": 0.6, "min_samples": 4,
    "k_select": 4, "temp": 0.05, "momentum": 0.1, "update_rule": "sequential", "tsmem_switch": 25,
    "weight_instance": 1.0, "weight_joint": 0.0, "weight_agnostic": 0.9, "weight_consistency": 0.0,
    "seed": 0, "precision": "auto", "compile": False, "checkpointing": False, "batch_extract": 256,
}  # fmt: skip
OTHERS = {
    "united": {},
    "ecul": {
        "pairs": "joint", "exchanged_stem": "visible", "update_rule": "tsmem",
        "weight_joint": 0.7, "weight_agnostic": 0.0,
    },
    "mbccm": {
        "identities": 12, "instances": 12, "iterations": 300, "matching": "bilateral",
        "linear_transform": True, "exchanged_stem": "visible", "epochs_intra": 40, "epochs_cross": 40,
        "lr_milestones": (20, 50, 70), "k3": None, "weight_instance": 0.0, "weight_consistency": 0.5,
    },
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
    stated = {"method": method, **UNITED, **OTHERS[method], **CHANGED[dataset]}
    assert dataclasses.asdict(config) == stated
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_win_and_the_config_is_frozen():
    config = Config.preset("regdb", method="mbccm", iterations=7)
    assert config.iterations == 7 and config.replace(seed=3).seed == 3
    with pytest.raises(ValueError, match="replace keeps the method mbccm"):
        config.replace(method="ecul")
    crosses = [[Config.preset("sysu", m).exchanged_crosses(s) for s in (1, 2)] for m in METHODS]
    assert crosses == [[False, True], [False, False], [False, False]]  # united, ecul, mbccm
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"itterations": 3}, "no field 'itterations' .did you mean 'iterations'"),
        ({"method": "ecull"}, "method must be one of .*did you mean 'ecul'"),
        ({"depth": 50.0}, "depth must be one of 10, 18, 34, 50, 101, got 50.0"),
        ({"update_rule": "tsmen"}, "did you mean 'tsmem'"),
        ({"tsmem_switch": -1}, "tsmem_switch must be a whole number of at least 0, got -1"),
        ({"k1": 0}, "k1 must be a whole number of at least 1, got 0"),
        ({"eps": 1.5}, "eps"),
        ({"k3": 3}, "k3 must be at least k2, or None for plain clustering, got 3 and 6"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_joint": -0.1}, "weight_joint"),
        ({"k_select": 0}, "k_select must be a whole number of at least 1, or None, got 0"),
        ({"size": (288, 8)}, "size must be .height, width., whole numbers of at least 16 pixels, got"),
        ({"lr": float("inf")}, "lr must be a number above 0, got inf"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to 2..63 - 1, got 9223372036854775808"),
        ({"compile": 1}, "compile must be True or False, got 1"),
        ({"lr": 0}, "lr must be a number above 0, got 0"),
        ({"pairs": "joint", "weight_agnostic": 0.0}, "draws joint clusters, .*: set weight_joint above 0"),
        ({"pairs": "joint", "weight_joint": 0.7}, "no matched pairs: set .*weight_agnostic and weight"),
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
    plain = {"depth": 10, "identities": 8, "lr": 0.5, "compile": True, "method": "united", "size": (64, 32)}
    given = {name: np.array(value)[()] for name, value in plain.items()}
    given |= {"lr": np.float32(0.5), "identities": np.array(8), "size": [np.int64(64), np.int32(32)]}
    assert json.dumps(Config(**given).to_dict()) == json.dumps(Config(**plain).to_dict())


@pytest.mark.parametrize(("names", "nearest"), [(("sisu",), "sysu"), (("sysu", "mbcm"), "mbccm")])
def test_unknown_preset_names_the_nearest(names, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        Config.preset(*names)
