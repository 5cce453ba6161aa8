"""From a folder of a layout to its figures: `train`, `evaluate`; RegDB over two trials."""

import json
from dataclasses import replace

import layouts
import numpy as np
import pytest
from tiny import tiny

from ecul import MODALITIES, evaluate, open_dataset, train
from ecul.cli import main
from ecul.data.layouts import LAYOUTS
from ecul.report.page import report

TINY = tiny(identities=2, min_samples=1, k1=4, k1_joint=4, k3_joint=4, eps=0.1, eps_joint=0.1)


def test_market_goes_from_a_folder_to_results(tmp_path):
    """As the other layouts do in scripts/reproduce."""
    dataset = open_dataset("market", layouts.market(tmp_path / "data"), subset=True, protocol="sysu")
    run = train(dataset, TINY, device="cpu")
    assert len(run.history) == 2 and not any(row.get("skipped") for row in run.history)
    results = evaluate(run.model, dataset, progress=False)
    assert len(results.rows) == 2 and all(0 < row["mAP"] <= 100 for row in results.rows)


def test_a_subset_is_refused_unless_it_is_called_one(tmp_path):
    layouts.sysu(tmp_path / "data")
    with pytest.raises(ValueError, match="22,?258"):
        train(open_dataset("sysu", tmp_path / "data"), TINY, device="cpu")


def test_a_run_is_tested_on_the_trial_that_it_was_trained_on(tmp_path, capsys):
    """Trials share people: another trial's test images are refused."""
    root, runs = str(layouts.regdb(tmp_path / "data")), tmp_path / "runs"
    fields = [f"{k}={json.dumps(v)}" for k, v in TINY.to_dict().items() if k != "method"]
    command = ["train", "regdb", root, "-o", str(runs), "--option", "subset=true", "--trials", "1-2"]
    command += ["--preset", "demo", "--device", "cpu", *(part for f in fields for part in ("--set", f))]
    assert main(command) == 0
    with pytest.raises(SystemExit):
        main([*command, "--trials", "2-1"])
    assert "the smaller first, got '2-1'" in capsys.readouterr().err
    assert main(command) == 2 and "holds a run; resume it" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0 and "trial-2" in capsys.readouterr().out
    ask = ["evaluate", "regdb", root, "--option", "subset=true", "--format=json"]
    rows = {}
    for name, models in (("one", ["trial-1"]), ("two", ["trial-2"]), ("both", ["trial-1", "trial-2"])):
        assert main([*ask, "--model", *(str(runs / model) for model in models)]) == 0
        rows[name] = json.loads(capsys.readouterr().out)["rows"]
    assert [rows[name][0]["protocol"] for name in rows] == ["RegDB trial 1", "RegDB trial 2", "RegDB"]
    assert main([*ask[:-1], "--model", str(runs / "trial-1")]) == 0
    assert "; one trial; percent\n" in (told := capsys.readouterr().out) and "±" not in told
    assert main([*ask[:-1], "--model", str(runs)]) == 0
    assert "; 2 trials; percent, mean ± deviation\n" in (told := capsys.readouterr().out) and " ± " in told
    for one, two, both in zip(*rows.values(), strict=True):
        assert both["trials"] == 2 and both["mAP"] == pytest.approx((one["mAP"] + two["mAP"]) / 2)
        assert one["caution"] == two["caution"] == "not RegDB's own test set"
    assert main([*ask, "--model", str(runs)]) == 0  # all of them
    assert json.loads(capsys.readouterr().out)["rows"] == rows["both"]
    assert main([*ask, "--option", "trial=1", "--model", str(runs / "trial-2")]) == 2
    assert "trial-2 was trained on trial 2" in capsys.readouterr().err
    ask[-1:] = ["--option", "trial=1", "--model", str(runs / "trial-2" / "model.safetensors")]
    assert main(ask) == 2 and "trained on trial 2" in capsys.readouterr().err  # by its file, too
    assert main([*ask[:-1], str(runs), str(runs / "trial-1")]) == 2
    assert "names a model twice" in capsys.readouterr().err
    own = ["regdb", root, "--option", "subset=true", "--model", str(runs / "trial-2")]
    assert main(["threshold", *own]) == 0
    for command in ("threshold", "tune"):
        assert main([command, *own, "--option", "trial=1"]) == 2
        assert "trial-2 was trained on trial 2" in capsys.readouterr().err
    assert main(["report", str(runs / "trial-2"), "--queries", "1", "--top", "2"]) == 0  # opens that trial
    with pytest.raises(ValueError, match="not the one that"):
        report(runs / "trial-2", open_dataset("regdb", root, trial=1, subset=True))


def test_a_set_with_counts_of_its_own_is_named_beside_its_figures(tmp_path, monkeypatch):
    dataset = open_dataset("sysu", layouts.sysu(tmp_path), subset=True)
    features = {m: np.eye(len(getattr(dataset, f"test_{m}")), 99) for m in MODALITIES}
    for more, caution in ((1, "not SYSU-MM01's own test set"), (0, "")):  # more people than published
        counts = {}
        for name, images in dataset.splits().items():
            counts[name] = {"images": len(images) - more, "identities": len(images.people()) - more}
        monkeypatch.setitem(LAYOUTS, "sysu", replace(LAYOUTS["sysu"], counts=counts))
        results = evaluate(None, dataset, features=features)
        assert {row["caution"] for row in results.rows} == {caution}
        assert (f"SYSU-MM01; {caution}; " in results.table()) == bool(caution)
