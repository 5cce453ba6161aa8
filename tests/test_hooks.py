"""What happens between epochs: a callback, validation, an early end, a longer run."""

import csv
import json
import logging
import re
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY, same, tiny

from ecul import TwoStreamResNet, evaluate, open_dataset, train
from ecul.cli import main, parser
from ecul.common.weights import read_metadata
from ecul.run.saved import read_run
from ecul.tools.compare import compare


def test_a_hook_takes_a_copy_of_the_row_and_the_model_if_it_wants(dataset, tmp_path):
    rows, models, defaults = [], [], []

    def both(row, model):
        rows.append(dict(row))
        models.append(model)
        row.update(mine=torch.ones(2), score=float("nan"))
        evaluate(model, dataset, modes="all", trials=1, progress=False)

    plain = train(dataset, tiny())
    watched = train(dataset, tiny(), output=tmp_path, on_epoch=both)
    assert rows == watched.history == read_run(tmp_path).history and models == [watched.model] * 2
    assert same(plain.model, watched.model)
    train(dataset, tiny(epochs_cross=0), on_epoch=lambda row, where=defaults: where.append(row["epoch"]))
    assert defaults == [0]  # what has a default is nobody's model
    train(dataset, tiny(epochs_cross=0), on_epoch=(seen := {}).update)  # which has no signature
    assert seen["epoch"] == 0
    for wrong in (5, lambda: None):  # before any work
        with pytest.raises(TypeError, match="on_epoch must be a function of a row"):
            train(dataset, tiny(), on_epoch=wrong)


def test_validation_comes_after_the_epoch_is_saved_and_never_ends_the_run(world, tmp_path, monkeypatch):
    """People whom one mode cannot rank, and nobody whom the wanted one can."""
    held = open_dataset("sysu", world, validation=0.2)
    outdoors, strangers = (held.test_visible.subset(held.test_visible.camids > 3) for _ in range(2))
    strangers.pids = strangers.pids + 1000
    seen = []

    def watched(model, dataset, **more):
        seen.append(len((output / "log.jsonl").read_text().splitlines()))
        return evaluate(model, dataset, **more)

    monkeypatch.setattr("ecul.evaluation.protocols.evaluate", watched)
    for gallery, figures in ((outdoors, 2), (strangers, 0)):
        output = tmp_path / str(figures)
        run = train(replace(held, test_visible=gallery), tiny(), validate=1, output=output)
        for row in run.history:
            assert sum(k.startswith("validation_") for k in row) == figures
        assert read_run(output).history == run.history
    assert seen == [1, 2, 1, 2]


def stop(row):
    raise StopIteration


def test_on_epoch_can_end_a_run_that_goes_on_later(dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ecul")
    run = train(dataset, tiny(), output=tmp_path / "run", on_epoch=stop)
    assert len(run.history) == 1 and not run.model.training and "ended the run after epoch 1" in caplog.text
    assert same(TwoStreamResNet.from_pretrained(tmp_path / "run"), run.model)
    resumed = train(dataset, tiny(), output=tmp_path / "run", resume=True)
    assert same(resumed.model, train(dataset, tiny()).model)


def test_a_finished_run_can_be_lengthened_and_its_past_not_changed(dataset, tmp_path):
    short, long = tiny(lr_milestones=(2,)), tiny(epochs_cross=2, lr_milestones=(2, 9))
    train(dataset, short, output=tmp_path / "run")
    for past in ({"lr_milestones": (1,)}, {"epochs_intra": 2}, {"epochs_cross": 0}, {"temp": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(past))}: .* then, .* now"):
            train(dataset, short.replace(**past), output=tmp_path / "run", resume=True)
    advised = {"lr": 1e-4, "lr_gamma": 0.5, "checkpointing": True, "precision": "fp32", "batch_extract": 7}
    shutil.copytree(tmp_path / "run", tmp_path / "advised")
    changed = train(dataset, long.replace(**advised), output=tmp_path / "advised", resume=True)
    run, whole = train(dataset, long, output=tmp_path / "run", resume=True), train(dataset, long)
    assert changed.history[2]["lr"] == pytest.approx(5e-5) and not same(changed.model, whole.model)
    assert same(run.model, whole.model) and len(run.history) == 3
    assert read_run(tmp_path / "run").config == long


def test_validation_people_are_held_out_and_only_watched(world, tmp_path):
    whole, held = open_dataset("sysu", world), open_dataset("sysu", world, validation=0.2)
    trained, tested = ({*getattr(held, name).pids} for name in ("visible", "test_visible"))
    assert len(tested) == 2 and len(trained) == 8 and trained | tested == {*whole.visible.pids}
    assert {*held.infrared.pids} == trained and {*held.test_infrared.pids} == tested
    assert held.check().ok and not tested & {*whole.test_visible.pids}
    run = train(held, tiny(epochs_cross=2), validate=2, output=tmp_path / "run")
    assert ["validation_mAP" in row for row in run.history] == [False, True, False]
    assert same(run.model, train(held, tiny(epochs_cross=2)).model)
    saved = read_run(tmp_path / "run")
    assert saved.history == run.history
    saved.require_same(saved.open())  # the report finds the same people
    last = train(held, tiny(epochs_cross=1), validate=2)
    row = evaluate(last.model, held, progress=False).rows[0]
    assert last.history[1]["validation_mAP"] == row["mAP"]
    (group,) = compare([tmp_path / "run"], device="cpu").groups  # of the published test people
    assert group.figures["all mAP"] == [evaluate(run.model, whole, progress=False).rows[0]["mAP"]]
    assert row["caution"] == "not SYSU-MM01's own test set"
    with pytest.raises(ValueError, match="these are the published test images"):
        train(whole, tiny(), validate=1)
    for share in (0, 1, True, "half"):
        with pytest.raises(ValueError, match="validation: expected a share of the training people"):
            open_dataset("sysu", world, validation=share)
    with pytest.raises(ValueError, match="validate: expected a number of epochs"):
        train(held, tiny(), validate=1.5)


def test_lines_tell_how_far_it_is_how_long_and_what_each_term_gives(dataset, caplog):
    caplog.set_level(logging.INFO, logger="ecul")
    run = train(dataset, tiny(weight_joint=0.7, weight_consistency=0.5))
    lines = [line for line in caplog.messages if line.startswith("epoch ")]
    assert lines[0].startswith("epoch 1/2 stage 1 ") and lines[1].startswith("epoch 2/2 stage 2 ")
    assert re.search(r", \d\d:\d\d left$", lines[0]) and "left" not in lines[1]
    losses = {k: v for k, v in run.history[1].items() if k.startswith("loss_")}
    clusters = "/".join(f"{losses[f'loss_cluster_{m}']:.2f}" for m in ("visible", "infrared", "joint"))
    assert f"loss {sum(losses.values()):.3f} (cluster {clusters}, instance " in lines[1]
    assert f"consistency {losses['loss_consistency']:.2f}" in lines[1]


def test_log_files_for_other_programs(world, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *error):
            written.append((self.folder, "closed"))

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, value, step))

    module = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    command = ["train", "sysu", world, "-o", str(tmp_path / "run"), "--preset", "demo", "--device", "cpu"]
    command += [part for k, v in TINY.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    assert main([*command, "--log", "tensorboard"]) == 2 and not (tmp_path / "run").exists()  # no package
    module.SummaryWriter = SummaryWriter
    assert main([*command, "--log", "tensorboard"]) == 0
    assert main([*command, "--resume", "--log", "csv", "--set", "epochs_cross=2"]) == 0
    log = read_run(tmp_path / "run").history
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3 and {*table[0]} == {*log[0], *log[1]}
    for row, line in zip(log, table, strict=True):
        assert {k: float(v) for k, v in line.items() if v} == {k: float(v) for k, v in row.items()}
    place = str(tmp_path / "run" / "tensorboard")
    assert (place, "loss/cluster_visible", log[1]["loss_cluster_visible"], 2) in written
    assert len(written) == sum(map(len, log[:2])) + 2 and written[-1] == (place, "closed")


def test_settings_come_back_from_a_file(world, tmp_path, capsys):
    def command(out, *more):
        return ["train", "sysu", world, "-o", str(tmp_path / out), "--device", "cpu", *more]

    fields = [part for k, v in TINY.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    assert main(command("a", "--preset", "demo", "--method", "ecul", *fields, "--set", "seed=3")) == 0
    file = str(tmp_path / "a" / "config.json")
    assert main(command("b", "--config", file)) == 0
    first, again = (read_run(tmp_path / name).config for name in "ab")
    assert first == again and first.method == "ecul"
    sums = [read_metadata(tmp_path / part / "model.safetensors")["checksum"] for part in "ab"]
    assert sums[0] == sums[1]
    given = ("--config", file, "--set", "seed=4", "--validate", "1", "--option", "validation=0.3")
    assert main(command("c", *given)) == 0
    third = read_run(tmp_path / "c")
    assert third.config == first.replace(seed=4) and third.dataset["options"]["validation"] == 0.3
    assert all(np.isfinite(row["validation_mAP"]) for row in third.history)
    capsys.readouterr()
    assert main(["evaluate", "sysu", world, "--model", str(tmp_path / "c"), "--device", "cpu"]) == 0
    model, published = TwoStreamResNet.from_pretrained(tmp_path / "c"), open_dataset("sysu", world)
    assert capsys.readouterr().out == f"{evaluate(model, published, progress=False)}\n"
    assert main(command("d", "--config", file, "--validate", "5")) == 0
    assert read_run(tmp_path / "d").dataset["options"]["validation"] == 0.2
    assert parser().parse_args(["check", "sysu", world]).option == []  # what one command adds is its own
    (tmp_path / "d.json").write_text("[1]")
    (tmp_path / "e.json").write_text("{")
    assert main(["train", "folders", str(tmp_path), "-o", str(tmp_path / "x"), "--validate", "1"]) == 2
    assert "validation" not in capsys.readouterr().err
    told = {"d.json": "d.json is damaged", "e.json": "e.json is damaged", "f": "there is no file"}
    for name, message in told.items():
        assert main(command("x", "--config", str(tmp_path / name))) == 2
        assert message in capsys.readouterr().err
