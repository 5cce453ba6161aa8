"""Pictures of a run: right in what they say, whole in one file, drawn without a display."""

import dataclasses
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Pooled, rewrite, tiny

from ecul import MODALITIES, Dataset, evaluate, train
from ecul.data import Images
from ecul.labels import Labels, assign_labels
from ecul.model import Backbone
from ecul.report import pictures, report
from ecul.report.measured import (
    Cluster,
    Embedded,
    choose_queries,
    cluster_rows,
    match_rows,
    measure_clusters,
    next_labels,
    ranked_rows,
)
from ecul.run.saved import read_run
from ecul.tools.search import FolderFeatures, Ranking
from ecul.training import extract_exchanged
from ecul.trainset import TrainImages


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    return train(dataset, tiny(), output=tmp_path_factory.mktemp("r") / "run")


def test_a_report_has_every_picture_and_needs_nothing_beside_it(run, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # which belongs to the caller
    page = report(run.output, dataset, queries=3, top=4, progress=False)
    assert page == run.output / "report" / "index.html"
    drawn = {file.name: np.asarray(Image.open(file)) for file in page.parent.glob("*.png")}
    assert set(drawn) == {f"{name}.png" for name in ("curves", "ranked", "clusters", "pairs")}
    assert all(picture.std() > 5 for picture in drawn.values())
    text = page.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)
    for heading in ("Ranked lists", "Clusters", "Visible-infrared matches", "Curves", "Settings"):
        assert f"<h2>{heading}</h2>" in text
    assert "3 random infrared queries" in text and "2 of 2 epochs done, stage 2" in text
    assert "united on sysu" in text and "<td>k1_joint</td><td>8</td>" in text
    for name, images in dataset.splits().items():
        assert f"<td>{name}</td><td>{len(images)}</td>" in text
    for row in evaluate(run.model, dataset, progress=False).rows:
        assert f"<td>{row['mode']}</td><td>{row['rank1']:.2f} ± {row['rank1_std']:.2f}</td>" in text
    assert "own test set; single-shot" in text
    for size in ({"queries": 0}, {"queries": 30, "top": 20}):
        with pytest.raises(ValueError, match="queries and top must be at least 1, with at most 600 images"):
            report(run.output, dataset, **size)


def test_images_that_moved_are_asked_for_and_other_ones_are_refused(run, dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.output, copy, ignore=shutil.ignore_patterns("report"))

    def change(about, _):
        about["dataset"]["root"], about["config"]["min_samples"] = "/moved", 500

    rewrite(copy / "resume.safetensors", change)
    with pytest.raises(ValueError, match="no longer at /moved; --root"):
        report(copy)
    page = report(copy, root=dataset.root, queries=1, top=1, progress=False)
    assert "fewer than two clusters" in page.read_text()
    fewer = dataclasses.replace(dataset, visible=dataset.visible.subset(slice(1, None)))
    with pytest.raises(ValueError, match="not the one that .* visible_images is"):
        report(run.output, fewer, progress=False)
    with pytest.raises(ValueError, match="no run directory"):
        report(tmp_path)


def test_images_without_identities_and_a_first_stage_alone(tmp_path):
    rng = np.random.default_rng(0)
    people = rng.integers(0, 256, (6, 4, 2, 3))
    piles = []
    for count in (30, 24):
        which = people[np.arange(count) % 6].repeat(8, 1).repeat(8, 2)
        piles.append((which * 0.9 + rng.integers(0, 20, which.shape)).astype(np.uint8))
    dataset = Dataset.from_arrays(*piles)
    run = train(dataset, tiny(epochs_cross=0), output=tmp_path / "run")
    text = report(run.output, dataset, queries=2, progress=False).read_text()
    assert "Ranked lists" in text and "matches between" in text and "Accuracy" not in text


def test_frames_have_their_colours_and_images_their_places(tmp_path):
    black, step = np.zeros((20, 10, 3), np.uint8), pictures.WIDTH + pictures.GAP
    right, wrong = (pictures.Cell(black + 90, "b", pictures.RIGHT), pictures.Cell(black, "c", pictures.WRONG))
    pictures.draw_sheet(tmp_path / "sheet.png", [("query", [right, None, wrong])])
    line = np.asarray(Image.open(tmp_path / "sheet.png"))[2 * pictures.GAP + pictures.HEIGHT, :, :3]
    expected = [("5a5a5a", pictures.RIGHT), ("ffffff", "#ffffff"), ("000000", pictures.WRONG)]
    for place, (tone, frame) in enumerate(expected):
        left = 2 * (pictures.LABEL + place * step)
        assert bytes(line[left + pictures.WIDTH]).hex() == tone and "#" + bytes(line[left - 2]).hex() == frame


def test_curves_take_skipped_epochs_panels_without_values_and_one_epoch(tmp_path, monkeypatch):
    rows = [{"epoch": e, "stage": 1 + (e > 1), "loss_a": 1.0, "clusters_visible": e} for e in range(4)]
    rows[1] = {"epoch": 1, "stage": 1, "skipped": True, "clusters_visible": 1}
    assert [panel.title for panel in pictures.panels_of(rows)] == ["losses", "clusters"]
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    pictures.draw_curves(tmp_path / "curves.png", pictures.panels_of(rows), 2)
    losses, clusters = ([line.get_xdata() for line in axes.lines] for axes in drawn[0].axes)
    assert [list(x) for x in losses] == [[1, 3, 4], [2.5, 2.5]] and list(clusters[0]) == [1, 2, 3, 4]
    pictures.draw_curves(tmp_path / "curves.png", pictures.panels_of(rows[:1]))
    ticks = [tick for axes in drawn[1].axes for tick in axes.get_xticks()]
    assert ticks and all(tick == int(tick) for tick in ticks) and len(drawn[1].axes[0].lines) == 1


def pile(modality, camids, pids):
    return Images.from_array(np.zeros((len(camids), 4, 2), np.uint8), modality, camids, pids)


def test_queries_are_of_different_people_and_always_the_same_ones():
    images = pile("infrared", [3] * 20, np.arange(20) // 5)
    rows = choose_queries(images, 4)
    assert sorted(images.pids[rows]) == [0, 1, 2, 3] and rows == choose_queries(images, 4)
    assert len(choose_queries(images, 9)) == 4
    assert len(set(choose_queries(pile("infrared", [3] * 20, None), 9))) == 9


def table_of(*features):
    """Blank images of both modalities with these features."""
    cameras = zip(MODALITIES, ([1], [3]), features, strict=True)
    images = tuple(pile(name, camera * len(rows), None) for name, camera, rows in cameras)
    blank = tuple(torch.zeros(len(rows), 3, 4, 2, dtype=torch.uint8) for rows in features)
    return Embedded(images, blank, torch.cat(features))


def around(*angles):
    """Unit rows at these angles of a circle."""
    angles = np.concatenate(angles)
    return torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1), dtype=torch.float32)


def test_clusters_are_measured_within_their_modality_and_shown_once_each():
    """Matched clusters are near each other, and that is good."""
    own = torch.arange(4).repeat_interleave(torch.tensor([5, 4, 3, 2]))
    apart = [np.full(n, a) for n, a in ((5, 0.0), (4, 1.5), (3, 3.0), (2, 4.5))]
    near = [np.full(5, 0.01), [1.2, 1.4, 1.6, 1.8], [1.3, 1.5, 1.75], np.full(2, 4.51)]  # two are mixed
    features = around(*apart, *map(np.array, near))
    own[13] = -1  # an outlier of both
    clusters = measure_clusters(features, Labels.from_own(features, own.repeat(2), 14))
    assert [(side.modality, len(side.rows)) for side in clusters] == [
        (modality, size) for modality in MODALITIES for size in (5, 4, 3, 1)
    ]
    assert [side.silhouette > 0.1 for side in clusters] == [True] * 5 + [False] * 2 + [True]
    assert clusters[5].rows[:2] in ([20, 21], [21, 20])  # the images nearest to the centre
    _, rows = cluster_rows(table_of(features[:14], features[14:]), clusters)
    named = [tuple(label.splitlines()[:2]) for label, _ in rows]
    shown = {kind: {size for kinds, size in named if kind in kinds} for kind in ("large", "small", "least")}
    assert shown["large"] == {"5 visible images", "5 infrared images", "4 visible images"}
    assert shown["small"] == {"1 visible images", "1 infrared images", "3 visible images"}
    assert shown["least"] > {"4 infrared images", "3 infrared images"} and len(set(named)) == len(named)


def test_answers_are_green_red_or_for_a_distractor_gray_and_those_that_a_protocol_ignores_are_left_out():
    gallery, query = pile("visible", [2, 1, 1, 1], [7, 7, 8, -1]), pile("infrared", [3, 3], [-1, 7])
    blank = tuple(torch.zeros(len(side), 3, 4, 2, dtype=torch.uint8) for side in (gallery, query))
    table = Embedded((gallery, query), blank, around([0.0, 0.1, 0.2, 0.3], [0.0, 0.0]))
    for protocol, ignored in (("sysu", 1), ("llcm", 0), (None, 0)):
        _, ((_, cells),) = ranked_rows(table, protocol, 2, 4)
        colours = [pictures.RIGHT, pictures.RIGHT, pictures.WRONG, pictures.NEUTRAL][ignored:]
        assert [cell.color for cell in cells[2:]] == colours


def test_a_run_does_not_choose_where_we_write(run, dataset, tmp_path):
    theirs, copy = tmp_path / "theirs", tmp_path / "copy"
    shutil.copytree(dataset.root, theirs / "world", ignore=shutil.ignore_patterns(".ecul-pack"))
    copy.mkdir()
    for name in ("resume.safetensors", "model.safetensors"):
        shutil.copy(run.output / name, copy)
    where = {"root": str(theirs / "world"), "options": {"pack": str(theirs / "packs")}}
    rewrite(copy / "resume.safetensors", lambda about, _: about["dataset"].update(where))
    before = sorted(theirs.rglob("*"))
    assert "Ranked lists" in report(copy, queries=1, top=2, progress=False).read_text()
    assert sorted(theirs.rglob("*")) == before
    shutil.rmtree(copy / "report")
    (copy / "report").symlink_to(theirs, target_is_directory=True)
    with pytest.raises(ValueError, match="report is a link"):
        report(copy)
    assert sorted(theirs.rglob("*")) == before


def test_what_search_draws_fits_a_screen_and_takes_names_of_any_script(tmp_path):
    name = str(tmp_path / "監視 $x_1$ caf\udce9.png")
    Image.new("RGB", (4, 8)).save(name)
    found = FolderFeatures(torch.zeros(30, 2), [name] * 30, "visible", [])
    ranking = Ranking(found, found, torch.arange(25).repeat(30, 1), torch.zeros(30, 25))
    pictures.draw_ranking(tmp_path / "found.png", ranking)
    width, height = Image.open(tmp_path / "found.png").size
    assert width < 2200 and 1500 < height < 2200  # five queries, at 200 dots an inch: a screen


def test_a_network_of_ones_own_is_given_in_python(dataset, tmp_path):
    train(dataset, tiny(), output=tmp_path / "own", model=Pooled())
    with pytest.raises(ValueError, match="holds Backbone, not TwoStreamResNet; "):
        report(tmp_path / "own", progress=False)
    model = Backbone.from_pretrained(tmp_path / "own", Pooled())
    page = report(tmp_path / "own", model=model, queries=1, top=400, progress=False)
    assert "Ranked lists" in page.read_text()


def test_long_names_are_broken_and_keep_their_ends():
    assert pictures.short_name("/a/b/" + "x" * 30 + ".jpg", 24) == "b\n…" + "x" * 23
    assert pictures.short_name("people/gate/person (259).png") == "gate\nperson (259)"
    assert pictures.short_name("3.png") == "3"


def test_matches_are_shown_from_the_best_to_the_worst():
    table = table_of(torch.zeros(18, 2), torch.zeros(18, 2))
    members = torch.arange(36).view(12, 3).tolist()
    clusters = [Cluster(MODALITIES[n // 6], rows, 1.0) for n, rows in enumerate(members)]
    cosines = np.linspace(0.2, 0.9, 6)
    _, rows = match_rows(table, clusters, np.diag(cosines), np.eye(6, dtype=bool))
    best = cosines[::-1]
    assert [label for label, _ in rows] == [f"match {n} of 6\ncosine {c:.3f}" for n, c in enumerate(best, 1)]
    for _, (*visible, gap, a, b, c) in rows:
        assert gap is None and [cell.color for cell in visible] == [pictures.MODALITY["visible"]] * 3
        assert [cell.color for cell in (a, b, c)] == [pictures.MODALITY["infrared"]] * 3


def test_images_are_shown_larger_than_the_network_gets_them(tmp_path):
    original = np.random.default_rng(0).integers(0, 256, (*pictures.SIZE, 3), dtype=np.uint8)
    Image.fromarray(original).save(tmp_path / "a.png")
    images = Images.from_paths([tmp_path / "a.png"], "visible"), Images.from_paths([], "infrared")
    tiny = torch.zeros(1, 3, 4, 2, dtype=torch.uint8)
    assert np.array_equal(Embedded(images, (tiny, tiny[:0]), torch.zeros(1, 2)).cell(0).image, original)


def test_clusters_are_matched_as_the_next_epoch_would(run, dataset):
    """By the exchanged views too: the labels of one more epoch of the same run."""
    saved = read_run(run.output)
    table = Embedded.by(run.model, (dataset.visible, dataset.infrared), False)
    shown = next_labels(table, saved, run.model)
    images = TrainImages(table.pixels, torch.cat([torch.as_tensor(i.camids) for i in table.images]))
    exchanged = extract_exchanged(run.model, images, saved.config, 2)
    learnt = assign_labels(table.features, images, saved.config, 2, exchanged)
    assert np.array_equal(shown.match, learnt.match) and torch.equal(shown.own, learnt.own)
    blind = assign_labels(table.features, images, saved.config, 2)
    assert not np.array_equal(shown.match, blind.match)
    before = dataclasses.replace(saved, history=saved.history[: saved.config.epochs_intra - 1])
    assert next_labels(table, before, run.model).match is None
