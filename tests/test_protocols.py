"""Each reader the whole way: a folder of the layout, `train`, `evaluate`; RegDB over two trials."""

import layouts
import pytest

from ecul import Config, Dataset, evaluate, open_dataset, train
from ecul.cli import main
from ecul.evaluation import average

TINY = Config.preset(
    "demo", epochs_intra=1, epochs_cross=1, tsmem_switch=1, iterations=2, identities=2, instances=2, width=8,
    size=(32, 16), pad=2, k1=4, k2=2, k3=4, k1_joint=4, k2_joint=2, k3_joint=4, min_samples=1,
    eps=0.1, eps_joint=0.1,
)  # fmt: skip


def trained(dataset):
    run = train(dataset, TINY, device="cpu")
    assert len(run.history) == 2 and not any(row.get("skipped") for row in run.history)
    return run.model


@pytest.mark.parametrize(
    ("name", "make", "options", "rows"),
    [
        ("sysu", layouts.sysu, {}, 2),
        ("llcm", layouts.llcm, {}, 3),
        ("market", layouts.market, {"protocol": "sysu"}, 2),
    ],
)
def test_from_folder_to_results(name, make, options, rows, tmp_path):
    make(tmp_path / "data")
    dataset = open_dataset(name, tmp_path / "data", subset=True, **options)
    results = evaluate(trained(dataset), dataset, progress=False)
    assert len(results.rows) == rows and all(0 < row["mAP"] <= 100 for row in results.rows)
    assert all(row["reranking"] == "no re-ranking" for row in results.rows)


def test_regdb_over_two_trials_and_models(tmp_path):
    layouts.regdb(tmp_path / "data")
    trials = [open_dataset("regdb", tmp_path / "data", trial=t, subset=True) for t in (1, 2)]
    results = average(evaluate(trained(dataset), dataset, progress=False) for dataset in trials)
    assert [row["direction"] for row in results.rows] == ["visible-to-infrared", "infrared-to-visible"]
    assert all(row["trials"] == 2 and 0 < row["mAP"] <= 100 for row in results.rows)


def test_the_report_of_a_trial_opens_that_trial_again(tmp_path, capsys):
    layouts.regdb(tmp_path / "data")
    dataset = open_dataset("regdb", tmp_path / "data", trial=2, subset=True)
    train(dataset, TINY, device="cpu", output=tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--queries", "1", "--top", "2"]) == 0
    assert (tmp_path / "run" / "report" / "clusters.png").is_file()
    assert main(["report", str(tmp_path / "run"), "--option", "trial=1"]) == 2
    assert "not the one that" in capsys.readouterr().err


def test_a_subset_is_refused_unless_it_is_called_one(tmp_path):
    layouts.sysu(tmp_path / "data")
    with pytest.raises(ValueError, match="22,?258"):
        train(open_dataset("sysu", tmp_path / "data"), TINY, device="cpu")


@pytest.mark.parametrize("cameras", [True, False])
def test_ones_own_folders(cameras, tmp_path):
    layouts.folders(tmp_path, cameras=cameras, images=6)
    trained(Dataset.from_folders(visible=tmp_path / "day", infrared=tmp_path / "night", cameras=cameras))
