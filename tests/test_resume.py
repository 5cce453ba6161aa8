"""A run goes on from what it was, or not at all: every file of a run, damaged in every way."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny

from ecul import Config, Dataset, TwoStreamResNet, train
from ecul.optim import build_model, build_optimizer
from ecul.run.checkpoint import load_run, read_about, read_log
from ecul.run.saved import find_run
from ecul.training import State
from ecul.trainset import dataset_fingerprint

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


def resume(directory, config=CONFIG):
    model = build_model(config, torch.device("cpu"))
    state = State(model, model, build_optimizer(model, config))
    load_run(directory, state, config, dataset_fingerprint(DATASET))
    return state


def rewrite(file, change):
    """Change the tensors and the metadata of a file, which loses its checksum as if it had had none."""
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    metadata.pop("checksum")
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def test_a_whole_run_goes_on(whole, run):
    state = resume(run)
    assert state.history == whole.history
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in state.model.state_dict().items())
    assert read_about(run)["config"] == CONFIG and read_log(run) == whole.history


def test_a_flipped_bit_of_the_state_is_found(run):
    file = run / "resume.safetensors"
    content = file.read_bytes()
    for place in np.random.default_rng(1).integers(len(content) // 8, len(content), 8):
        flipped = bytearray(content)
        flipped[place] ^= 4
        file.write_bytes(flipped)
        with pytest.raises(
            ValueError, match="resume.safetensors is damaged: its content has another checksum"
        ):
            resume(run)


def test_an_optimiser_that_lost_a_parameter_is_found(run):
    rewrite(run / "resume.safetensors", lambda tensors, _: tensors.pop("optimizer.3.step"))
    with pytest.raises(ValueError, match="does not fit the optimiser of this network.*missing 3.step"):
        resume(run)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.bottleneck.weight", None, "missing bottleneck.weight"),
        ("model.bottleneck.weight", torch.full((64,), torch.nan), "holds NaN or infinite numbers"),
        ("optimizer.3.step", torch.zeros(2), "3.step is"),
        ("optimizer.3.exp_avg", torch.zeros(2), "3.exp_avg is"),
        ("optimizer.1.exp_avg", torch.zeros(8, dtype=torch.uint8), "1.exp_avg is torch.uint8"),
        ("optimizer.1.exp_avg_sq", torch.full((8,), torch.inf), "holds NaN or infinite numbers"),
        ("optimizer.999.step", torch.zeros(()), "unknown 999.step"),
        ("optimizer.step", torch.zeros(()), "unknown step"),
        ("optimizer.x.step", torch.zeros(()), "unknown x.step"),
        ("labels.own", torch.zeros(23, dtype=torch.int64), "its labels are not those of 24 images"),
        ("labels.own", torch.zeros(24), "its labels are not those of 24 images"),
        ("labels.own", torch.full((24,), -2), "its labels are not those of 24 images"),
    ],
)
def test_damaged_tensors_of_a_run_are_named(run, name, value, message):
    def change(tensors, _):
        tensors.pop(name, None)
        tensors.update({} if value is None else {name: value})

    rewrite(run / "resume.safetensors", change)
    with pytest.raises(ValueError, match=f"resume.safetensors .*{message}"):
        resume(run)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epoch", None, "it tells of no epoch, resume.json of 2 epochs"),
        ("epoch", "-1", "its epoch should be a whole number"),
        ("epoch", "two", "its epoch should be a whole number"),
        ("epoch", "9" * 5000, "its epoch should be a whole number"),
        ("epoch", "3", "it tells of epoch 3, resume.json of 2 epochs"),
        ("history", "0", "its history is not that of resume.safetensors"),
    ],
)
def test_damaged_metadata_of_a_run_are_named(run, name, value, message):
    def change(_, metadata):
        metadata.pop(name, None)
        metadata.update({} if value is None else {name: value})

    rewrite(run / "resume.safetensors", change)
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        resume(run)


def test_two_runs_are_not_mixed(whole, run, tmp_path):
    other = train(DATASET, CONFIG, output=tmp_path / "other")
    assert len(other.history) == len(whole.history)
    shutil.copy(other.output / "resume.safetensors", run)
    with pytest.raises(ValueError, match="resume.json is damaged: its history is not that of"):
        resume(run)


DAMAGE = [  # where in resume.json, what is written there, and how the error goes on
    (["history", 1, "score"], 0.25, "its history is not that of resume.safetensors"),
    (["history", 1, "epoch"], 7, "epoch 7 in the place of epoch 1"),
    (["history", 1, "epoch"], "1", "'history': entry 2: 'epoch': expected a whole number"),
    (["history", 1, "stage"], 3, "'history': entry 2: 'stage': expected one of 1, 2, got 3"),
    (["history", 0, "score"], "high", "'history': entry 1: 'score': expected a number, got 'high'"),
    (["history", 0, "loss_x"], None, "'history': entry 1: 'loss_x': expected a number, got None"),
    (["history", 0], 3, "'history': entry 1: expected an object, got 3"),
    (["history"], {}, "'history': expected a list"),
    (["history"], None, "'history': expected a list"),
    (["config"], [], "'config': expected dict"),
    (["config", "depth"], {"a": 1}, "its config is none of this version (depth must be one of"),
    (["config", "deptj"], 10, "its config is none of this version (Config has no field 'deptj'"),
    (["dataset"], "sysu", "'dataset': expected an object"),
    (["dataset", "dataset"], 3, "'dataset': 'dataset': expected str"),
    (["dataset", "visible_images"], -3, "'visible_images': expected a whole number"),
    (["options"], [1], "'options': expected dict"),
    (["root"], 3, "'root': expected str | None"),
]


@pytest.mark.parametrize(("place", "value", "message"), DAMAGE)
def test_a_damaged_resume_json_is_named(run, place, value, message):
    about = json.loads((run / "resume.json").read_text())
    inner = about
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    (run / "resume.json").write_text(json.dumps(about))
    with pytest.raises(ValueError) as error:
        resume(run)
    assert f"{run / 'resume.json'} is damaged: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("name", ["config", "dataset", "history"])
def test_what_resume_json_lacks_is_named(run, name):
    about = json.loads((run / "resume.json").read_text())
    del about[name]
    (run / "resume.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"resume.json is damaged: '{name}' is missing"):
        resume(run)


@pytest.mark.parametrize("line", ["", "{}", "3", '{"epoch": 0, "stage": 1, "score": NaN}', "\x00"])
def test_a_damaged_log_is_named_with_its_line(run, line):
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join([lines[0], line, lines[1]]))
    with pytest.raises(ValueError, match="log.jsonl, line 2 is damaged: "):
        read_log(run)
    (run / "log.jsonl").write_text(lines[1])
    with pytest.raises(ValueError, match="log.jsonl is damaged: epoch 1 in the place of epoch 0"):
        read_log(run)


def test_other_settings_are_told_before_anything_is_loaded(run):
    with pytest.raises(ValueError, match="temp: 0.05 then, 0.5 now"):
        resume(run, Config.from_dict({**CONFIG.to_dict(), "temp": 0.5}))


def test_a_finished_run_that_lost_its_model_has_it_again(run):
    (run / "model.safetensors").unlink()
    again = train(DATASET, CONFIG, output=run, resume=True)
    kept = TwoStreamResNet.from_pretrained(run).state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in again.model.state_dict().items())


def test_another_network_than_the_runs_is_told_by_its_weights(run):
    model = build_model(CONFIG.replace(width=4), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"resume.safetensors does not fit this network.* infrared.bn1.bias"):
        train(DATASET, CONFIG, output=run, resume=True, model=model)


def test_a_new_run_writes_over_no_run_and_no_model(run, tmp_path):
    (run / "resume.safetensors").unlink()
    for resume in (True, False):
        with pytest.raises(ValueError, match="a run of 2 epochs without its resume.safetensors"):
            train(DATASET, CONFIG, output=run, resume=resume)
    build_model(CONFIG, torch.device("cpu")).save_pretrained(tmp_path / "imported")
    with pytest.raises(ValueError, match="holds a model that no run wrote"):
        train(DATASET, CONFIG, output=tmp_path / "imported")


def test_a_run_is_found_without_its_log_and_keeps_its_pixels_where_they_are(run):
    (run / "log.jsonl").unlink()
    about = json.loads((run / "resume.json").read_text())
    (run / "resume.json").write_text(json.dumps({**about, "options": {"pack": False, "subset": True}}))
    found = find_run(run / "model.safetensors")
    assert found.config == CONFIG and found.options == {"pack": False, "subset": True}
    (run / "resume.json").write_text(json.dumps({**about, "options": {"pack": "/elsewhere"}}))
    assert find_run(run).options == {}
