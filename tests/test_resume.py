"""A run goes on from what it was, or not at all: a damaged or another run is refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import Pooled, rewrite, tiny

from ecul import Dataset, TwoStreamResNet, train
from ecul.model import Backbone
from ecul.optim import build_model, build_optimizer
from ecul.run.saved import find_run, load_run, read_run
from ecul.training import State

RNG = np.random.default_rng(0)
DATASET = Dataset.from_arrays(*(RNG.integers(0, 256, (12, 32, 16, 3), dtype=np.uint8) for _ in range(2)))
CONFIG = tiny(identities=2, min_samples=1, eps=0.3, eps_joint=0.3, iterations=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(DATASET, CONFIG, output=tmp_path_factory.mktemp("r") / "run")


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run's directory, to be damaged."""
    return shutil.copytree(whole.output, tmp_path / "run")


def resume(directory, config=CONFIG, model=None):
    model = build_model(config, torch.device("cpu"), model)
    state = State(model, model, build_optimizer(model, config))
    load_run(directory, state, config, DATASET)
    return state


def test_a_whole_run_goes_on(whole, run):
    state = resume(run)
    assert state.history == whole.history == read_run(run).history and read_run(run).config == CONFIG
    assert [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] == whole.history
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in state.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.bottleneck.weight", None, "missing model.bottleneck.weight"),
        ("model.bottleneck.weight", torch.full((64,), torch.nan), "holds NaN or infinite numbers"),
        ("model.bottleneck.weight", torch.ones(64, dtype=torch.complex64), "weight is torch.complex"),
        ("model.bottleneck.weight", torch.ones(64, dtype=torch.bool), "bottleneck.weight is torch.bool"),
        ("optimizer.3.step", None, "does not fit this network.*unknown optimizer.3.exp_avg"),
        ("optimizer.3.step", torch.zeros(2), "optimizer.3.step is"),
        ("optimizer.1.exp_avg", torch.zeros(8, dtype=torch.uint8), "optimizer.1.exp_avg is torch.uint8"),
        ("optimizer.999.step", torch.zeros(()), "unknown optimizer.999.step"),
    ],
)
def test_damaged_tensors_of_a_run_are_named(run, name, value, message):
    def change(_, tensors):
        tensors.pop(name, None)
        tensors.update({} if value is None else {name: value})

    rewrite(run / "resume.safetensors", change)
    with pytest.raises(ValueError, match=f"resume.safetensors .*{message}"):
        resume(run)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["history", 1, "epoch"], 7, "no row of numbers for epoch 1"),
        (["history", 0, "score"], float("nan"), "no row of numbers for epoch 0"),
        (["history", 0, "score"], "high", "must be real number, not str"),
        (["history"], 1, "not iterable"),
        (["config", "deptj"], 10, "Config has no field 'deptj'"),
        (["dataset"], "sysu", ""),
        (["dataset", "dataset"], 3, "no name, root and options"),
        (["dataset", "options"], [1], "no name, root and options"),
        *(([name], ..., f"'{name}' is missing") for name in ("config", "dataset", "history", "model")),
    ],
)
def test_a_damaged_description_of_a_run_is_named(run, place, value, message):
    def change(about, _):
        for step in place[:-1]:
            about = about[step]
        about[place[-1]] = value
        if value is ...:
            del about[place[-1]]

    rewrite(run / "resume.safetensors", change)
    for read in (resume, find_run):
        with pytest.raises(ValueError, match=f"resume.safetensors is damaged: .*{message}"):
            read(run)


def tied():
    network = Pooled()
    network.twin = torch.nn.Conv2d(3, 8, 5)
    network.twin.weight = network.stem.weight
    return network


def own(**settings):
    return TwoStreamResNet(**{"depth": 10, "width": 8, "input_size": (32, 16), **settings})


@pytest.mark.parametrize("make", [lambda: own(stem_stride=1), lambda: own(depth=18), Pooled, tied])
def test_a_run_goes_on_with_its_own_network_alone(make, tmp_path):
    """Nothing of `Config` tells these networks from the one that `train` builds."""
    trained = train(DATASET, CONFIG, output=tmp_path, model=make()).model
    for other in (None, own(non_local=True)):
        with pytest.raises(ValueError, match=r"network \(model=\): .* then, .* now"):
            train(DATASET, CONFIG, output=tmp_path, resume=True, model=other)
    again = train(DATASET, CONFIG, output=tmp_path, resume=True, model=make()).model
    x = torch.randn(2, 3, 32, 16)
    assert torch.equal(again.embed(x, "visible"), trained.eval().embed(x, "visible"))


def test_another_backbone_of_the_same_name_is_told_by_its_weights(tmp_path):
    train(DATASET, CONFIG, output=tmp_path, model=Pooled())
    with pytest.raises(ValueError, match="this network; give model= .*model.network.stem.weight is"):
        resume(tmp_path, model=Backbone(Pooled(kernel=3), (32, 16)))


def test_a_finished_run_keeps_its_file_and_has_a_lost_one_again(run):
    before = (run / "model.safetensors").stat()
    train(DATASET, CONFIG, output=run, resume=True)
    assert (run / "model.safetensors").stat() == before  # thresholds know it by its hash
    (run / "model.safetensors").unlink()
    again = train(DATASET, CONFIG, output=run, resume=True)
    kept = TwoStreamResNet.from_pretrained(run).state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in again.model.state_dict().items())


def test_a_new_run_writes_over_no_run_and_no_model(run, tmp_path):
    (run / "resume.safetensors").unlink()
    for goes_on in (True, False):
        with pytest.raises(ValueError, match="a run of 2 epochs without its resume.safetensors"):
            train(DATASET, CONFIG, output=run, resume=goes_on)
    build_model(CONFIG, torch.device("cpu")).save_pretrained(tmp_path / "imported")
    with pytest.raises(ValueError, match="holds a model that no run wrote"):
        train(DATASET, CONFIG, output=tmp_path / "imported")


def test_a_run_keeps_its_options_and_never_says_where_to_write(run):
    def options(**values):
        rewrite(run / "resume.safetensors", lambda about, _: about["dataset"].update(options=values))
        return find_run(run / "model.safetensors").options

    assert options(pack=False, subset=True) == {"pack": False, "subset": True}
    assert options(pack="/elsewhere") == {}
