"""The study's lines are what their names say, and a shared first stage changes nothing."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny

from ecul import open_dataset, train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from study.lines import FAMILY, LINES, WORLDS, family  # noqa: E402
from study.runs import configure, supervise, train_shared  # noqa: E402
from study.tables import differences, interval, of_the_way, table  # noqa: E402


@pytest.mark.parametrize("world", WORLDS)
def test_no_two_lines_are_the_same_and_what_one_leaves_out_stays_out(world):
    lines = [line for line in LINES if line not in ("untrained", "supervised")]
    configs = {line: configure(line, world, 0, None, {}) for line in lines}
    assert len({*configs.values()}) == len(lines)
    alone, united = configs["+ EMCC (stage 1)"], configs["united"]
    assert alone.epochs_cross == 0 and alone.epochs == united.epochs
    assert configs["mbccm"].k3 is None and united.k3 is not None
    assert configs["united, plain Jaccard instead of EMCC"].k3_joint is None


def test_every_seed_of_the_family_draws_a_world_of_its_own_within_the_ranges():
    worlds = [family(seed) for seed in range(200)]
    assert len({str(world) for world in worlds}) == 200 and family(3) == worlds[3]
    assert {world["images"] for world in worlds} == {2, 3, 4, 5, 6}
    assert all(150 <= world["identities"] <= 400 for world in worlds)
    for name, (low, high) in FAMILY.items():
        drawn = [world["gap"][name] for world in worlds]
        assert 0.3 * low <= min(drawn) and 0.7 * high < max(drawn) <= high


@pytest.mark.parametrize(
    "fields",
    [{}, {"method": "ecul"}, {"method": "mbccm"}, {"update_rule": "tsmem", "weight_joint": 0.7}],
)
def test_a_shared_first_stage_gives_the_weights_of_a_whole_run(fields, world, tmp_path):
    config = tiny(epochs_intra=2, epochs_cross=2, k_select=2, eps_joint=0.5, **fields)
    dataset = open_dataset("sysu", world)
    whole = train(dataset, config).model.state_dict()
    for _ in range(2):  # made, then gone on from
        found = train_shared(dataset, config, 2, tmp_path)[0].state_dict()
        assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert not list(tmp_path.glob("run-*"))


@pytest.mark.parametrize("method", ["united", "ecul", "mbccm"])
def test_supervised_training_takes_the_identities_as_clusters(method, world):
    model, history = supervise(
        open_dataset("sysu", world), tiny(method=method, epochs_intra=1, epochs_cross=1)
    )
    for row in history:
        assert row["stage"] == 2 and not row.get("skipped")
        assert row["monitor_ari_visible"] == row["monitor_ari_infrared"] == 1 and row["outliers_visible"] == 0


def test_the_table_has_differences_in_pairs_with_their_interval():
    results = {
        "untrained": {"0": {"mAP": 10.0, "rank1": 5.0}, "1": {"mAP": 12.0, "rank1": 5.0}},
        "supervised": {"0": {"mAP": 50.0, "rank1": 50.0}, "1": {"mAP": 52.0, "rank1": 50.0}},
        "united": {"0": {"mAP": 40.0, "rank1": 30.0}, "1": {"mAP": 32.0, "rank1": 30.0}},
        "united, no contrast of matches": {
            "1": {"mAP": 30.0, "rank1": 20.0},
            "7": {"mAP": 99.0, "rank1": 99.0},
        },
    }
    assert differences(results, "united, no contrast of matches") == [-2.0]
    assert of_the_way(results, "united") == pytest.approx(0.625)
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4 and interval([2.0, 2.0]) == (2.0, 2.0)
    assert "| -2.0 (united) |" in table(results)  # one difference has no interval
    assert "| 36.0 ± 5.7 |" in table(results)
    results["united"]["0"] |= {"mAP_reranked": 46.5, "rank1_reranked": 41.0}
    assert "| 46.5 | 41.0 | +6.5 |" in table(results)
    results["united"]["1"] |= {"mAP_reranked": 38.5, "rank1_reranked": 41.0}
    assert "| 42.5 ± 5.7 | 41.0 ± 0.0 | +6.5 [+6.5, +6.5] |" in table(results)
