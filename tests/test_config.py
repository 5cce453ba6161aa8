"""Presets and the errors of a configuration."""

import dataclasses
import json

import numpy as np
import pytest

from ecul import Config
from ecul.config import DATASETS, METHODS, _one_of, _require


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_preset_is_valid_and_survives_json(dataset, method):
    config = Config.preset(dataset, method=method)
    assert config.method == method
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_published_numbers():
    sysu, regdb, mbccm = Config.preset("sysu"), Config.preset("regdb"), Config.preset("sysu", method="mbccm")
    assert (sysu.k1, sysu.k2, sysu.k3, sysu.k1_joint, sysu.k2_joint, sysu.k3_joint) == (30, 6, 12, 40, 16, 40)
    assert (sysu.identities, sysu.instances, sysu.iterations, sysu.epochs) == (8, 16, 200, 75)
    assert (regdb.eps, regdb.k1_joint, regdb.k2_joint, regdb.k3_joint, regdb.iterations) == (
        0.3,
        38,
        10,
        38,
        100,
    )
    assert (mbccm.identities, mbccm.instances, mbccm.iterations, mbccm.epochs) == (12, 12, 300, 80)
    assert mbccm.lr_milestones == (20, 50, 70) and mbccm.weight_instance == 0


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
        ({"k1": 0}, "k1 must be a whole number of at least 1, got 0"),
        ({"k1": 2.5}, "k1 must be a whole number"),
        ({"eps": 1.5}, "eps"),
        ({"k3": 3}, "k3 must be at least k2, or None for plain clustering, got 3 and 6"),
        ({"momentum": 1.0}, "momentum"),
        ({"lr": -1}, "lr must be above 0"),
        ({"weight_joint": -0.1}, "weight_joint"),
        ({"size": (288,)}, "size must be"),
        ({"iterations": True}, "iterations must be a whole number"),
        ({"k_select": 0}, "k_select must be a whole number of at least 1, or None, got 0"),
        ({"size": (288, 8)}, "size must be .height, width., whole numbers of at least 16 pixels, got"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": float("inf")}, "lr must be a number, got inf"),
        ({"seed": 2**63}, "seed must be below 2..63, got 9223372036854775808"),
        ({"compile": 1}, "compile must be True or False, got 1"),
        ({"pairs": "joint"}, "draws from joint clusters: set weight_joint above 0"),
        (
            {"pairs": "joint", "weight_joint": 0.7},
            "has no matched pairs: set weight_agnostic and weight_consistency to 0",
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


def test_true_is_no_number_to_choose():
    with pytest.raises(ValueError, match="number must be one of 1, 2, got True"):
        _require("number", True, _one_of(1, 2))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'sysu'"):
        Config.preset("sisu")
    with pytest.raises(ValueError, match="did you mean 'mbccm'"):
        Config.preset("sysu", method="mbcm")
