"""The main job: it learns, repeats itself, survives a kill, and comes through every collapse."""

import copy
import json
import logging
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import layouts
import numpy as np
import pytest
import torch
from tiny import Pooled, same, tiny

from ecul import Config, Dataset, TwoStreamResNet, evaluate, extract, open_dataset, synthesize, train
from ecul.common import logs
from ecul.kernels import memory_contrast
from ecul.optim import build_model
from ecul.run.saved import read_run, run_directory
from ecul.streams import Backbone
from ecul.training import train_batches

METHODS = ("united", "ecul", "mbccm")


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """A finished run of each method in a directory, which no test changes, and the rows given to on_epoch."""
    found = {}
    for method in METHODS:
        rows, output = [], tmp_path_factory.mktemp("runs") / method
        found[method] = train(dataset, tiny(method=method), output=output, on_epoch=rows.append), rows
    return found


def both(*kinds):
    return {f"loss_{kind}_{m}" for kind in kinds for m in ("visible", "infrared")}


def losses(row):
    return {name for name in row if name.startswith("loss_")}


LOSSES = {
    "united": both("cluster", "instance", "agnostic"),
    "ecul": both("cluster", "instance") | {"loss_cluster_joint", "loss_instance_joint"},
    "mbccm": both("cluster", "agnostic") | {"loss_consistency"},
}


def arrays(visible, infrared, **more):
    rng = np.random.default_rng(0)
    piles = [rng.integers(0, 256, (n, 32, 16, 3), dtype=np.uint8) for n in (visible, infrared)]
    return Dataset.from_arrays(visible=piles[0], infrared=piles[1], **more)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_leaves_a_run_directory(method, runs):
    run, rows = runs[method]
    assert rows == run.history and [r["stage"] for r in rows] == [1, 2]
    assert losses(rows[-1]) == LOSSES[method] and all(math.isfinite(rows[-1][k]) for k in LOSSES[method])
    names = {p.name for p in run.output.iterdir()}
    assert {"config.json", "log.jsonl", "model.safetensors", "resume.safetensors"} <= names
    assert [json.loads(line) for line in (run.output / "log.jsonl").read_text().splitlines()] == rows
    assert same(TwoStreamResNet.from_pretrained(run.output), run.model)
    parts = [rows[0][f"seconds_{part}"] for part in ("extract", "labels", "train")]
    assert min(parts) > 0 and sum(parts) <= rows[0]["seconds"]


def test_losses_are_weighted_and_summed_over_views_and_a_bar_promises_the_steps(dataset, monkeypatch, caplog):
    """At a high temperature all rows of a bank are alike: the loss is weight * views * log(rows)."""
    caplog.set_level(logging.INFO, "ecul")
    monkeypatch.setattr(logs, "MINUTE", 0)
    config = tiny(temp=1e6, weight_joint=0.7, weight_agnostic=0.9, weight_instance=0.0, iterations=3)
    row = train(dataset, config).history[-1]
    assert losses(row) == both("cluster", "agnostic") | {"loss_cluster_joint"}
    assert "batches: 2 of 3, " in caplog.text
    for name, views, weight, bank in (
        ("cluster_visible", 2, 1, "visible"), ("cluster_infrared", 1, 1, "infrared"),
        ("agnostic_visible", 3, 0.9, "visible"), ("agnostic_infrared", 3, 0.9, "infrared"),
        ("cluster_joint", 3, 0.7, "joint"),
    ):  # fmt: skip
        rows = row[f"clusters_{bank}"]
        assert row[f"loss_{name}"] == pytest.approx(weight * views * math.log(rows), rel=1e-3), name


def test_the_seed_alone_decides_whatever_the_threads_and_the_precision_around(dataset, runs):
    """Another seed, 8 threads that build networks at once, an autocast around it all."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(lambda _: build_model(tiny(seed=3), torch.device("cpu")), range(8)))
    assert all(same(built[0], other) for other in built)
    run, _ = runs["united"]

    def used():
        rows = extract(run.model, dataset.test_visible, "visible", progress=False)
        return rows.tolist(), evaluate(run.model, dataset, trials=1, progress=False).rows

    with torch.autocast("cpu", torch.bfloat16):
        again, inside = train(dataset, tiny()), used()
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator
    assert same(run.model, again.model) and not same(run.model, train(dataset, tiny(seed=1)).model)
    assert inside == used()
    with torch.random.fork_rng():  # the numbers are those of torch's default generator
        torch.manual_seed(3)
        assert same(built[0], TwoStreamResNet(10, 8, False, (32, 16)))


def test_kill_in_mid_epoch_then_resume(world, dataset, runs, tmp_path):
    code = f"""
import os, signal
import ecul.training as training
from ecul import Config, open_dataset
train_batches = training.train_batches
def killed(*args):
    if calls.append(1) or len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_batches(*args)
calls, training.train_batches = [], killed
config = Config.from_dict({tiny().to_dict()!r})
training.train(open_dataset("sysu", {str(world)!r}), config, output={str(tmp_path / "k")!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    resumed, (whole, _) = train(dataset, tiny(), output=tmp_path / "k", resume=True), runs["united"]
    for row, again in zip(whole.history, resumed.history, strict=True):
        timed = {name for name in row if name.startswith(("seconds", "images_per_second"))}
        assert row.keys() == again.keys() and all(row[k] == again[k] for k in row.keys() - timed)
    assert same(whole.model, resumed.model)


def test_a_run_directory_is_not_overwritten_or_continued_with_other_settings(dataset, runs, tmp_path):
    output = runs["united"][0].output
    with pytest.raises(ValueError, match="holds a run; resume it"):
        train(dataset, tiny(), output=output)
    with run_directory(tmp_path / "run"), pytest.raises(ValueError, match="in use by another run"):
        train(dataset, tiny(), output=tmp_path / "run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="output: cannot write to"):
        train(dataset, tiny(), output=tmp_path / "file" / "run")


@pytest.mark.parametrize(("processes", "instances"), [(3, 1), (4, 1), (9, 4)])
def test_batches_too_small_for_the_processes_are_refused_before_work(processes, instances, monkeypatch):
    monkeypatch.setattr("ecul.common.distributed.size", lambda: processes)
    monkeypatch.setattr("ecul.run.session.build_model", lambda *_: pytest.fail("work began"))
    message = f"{processes} processes share batches of as few as {2 * instances} images.*raise instances"
    with pytest.raises(ValueError, match=message):
        train(arrays(4, 4), tiny(instances=instances))


@pytest.mark.parametrize(
    ("piles", "overrides", "advice"),
    [
        ((40, 40), {"min_samples": 60}, "raise eps or lower min_samples"),  # everything an outlier
        ((40, 40), {"eps": 1.0}, "lower eps or k1, or start from weights"),  # one giant cluster
        ((1, 1), {}, "raise eps or lower min_samples"),  # one image each
    ],
)
def test_collapse_is_said_and_does_not_end_the_run(piles, overrides, advice, caplog):
    caplog.set_level(logging.WARNING)
    run = train(arrays(*piles), tiny(**overrides))
    assert len(run.history) == 2 and all(r["skipped"] for r in run.history)
    assert f"epoch 2 skipped: fewer than two clusters in a modality; {advice}" in caplog.text
    assert "every epoch was skipped: this model has learned nothing" in caplog.text


class Forgetful(torch.nn.Module):
    """Rows of mean colours, and once it is lost rows that have nothing to do with one another."""

    num_features = 48

    def __init__(self):
        super().__init__()
        self.scale, self.lost = torch.nn.Parameter(torch.ones(48)), False

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) * self.scale
        return torch.sin(1e4 * x) if self.lost else x


def test_a_run_says_when_its_clusters_fall_apart(dataset, caplog):
    rows, network = [], Forgetful()

    def lose(row):
        rows.append(row)
        network.lost = row["epoch"] == 1

    train(dataset, tiny(epochs_intra=3, epochs_cross=0, lr=1e-5), model=network, on_epoch=lose)
    assert [row.get("fell_apart") for row in rows] == [None, None, 1]
    assert re.findall(r"(epoch .): the clusters fell apart: .*Lower lr", caplog.text) == ["epoch 3"]


def test_memory_that_runs_out_is_halved_in_extraction_and_advised_on_in_training(dataset, monkeypatch):
    """Of a CPU and of a GPU; where the network cannot recompute, nobody is advised to let it."""

    class Large(Pooled):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(len(x))
            if len(x) > 5:
                torch.empty(2**60)
            return super().forward(x)

    network = Backbone(Large(), (32, 16))
    network.network.seen.clear()
    rows = extract(network, dataset.visible, "visible", batch_size=16, progress=False)
    assert torch.equal(rows, extract(network, dataset.visible, "visible", batch_size=4, progress=False))
    assert network.network.seen[:4] == [16, 8, 4, 4]
    with pytest.raises(RuntimeError, match="^epoch 1 does not fit the memory of cpu; train anew with fewer"):
        train(dataset, tiny(), model=Large())

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("ecul.training.train_batches", full)
    with pytest.raises(RuntimeError, match="the memory of cpu; set checkpointing=True and resume"):
        train(dataset, tiny())


@pytest.mark.parametrize("method", [*METHODS, "ecul in one joint cluster"])
def test_fewer_clusters_than_identities_and_clusters_of_one_image(method):
    method, *one = method.split(" in ")
    joint = {"eps_joint": 1.0, "k1_joint": 40} if one else {"eps_joint": 0.3}
    config = tiny(method=method, min_samples=1, eps=0.3, identities=64, **joint)
    run = train(arrays(12, 9, visible_cameras=np.ones(12, int), infrared_cameras=np.ones(9, int)), config)
    assert [row["stage"] for row in run.history if not row.get("skipped")] == [1, 2]
    assert not one or run.history[1]["clusters_joint"] == 1
    assert losses(run.history[1]) == (both("cluster", "instance") if one else LOSSES[method])


def test_divergence_names_the_last_good_checkpoint(dataset, tmp_path):
    config = tiny(lr=1e-35, lr_gamma=1e65, lr_milestones=(1,))
    with pytest.raises(RuntimeError, match="epoch 2 diverged: .* checkpoint is .*run, after epoch 1"):
        train(dataset, config, output=tmp_path / "run")
    assert np.isfinite(TwoStreamResNet.from_pretrained(tmp_path / "run").bottleneck.weight.detach()).all()


def test_a_backbone_of_ones_own_is_trained_saved_and_loaded(dataset, tmp_path):
    own = Pooled()
    before = own.stem.weight.detach().clone()
    run = train(dataset, tiny(), output=tmp_path / "own", model=own)
    assert not torch.equal(run.model.network.stem.weight, before)
    assert len(evaluate(run.model, dataset, modes=["all"], progress=False).rows) == 1
    loaded = Backbone.from_pretrained(tmp_path / "own", Pooled())
    assert same(loaded, run.model) and loaded.input_size == run.model.input_size
    rows = extract(loaded, dataset.test_visible, "visible", progress=False)
    assert torch.equal(rows, extract(run.model, dataset.test_visible, "visible", progress=False))
    loaded.train()
    loaded.network.stem.eval()
    extract(loaded, dataset.test_visible, "visible", progress=False)
    assert loaded.network.training and not loaded.network.stem.training  # each module as it was
    with pytest.raises(ValueError, match="holds Backbone, not TwoStreamResNet; "):
        TwoStreamResNet.from_pretrained(tmp_path / "own")
    wide = Pooled(9)
    wide.num_features = 8
    with pytest.raises(ValueError, match="9 features where num_features says 8"):
        Backbone.from_pretrained(tmp_path / "own", wide)
    photo = np.zeros((64, 32, 3), np.uint8)
    for model, given, message in (
        ("runs/own", dataset.test_visible, "model must have embed"),
        (loaded, "photos", "images must be .*a list of paths, .* got str"),
        (loaded, dataset, "images must be .*, got Dataset"),
        (loaded, photo, "visible: expected uint8 images, .* not uint8 64 x 32 x 3"),
        (loaded, [photo], "or one uint8 array or tensor, got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            extract(model, given, "visible")


def test_layers_that_draw_follow_the_seed_of_the_run(dataset):
    """Dropout draws from torch's default generator."""
    start, trained = Pooled(dropout=0.5), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trained.append(train(dataset, tiny(epochs_cross=0), model=copy.deepcopy(start)).model)
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*trained) and not same(trained[0].network, start)


def with_embed(network):
    network.embed = network.forward
    return network


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (lambda: TwoStreamResNet(10, 8, False, (64, 32)), {}, r"is \(64, 32\), config.size is \(32, 16\)"),
        (Pooled, {"weights": "resnet.pth"}, "load your own model's before"),
        (Pooled, {"checkpointing": True}, "checkpointing is for TwoStreamResNet, not for Backbone"),
        (type("Odd", (Pooled,), {"get_extra_state": lambda _: {}}), {}, "_extra_state, which is no tensor"),
        (lambda: with_embed(Pooled()), {}, "without input_size"),
        (torch.nn.Identity, {}, "num_features"),
    ],
)
def test_settings_that_would_not_reach_ones_own_model_are_refused(model, fields, message, dataset):
    with pytest.raises((ValueError, TypeError), match=message):
        train(dataset, tiny(**fields), model=model())


def test_unreadable_images_of_both_modalities_are_named_at_once(tmp_path):
    for modality in ("visible", "infrared"):
        for i in range(3):
            layouts.picture(tmp_path / modality / f"{i}.png")
        (tmp_path / modality / "broken.png").write_bytes(b"x")
    for name in ("broken.png", "empty.png"):
        (tmp_path / "visible" / name).write_bytes(b"x" * (name == "broken.png"))
        with pytest.raises(ValueError, match=r"visible.broken.png(.|\n)*infrared.broken.png") as error:
            train(open_dataset("folders", tmp_path), tiny())
        assert "skip_unreadable" in str(error.value) and name in str(error.value)


def test_identities_never_reach_training_and_epochs_are_told_unless_logging_is_set_up(
    dataset, runs, monkeypatch, capsys
):
    monkeypatch.setattr(logging.getLogger("ecul"), "propagate", False)
    blind, (seen, _) = copy.deepcopy(dataset), runs["united"]
    blind.visible.pids = blind.infrared.pids = None
    unseen = train(blind, tiny())
    assert same(seen.model, unseen.model)
    monitored = [any(k.startswith("monitor_") for k in run.history[0]) for run in (seen, unseen)]
    assert monitored == [True, False]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 and lines[0].startswith("epoch 1/2 stage 1")
    assert not logging.getLogger("ecul").handlers
    assert repr(unseen) == "Run(output=None)"  # neither layers nor rows
    monkeypatch.setattr(logging.getLogger("ecul"), "level", logging.ERROR)
    train(dataset, tiny(epochs_cross=0))
    assert "epoch" not in capsys.readouterr().err


def test_checkpointing_changes_memory_and_nothing_else():
    """Memory: the storage that a forward pass keeps for the backward pass, the parameters left out."""
    pixels, sizes, found = torch.randn(2, 8, 3, 32, 16), [], []
    for checkpointing in (False, True):
        model = build_model(tiny(checkpointing=checkpointing, depth=50), torch.device("cpu")).train()
        saved, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def hold(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            rows = model(*pixels)
        sizes.append(sum(storage.nbytes() for place, storage in saved.items() if place not in own))
        rows[:, 0].sum().backward()
        found.append([rows, *model.buffers(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert sizes[1] < 0.5 * sizes[0]
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*found, strict=True))


def test_a_run_of_no_epochs_warns_a_newcomer_and_leaves_the_starting_model(dataset, tmp_path, caplog):
    config = Config.preset("sysu", epochs_intra=0, epochs_cross=0, width=4, size=(32, 16))
    run = train(dataset, config, output=tmp_path / "run")
    assert "weights is None" in caplog.text and "ResNet-50 takes hours an epoch on a CPU" in caplog.text
    assert same(TwoStreamResNet.from_pretrained(tmp_path / "run"), run.model) and run.history == []
    caplog.clear()
    assert same(train(dataset, config, output=tmp_path / "run", resume=True).model, run.model)
    with pytest.raises(ValueError, match="the run has not finished an epoch yet"):
        read_run(tmp_path / "run")
    assert same(train(dataset, config.replace(seed=1, weights=str(tmp_path / "run"))).model, run.model)
    train(dataset, config, model=Pooled())
    assert "weights is None" not in caplog.text


def test_training_raises_cross_modality_map(tmp_path):
    root = synthesize(tmp_path / "world", identities=32, images=4, progress=False)
    dataset = open_dataset("sysu", root)
    config = Config.preset("demo", epochs_intra=4, epochs_cross=4, tsmem_switch=4, iterations=24)
    before = evaluate(build_model(config, torch.device("cpu")), dataset, modes=["all"], progress=False)
    after = evaluate(train(dataset, config).model, dataset, modes=["all"], progress=False)
    assert after.rows[0]["mAP"] > 1.3 * before.rows[0]["mAP"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["united", "ecul", "mbccm"])
@pytest.mark.parametrize("on_device", [True, False])
def test_the_iterations_never_wait_for_the_gpu(method, on_device, dataset, monkeypatch):
    def watched(batches):
        for i, batch in enumerate(batches):
            if i == 2:  # kernels are compiled by then
                torch.cuda.set_sync_debug_mode("error")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    def train_watched(forward, optimizer, terms, batches, config):
        return train_batches(forward, optimizer, terms, watched(batches), config)

    monkeypatch.setattr("ecul.training.train_batches", train_watched)
    if not on_device:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    try:
        history = train(dataset, tiny(method=method, iterations=6), device="cuda").history
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any("skipped" in row for row in history)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_losses_run_in_the_precision_of_the_network(precision, dataset, monkeypatch):
    found = []

    def watched(*arguments):
        found.append(torch.is_autocast_enabled("cpu"))
        return memory_contrast(*arguments)

    monkeypatch.setattr("ecul.memory.memory_contrast", watched)
    train(dataset, tiny(precision=precision, epochs_cross=1, iterations=1))
    assert len(found) >= 8 and set(found) == {precision == "bf16"}


def test_every_step_extraction_and_hook_in_half_precision_takes_the_present_weights(dataset):
    """Autocast caches half copies of the weights, within another autocast for longer than a step."""

    class Watched(torch.nn.Module):
        num_features = 8

        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(3, 8), []

        def forward(self, x):
            pixels = x.mean((2, 3))
            found = self.layer(pixels)
            if found.dtype == torch.bfloat16:
                half = (values.bfloat16() for values in (pixels, self.layer.weight, self.layer.bias))
                now = torch.nn.functional.linear(*half)
                self.seen.append(torch.equal(found, now))
            return found

    def hook(row, backbone):
        with torch.autocast("cpu", torch.bfloat16):
            backbone.network(torch.ones(2, 3, 32, 16))

    for precision in ("bf16", "fp32"):
        model = Watched()
        config = tiny(precision=precision, iterations=3, lr=0.1)
        train(dataset, config, model=model, device="cpu", on_epoch=hook)
        assert len(model.seen) >= (2 if precision == "fp32" else 12) and all(model.seen)
