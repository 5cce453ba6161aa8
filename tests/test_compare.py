"""Runs side by side: what differs, means over seeds, and tables in every form."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import rewrite, tiny

from ecul import TwoStreamResNet, evaluate, train
from ecul.cli import main
from ecul.common.tables import render_table
from ecul.report import pictures
from ecul.run.saved import read_run
from ecul.tools.compare import _differing, compare


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """Two seeds of one setting, and one of another."""
    folder = tmp_path_factory.mktemp("runs")
    for name, fields in {"a": {}, "b": {"seed": 1}, "c": {"lr": 2e-3, "epochs_cross": 0}}.items():
        train(dataset, tiny(**fields), output=folder / name, device="cpu")
    return folder


def test_runs_that_differ_in_their_seed_are_one_row(runs, dataset):
    found = compare([runs / name for name in "abc"], device="cpu")
    assert "accuracy in percent; mean ± deviation over runs" in found.table()
    two, one = (group.row() for group in found.groups)
    assert (two["n"], one["n"]) == (2, 1) and two["runs"] == f"{runs / 'a'} {runs / 'b'}"
    assert found.groups[0].settings == {"epochs_cross": 1, "lr": 1e-3, "epochs done": 2}
    models = [TwoStreamResNet.from_pretrained(runs / name) for name in "ab"]
    each = [evaluate(model, dataset, progress=False).rows for model in models]
    for place, mode in enumerate(("all", "indoor")):
        for heading, measure in (("mAP", "mAP"), ("Rank-1", "rank1")):
            values = [rows[place][measure] for rows in each]
            assert two[f"{mode} {heading}"] == pytest.approx(np.mean(values))
            assert two[f"{mode} {heading} std"] == pytest.approx(np.std(values))
    logs = [read_run(runs / name).history for name in "ab"]
    assert two["score"] == pytest.approx(np.mean([log[-1]["score"] for log in logs]))
    assert two["minutes"] == pytest.approx(np.mean([sum(row["seconds"] for row in log) for log in logs]) / 60)


def test_what_follows_from_the_method_is_not_told_again():
    def settings(method, **fields):
        return {"dataset": "sysu", **tiny(method=method, **fields).to_dict()}

    assert _differing([settings("united"), settings("mbccm")]) == ["method"]
    assert _differing([settings("united"), settings("mbccm", lr=0.1)]) == ["method", "lr"]
    assert _differing([settings("mbccm"), settings("mbccm", weight_joint=0.1)]) == ["weight_joint"]
    three = [settings("united"), settings("mbccm"), settings("mbccm", weight_joint=0.1)]
    assert _differing(three) == ["method", "weight_joint"]


def test_without_images_there_are_score_and_time(runs, tmp_path, caplog):
    copy = shutil.copytree(runs / "a", tmp_path / "copy")
    rewrite(copy / "resume.safetensors", lambda about, _: about["dataset"].update(root="/moved"))
    found = compare([copy, runs / "b"], device="cpu")
    (row,) = (group.row() for group in found.groups)
    assert "no longer at" in caplog.text and "accuracy of 1 of 2 runs" in row["caution"]
    assert row["n"] == 2 and "score" in row and "accuracy of 1 of 2 runs" in found.table()
    with pytest.raises(ValueError, match="no run directory"):
        compare([tmp_path])


def test_the_command_prints_every_form_and_draws(runs, world, capsys, tmp_path):
    command = ["compare", *(str(runs / name) for name in "abc"), "--device", "cpu"]
    told = {}
    for form in ("text", "markdown", "csv", "latex", "json"):
        assert main([*command, "--format", form]) == 0
        told[form] = capsys.readouterr().out
    rows = json.loads(told["json"])["rows"]
    table = list(csv.DictReader(io.StringIO(told["csv"])))
    assert [float(row["all mAP"]) for row in table] == [row["all mAP"] for row in rows]
    cell = f"{rows[0]['all mAP']:.2f} ± {rows[0]['all mAP std']:.2f}"
    assert f"| {cell} |" in told["markdown"]
    assert cell in told["text"] and cell.replace("±", r"$\pm$") in told["latex"]
    assert r"epochs\_cross" in told["latex"] and told["latex"].count(r"\\") == 3
    assert f"{rows[1]['all mAP']:.2f}  " in told["text"]  # one run has no deviation
    assert main([*command, "-o", str(tmp_path / "curves.png")]) == 0
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 5
    evaluated = ["evaluate", "sysu", world, "--model", str(runs / "a"), "--device", "cpu"]
    for form, start in (("latex", "mode & rank1 &"), ("markdown", "| mode | rank1 |")):
        assert main([*evaluated, "--format", form]) == 0
        assert start in capsys.readouterr().out


def test_the_curves_are_means_over_runs_with_their_deviation(runs, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    compare([runs / name for name in "abc"], device="cpu").draw(tmp_path / "x.png")
    axes = {panel.get_title(loc="left").split()[0]: panel for panel in drawn[0].axes}
    assert set(axes) == {"label-free", "sum", "adjusted"}
    named = {line.get_label(): line.get_ydata() for line in axes["sum"].lines}
    both, short = named
    assert both.startswith(f"{runs / 'a'} and 1 more (n = 2), epochs_cross 1, ")
    assert short == f"{runs / 'c'}, epochs_cross 0, lr 0.002, epochs done 1" and len(named[short]) == 1
    last = [read_run(runs / name).history[1] for name in "ab"]
    sums = [sum(v for k, v in row.items() if k.startswith("loss_")) for row in last]
    assert named[both][1] == pytest.approx(np.mean(sums))
    (band,) = axes["sum"].collections
    assert band.get_paths()[0].vertices[:, 1].max() >= np.mean(sums) + np.std(sums) - 1e-6
    # a run that has no such values
    curves = {"a": np.full((1, 3), np.nan), "b": np.ones((2, 3))}
    pictures.draw_curves(tmp_path / "y.png", [pictures.Panel("t", "", curves)])


def test_tables_escape_what_a_form_means():
    lines, rows = [["a|b", "50 %"], ["x_1", "1 ± 2"]], [{"a|b": "x,1"}, {"other": 2}]
    assert render_table("markdown", "told", lines, rows) == (
        "told\n\n| a\\|b | 50 % |\n| --- | --- |\n| x_1 | 1 ± 2 |"
    )
    assert render_table("csv", "", lines, rows) == 'a|b,other\n"x,1",\n,2'
    latex = render_table("latex", "", lines, rows)
    assert r"x\_1 & 1 $\pm$ 2 \\" in latex and r"50 \%" in latex
    with pytest.raises(ValueError, match="expected one of text"):
        render_table("excel", "", lines, [])
