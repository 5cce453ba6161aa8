"""Label-free curves over eps and k1 agree with the clustering itself, and find what is there to find."""

import json
import re

import numpy as np
import pytest
import torch

from ecul import Config, TwoStreamResNet, emcc, extract
from ecul.cli import main
from ecul.run.scores import separation
from ecul.tools.tuning import EPS, Settings, tune, tune_config


def people(count, images, spread, seed=0):
    """Unit rows of `count` people, `images` of each, as far from them as `spread` says."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(count, 24, generator=generator).repeat_interleave(images, 0)
    return torch.nn.functional.normalize(
        centers + spread * torch.randn(centers.shape, generator=generator), dim=1
    )


def test_every_row_is_what_emcc_gives():
    features = people(8, 6, 0.9)
    cameras, modalities = torch.arange(48) % 3, torch.arange(48) % 2
    sizes = {"k2": 2, "k3": 6, "min_samples": 3}
    found = tune(features, cameras, modalities, k1=(4, 9), eps=(0.7, 0.3, 0.5), **sizes)
    assert [(row["k1"], row["eps"]) for row in found] == [(k1, e) for k1 in (4, 9) for e in (0.3, 0.5, 0.7)]
    for row in found:
        labels = emcc(features, cameras, modalities, k1=row["k1"], eps=row["eps"], **sizes)
        assert row["clusters"] == int(labels.max()) + 1 and row["outliers"] == int((labels < 0).sum())
        assert row["score"] == pytest.approx(separation(features, labels), abs=1e-6)


def test_the_best_score_lies_where_the_people_are():
    found = tune(people(12, 8, 0.9), k1=8, k2=3, k3=None, eps=(0.05, *EPS, 0.99))
    best = max(found, key=lambda row: row["score"])
    assert best["clusters"] == 12 and best["outliers"] <= 6
    assert found[0]["score"] < best["score"] > found[-1]["score"]
    rows, sizes = people(2, 4, 0.1), {"k2": 1, "k3": 2, "min_samples": 2}
    reversed_rows = tune(rows.numpy()[::-1], k1=torch.tensor(3), eps=0.5, **sizes)
    assert reversed_rows == tune(rows.flip(0), k1=[3], eps=[0.5], **sizes)
    assert json.loads(json.dumps(reversed_rows))[0]["k1"] == 3
    with pytest.raises(ValueError, match="k1 must be at least 1, got 0"):
        tune(people(4, 6, 0.5), k1=(0, 30))
    with pytest.raises(TypeError, match="features must be a dense tensor"):
        tune(people(2, 4, 0.1).to_sparse())


def test_one_setting_serves_both_modalities():
    def rows(*scores):
        same = {"k1": 5, "clusters": 3, "outliers": 0}
        return [{**same, "eps": e, "score": s} for e, s in zip((0.4, 0.5, 0.6), scores, strict=True)]

    found = Settings(
        {"visible": rows(0.5, 0.4, 0.0), "infrared": rows(0.0, 0.3, 0.4), "joint": rows(0, 0, 1)}
    )
    assert "recommended: --set k1=5 --set eps=0.5 --set k1_joint=5 --set eps_joint=0.6" in str(found)
    assert [row["eps"] for row in found.chosen.values()] == [0.5, 0.5, 0.6]


def test_each_clustering_is_tuned_with_its_own_images_and_sizes(dataset):
    torch.manual_seed(0)
    model, config = TwoStreamResNet(10, 4, False, (32, 16)).eval(), Config.preset("demo", k3=20)
    found, tables = tune_config(model, dataset, config, eps=[0.5]).rows, []
    for side in (dataset.visible, dataset.infrared):
        tables.append((extract(model, side, side.modality, progress=False), torch.from_numpy(side.camids)))
        sizes = {"k1": (6, 12, 24), "k2": config.k2, "k3": 20, "eps": 0.5}
        assert found[side.modality] == tune(*tables[-1], **sizes)
    rows, cameras = (torch.cat(parts) for parts in zip(*tables, strict=True))
    modalities = (torch.arange(len(rows)) >= len(dataset.visible)).long()
    sizes = {"k1": (10, 20, 40), "k2": config.k2_joint, "k3": config.k3_joint, "eps": 0.5}
    assert found["joint"] == tune(rows, cameras, modalities, **sizes)


def test_from_the_shell_with_a_picture_that_tells_what_the_text_does(world, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    torch.manual_seed(0)
    TwoStreamResNet(10, 4, False, (32, 16)).save_pretrained(tmp_path)
    command = ["tune", "sysu", world, "--model", str(tmp_path), "--preset", "demo"]
    assert main([*command, "-o", str(tmp_path / "tune.png")]) == 0
    text = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +(\d\S+) .*<- recommended$", text, re.M)
    assert len(rows) == 3
    assert f"recommended: --set k1={rows[0][0]} --set eps={float(rows[0][1]):g} --set k1_joint=" in text
    assert text.count("\n") == 3 * (2 + 39) + 1
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    told = [f"k1 {k1}, eps {float(eps):g} recommended" for k1, eps in rows for _ in range(3)]
    assert [title.partition(": ")[2] for title in titles] == told
    assert {axes.get_xlabel() for axes in drawn[0].axes} == {"eps"}
    scores = np.concatenate([line.get_ydata() for line in drawn[0].axes[2].lines])  # of the visible images
    printed = [float(line.split()[4]) for line in text.partition("infrared\n")[0].splitlines()[2:]]
    assert scores == pytest.approx(printed, abs=6e-4)
    assert drawn[0].axes[2].lines[0].get_xdata().tolist() == list(EPS)
