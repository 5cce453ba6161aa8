"""Same person or not: the estimated errors are the true ones, on both synthetic worlds, without a label."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from tiny import tiny

from ecul import MODALITIES, Config, TwoStreamResNet, extract, open_dataset, synthesize
from ecul.augment import normalize
from ecul.cli import main
from ecul.features import FolderFeatures
from ecul.report.pictures import RIGHT, draw_ranking
from ecul.tools.search import Ranking
from ecul.tools.threshold import Threshold, estimate_threshold, measure_pairs, measure_threshold

SIZE = (32, 16)


def blind(dataset):
    """The training images alone, without identities and cameras."""
    sides = {m: copy.copy(getattr(dataset, m)) for m in MODALITIES}
    for side in sides.values():
        side.pids, side.camids = None, 0 * side.camids
    return dataclasses.replace(dataset, test_visible=None, test_infrared=None, **sides)


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["shared", "gap"])
def measured(request, tmp_path_factory):
    """Thresholds from one half of a world without identities and cameras; the other half."""
    root = tmp_path_factory.mktemp("t") / "world"
    sizes = {"identities": 24, "test_identities": 24, "images": 2, "size": SIZE}
    dataset = open_dataset("sysu", synthesize(root, **sizes, gap=request.param, progress=False))
    torch.manual_seed(0)
    model = TwoStreamResNet(10, 16, False, SIZE)
    for _ in range(20):  # until the running statistics fit
        model(*(normalize(getattr(dataset, m).load(SIZE, progress=False)[::2]) for m in MODALITIES))
    config = tiny(k1_joint=12, k3_joint=12, eps_joint=0.5, min_samples=4)
    tested = {m: getattr(dataset, f"test_{m}") for m in MODALITIES}
    features = {m: extract(model.eval(), tested[m], m, progress=False) for m in MODALITIES}
    return measure_threshold(model, blind(dataset), config), features, tested


def test_a_network_that_has_learned_little_gets_smaller_clusters(dataset):
    """At the preset's eps one cluster holds every image of a random network."""
    torch.manual_seed(0)
    model = TwoStreamResNet(10, 8, False, SIZE)
    found = measure_threshold(model, blind(dataset), Config.preset("demo", size=SIZE))
    assert "images, by clusters; known people missed" in found.told
    assert np.isfinite([*found.tails.values()]).all()


@pytest.mark.parametrize("sides", [(q, g) for q in MODALITIES for g in MODALITIES], ids="-".join)
def test_estimated_errors_are_the_true_ones(measured, sides):
    threshold, features, images = measured
    location, scale = threshold.tails["-".join(sides)]
    cosines = (features[sides[0]] @ features[sides[1]].T).numpy()
    other = images[sides[0]].pids[:, None] != images[sides[1]].pids
    for share in (0.1, 0.03, 0.01):
        true = (cosines[other] >= location + scale * norm.isf(share)).mean()
        assert share / 3 < true < 2 * share
    best = np.where(other, cosines, -2).max(1)  # all are unknown people where their own images are left out
    least = threshold.at(*sides, int(other.sum(1).mean()))
    assert (best >= least).mean() < 0.1 + 0.13  # two deviations of a share of 24 people


def normal():
    return Threshold({f"{query}-{gallery}": (0.1, 0.2) for query in MODALITIES for gallery in MODALITIES})


def test_a_threshold_grows_with_the_gallery():
    found, sides = normal(), ("visible", "infrared")
    assert found.at(*sides, 1) == pytest.approx(0.1 + 0.2 * norm.isf(0.1))
    assert found.at(*sides, 1000) == pytest.approx(0.1 + 0.2 * norm.isf(1 - 0.9 ** (1 / 1000)))


def test_own_people_are_other_images_of_the_same_label():
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1]]), dim=1)
    images = [rows, torch.tensor([0, 0, 1]), torch.zeros(3)]
    # 0 and 1 have each other, 2 nobody
    assert np.allclose(measure_pairs(images, images)[1], [0.5**0.5] * 2)
    assert np.allclose(measure_pairs(images, [*images])[1], 1)  # of the other modality
    with pytest.raises(ValueError, match="needs images of two different people"):
        estimate_threshold(
            rows, torch.tensor([0, 0, -1]), torch.zeros(3), torch.tensor([0, 1, 1]), "clusters"
        )


def test_pairs_of_one_camera_are_too_much_alike_to_learn_from():
    """Each camera has a background that all its images share: other cameras alone tell people apart."""
    generator = torch.Generator().manual_seed(0)
    people = torch.arange(40).repeat_interleave(6)
    rows = torch.randn(40, 64, generator=generator)[people]
    codes = torch.arange(240) % 3
    rows += 3 * torch.randn(3, 64, generator=generator)[codes]
    rows = torch.nn.functional.normalize(rows + torch.randn(240, 64, generator=generator), dim=1)
    (location, scale), own = measure_pairs([rows, people, codes], [rows, people, codes])
    blind, alike = measure_pairs([rows, people, 0 * codes], [rows, people, 0 * codes])
    wrong = (rows @ rows.T)[(codes[:, None] != codes) & (people[:, None] != people)]
    assert 0.01 < float((wrong >= location + scale * norm.isf(0.03)).float().mean()) < 0.06
    assert location + 3 * scale < 0.5 < 0.8 < blind[0] + 3 * blind[1]
    assert (own < 0.5).float().mean() > 0.9 > 0.1 > (alike < 0.5).float().mean()


@pytest.mark.parametrize(("noise", "told"), [(0.05, "  0 of 80"), (2.0, "of 80, of little use")])
def test_the_table_counts_known_people_who_are_missed(noise, told):
    generator, people = torch.Generator().manual_seed(0), torch.arange(20).repeat_interleave(4)
    rows = torch.randn(20, 64, generator=generator)[people]
    rows = torch.nn.functional.normalize(rows + noise * torch.randn(80, 64, generator=generator), dim=1)
    sides = torch.arange(160) % 2
    table = [part.repeat_interleave(2, 0) for part in (rows, people, torch.arange(80) % 4)]
    table = estimate_threshold(*table, sides, "identities").told
    assert table.count(told) == 4 and ("of little use" in table) == (noise > 1)


def test_it_is_kept_with_the_model_and_forgotten_with_its_weights(tmp_path, caplog):
    model, found = TwoStreamResNet(10, 4, False, SIZE), normal()
    model.save_pretrained(tmp_path)
    assert Threshold.load(tmp_path) is None
    found.save(tmp_path)
    assert Threshold.load(tmp_path) == found == Threshold.load(tmp_path / "model.safetensors")
    TwoStreamResNet(10, 4, False, SIZE).save_pretrained(tmp_path)
    assert Threshold.load(tmp_path) is None
    assert f"threshold.json is of other weights than {tmp_path / 'model.safetensors'}" in caplog.text


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ({"location": math.nan, "scale": 1}, "its numbers are not finite"),
        ({"location": 0, "scale": "1"}, ""),
        ({"location": 0}, "'scale' is missing"),
        (None, ""),
    ],
)
def test_a_damaged_threshold_is_named(tmp_path, pair, told):
    TwoStreamResNet(10, 4, False, SIZE).save_pretrained(tmp_path)
    file = normal().save(tmp_path)
    saved = json.loads(file.read_text())
    saved["pairs"]["visible-infrared"] = pair
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"threshold.json is damaged: .*{told}"):
        Threshold.load(tmp_path)


def colours_drawn(path, ranking):
    draw_ranking(path, ranking)
    found = Image.open(path).convert("RGB").getcolors(1 << 24)
    return {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in found}


def test_a_ranking_marks_the_same_person_and_nobody(tmp_path):
    for name, tone in (("a", 10), ("b", 120)):
        Image.new("RGB", (8, 16), (tone,) * 3).save(tmp_path / f"{name}.png")
    files = FolderFeatures(torch.eye(2), [str(tmp_path / f"{n}.png") for n in "ab"], "visible", [])
    scores = torch.tensor([[0.9, 0.4], [0.4, 0.1]])
    ranking = Ranking(files, files, torch.tensor([[0, 1], [1, 0]]), scores, 0.5)
    lines = ranking.table().splitlines()
    assert lines[1].split()[1:3] == ["0.900", "="] and "=" not in lines[2]
    assert lines[3] == f"{tmp_path / 'b.png'}: nobody (none reaches 0.500)"
    assert [a["same"] for a in ranking.to_dict()[files.paths[0]]] == [True, False]
    plain = dataclasses.replace(ranking, threshold=None)
    assert "nobody" not in plain.table() and "same" not in plain.to_dict()[files.paths[0]][0]
    seen, unmarked = (colours_drawn(tmp_path / "found.png", drawn) for drawn in (ranking, plain))
    assert RIGHT in seen and RIGHT not in unmarked


def test_from_the_shell(world, tmp_path, capsys):
    torch.manual_seed(0)
    TwoStreamResNet(10, 4, False, SIZE).save_pretrained(tmp_path)
    command = ["search", str(tmp_path), "--query", f"{world}/cam3", "--gallery", f"{world}/cam1"]
    command += ["--query-modality", "infrared", "--gallery-modality", "visible", "--top", "1"]
    assert main(command) == 0 and " =  " not in (out := capsys.readouterr().out) and "nobody" not in out
    assert main(["threshold", "sysu", world, "--model", str(tmp_path), "--preset", "demo"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("similarity of the same person among 1,000 images, by identities")
    assert "kept in" in out
    assert main(command) == 0
    answers = capsys.readouterr().out
    assert answers.count(" =  ") + answers.count(": nobody (none reaches ") == len(answers.splitlines()) / 2
