"""The rendered world: layout, determinism, independence of the two modalities' tones, errors."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecul.synthetic import world as synthetic
from ecul.synthetic.world import CAMERAS, draw_camera, render, synthesize

VISIBLE_CAMERAS, INFRARED_CAMERAS = (1, 2, 4, 5), (3, 6)
SMALL = {"identities": 6, "test_identities": 3, "images": 2, "seed": 5, "progress": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "world"
    assert synthesize(root, **SMALL) == str(root)
    return root


def files(root):
    return {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}


def ids(root, split):
    text = (root / "exp" / f"{split}_id.txt").read_text()
    assert text.count("\n") == 1 and text.endswith("\n")
    return [int(pid) for pid in text.split(",")]


def test_splits_and_files_are_exactly_those_promised(world):
    train, val, test = (ids(world, split) for split in ("train", "val", "test"))
    assert sorted(train + val + test) == list(range(1, 10))
    assert len(train + val) == 6 and len(val) == 1 and len(test) == 3
    assert [train, val, test] == [sorted(train), sorted(val), sorted(test)]
    expected = {"synthetic.json", *(f"exp/{split}_id.txt" for split in ("train", "val", "test"))}
    folders = [f"cam{camid}/{pid:04d}" for pid in range(1, 10) for camid in synthetic._cameras_of(5, pid)]
    assert set(files(world)) == expected | {f"{folder}/{n:04d}.jpg" for folder in folders for n in (1, 2)}
    about = json.loads((world / "synthetic.json").read_text())
    given = {name: SMALL[name] for name in ("identities", "test_identities", "images", "seed")}
    assert about["version"] == synthetic.VERSION
    assert about["parameters"] == {**given, "size": [64, 32], "gap": 0.0}


def test_images_are_rgb_as_those_of_sysu_and_infrared_ones_are_gray(world):
    """Loaders of published code index the third axis of every image."""
    for path in world.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 64))
            pixels = np.asarray(image)
        assert pixels.std() > 10
        assert (pixels == pixels[..., :1]).all() == (int(path.parts[-3][3:]) in INFRARED_CAMERAS)


def test_every_person_has_two_visible_and_one_infrared_camera_and_some_miss_one():
    seen = [synthetic._cameras_of(0, pid) for pid in range(1, 301)]
    assert {len(cameras) for cameras in seen} == {4, 5, 6} and seen.count(list(CAMERAS)) > 150
    for cameras in seen:
        assert cameras == sorted(set(cameras)) and set(cameras) <= set(CAMERAS)
        assert len(set(cameras) & set(VISIBLE_CAMERAS)) >= 2
        assert len(set(cameras) & set(INFRARED_CAMERAS)) >= 1


def contents(root):
    return {name: path.read_bytes() for name, path in files(root).items() if name.endswith(".jpg")}


def test_same_seed_same_bytes_other_seed_other_images(world, tmp_path):
    assert contents(Path(synthesize(tmp_path / "again", **SMALL))) == contents(world)
    other = contents(Path(synthesize(tmp_path / "other", **{**SMALL, "seed": 6})))
    common = other.keys() & contents(world).keys()
    assert common and all(other[name] != contents(world)[name] for name in common)


def test_an_image_does_not_depend_on_how_many_people_or_images_there_are(world, tmp_path):
    few = {**SMALL, "identities": 2, "test_identities": 1, "images": 1}
    found = contents(Path(synthesize(tmp_path / "few", **few)))
    assert len(found) > 9 and found.items() <= contents(world).items()


def tones_of_many(channels, people=600):
    tones = [synthetic.appearance(0, pid, channels)[1] for pid in range(people)]
    return {name: np.stack([tone[name] for tone in tones]) for name in tones[0]}


def test_colours_tell_nothing_about_infrared_reflectances():
    """Neither the tones nor their distance from middle gray correlate, beyond five standard errors."""
    visible, infrared = (tones_of_many(channels) for channels in (3, 1))
    for a in visible.values():
        for b in infrared.values():
            for change in (np.asarray, lambda tone: np.abs(tone - 0.5)):
                correlation = np.corrcoef(change(np.hstack([a, b])).T)
                assert np.abs(correlation[:3, 3]).max() < 5 / np.sqrt(len(a))


@pytest.mark.parametrize("gap, expected", [(0.0, 57_338), (0.5, 78_426), (1.0, 59_548)])
def test_the_pixels_are_those_of_version_2(gap, expected):
    """Published results depend on them. Whoever changes one raises VERSION, and measures again.

    24 people wear every kind of hair, garment and bag. Processors round a few pixels differently, by 1, which
    moves the sum with random signs by less than 50; another shape or tone moves it by more.
    """
    jobs = itertools.product(range(1, 25), CAMERAS)
    pixels = [render(5, pid, draw_camera(5, camid, gap), 2, (64, 32), gap) for pid, camid in jobs]
    signs = np.random.default_rng(0).choice([-1, 1], np.shape(pixels))
    assert synthetic.VERSION == 2 and (pixels * signs).sum() == pytest.approx(expected, abs=50)


@pytest.mark.parametrize("gap", [{"alike": 1.0}, {"slope": 1.0}])  # of people, of cameras
def test_worlds_of_different_gaps_have_people_in_common_and_no_image(gap, world, tmp_path):
    synthesize(tmp_path / "w", **SMALL, gap=gap)
    wide, none = files(tmp_path / "w"), files(world)
    same = [name for name, path in wide.items() if path.read_bytes() == none[name].read_bytes()]
    assert same == ["exp/test_id.txt", "exp/train_id.txt", "exp/val_id.txt"]


def test_the_parts_of_a_gap_can_be_given_by_name():
    """All of `GAP` is a gap of 1; waves change what is behind people, and no camera otherwise."""

    def pixels(gap):
        return render(5, 1, draw_camera(5, 1, gap), 2, (64, 32), gap)

    assert np.array_equal(pixels(synthetic.GAP), pixels(1.0)) and np.array_equal(pixels({}), pixels(0.0))
    plain, waved = pixels({}).astype(int), pixels({"clutter": 0.3}).astype(int)
    assert np.abs(waved - plain)[:, :40, :4].mean() > 5
    one, other = draw_camera(5, 1, {}), draw_camera(5, 1, {"clutter": 0.3})
    assert all(np.array_equal(one[name], other[name]) for name in one.keys() - {"waves", "boxes"})


WRONG = [
    {"gap": {"laws": 0.1}}, {"gap": {"law": 1.1}}, {"gap": {"law": "wide"}}, {"gap": [0.1]},
    {"gap": -0.1}, {"gap": 1.1}, {"gap": float("nan")}, {"gap": "wide"}, {"gap": None},
    {"identities": 1}, {"identities": "many", "test_identities": None}, {"identities": 2.5},
    {"identities": 9999}, {"test_identities": 0}, {"images": 0}, {"seed": -1},
    {"size": (31, 32)}, {"size": (64, 15)}, {"size": 64}, {"size": (64, 32, 3)},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_parameters_out_of_range_are_named_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        synthesize(tmp_path / "w", **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_second_call_changes_nothing(world, monkeypatch):
    before = {name: path.stat().st_mtime_ns for name, path in files(world).items()}
    monkeypatch.setattr(synthetic, "_write_world", None)
    assert synthesize(world, **SMALL) == str(world)
    with pytest.raises(ValueError, match="'images': 2.*'images': 3"):
        synthesize(world, **{**SMALL, "images": 3})
    with pytest.raises(ValueError, match="'gap': 0.0.*'gap': 0.5"):
        synthesize(world, **SMALL, gap=0.5)
    assert {name: path.stat().st_mtime_ns for name, path in files(world).items()} == before


def test_foreign_files_and_folders_are_left_alone(tmp_path):
    (tmp_path / "own").write_text("hello")
    rubbish = [b"", b"{}", b"[" * 100_000, b'{"version": ' + b"9" * 5000 + b"}", b"NaN", b"\xff"]
    named = [("mine.txt", b"{}"), *(("synthetic.json", content) for content in rubbish)]
    for number, (name, content) in enumerate(named):
        (tmp_path / f"w{number}").mkdir()
        (tmp_path / f"w{number}" / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    for root in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"root: .*{root.name} holds files .* not a synthetic world"):
            synthesize(root, **SMALL)
    assert sorted(tmp_path.rglob("*")) == before


def test_of_two_that_render_one_world_both_have_it(tmp_path, monkeypatch):
    """The second starts and ends while the first renders."""
    write, drafts = synthetic._write_world, []

    def watched(draft, *rest):
        drafts.append(draft)
        write(draft, *rest)
        if len(drafts) == 1:
            assert synthesize(tmp_path / "w", **SMALL) == str(tmp_path / "w")

    monkeypatch.setattr(synthetic, "_write_world", watched)
    assert synthesize(tmp_path / "w", **SMALL) == str(tmp_path / "w")
    assert len(set(drafts)) == 2 and [path.name for path in tmp_path.iterdir()] == ["w"]


def test_what_a_killed_call_left_is_removed_after_a_day(tmp_path):
    old, new = (tmp_path / f".synthetic-{digit * 16}" for digit in "ab")
    for folder in (old, new):
        (folder / "cam1").mkdir(parents=True)
    os.utime(old, (1, 1))
    synthesize(tmp_path / "world", **SMALL)
    assert not old.exists() and (new / "cam1").is_dir()


def test_an_empty_folder_a_long_name_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "ü" * 127, "a/b"):
        synthesize(tmp_path / name, identities=2, images=1, size=(48, 40), progress=False)
        assert len(ids(tmp_path / name, "test")) == 2  # by default
        with Image.open(next((tmp_path / name).rglob("*.jpg"))) as image:
            assert image.size == (40, 48)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_an_interruption_leaves_no_world(error, tmp_path, monkeypatch):
    whole = synthetic._write_job
    calls = []

    def failing(*job):
        calls.append(job)
        if len(calls) == 20:
            raise error
        whole(*job)

    monkeypatch.setattr(synthetic, "_write_job", failing)
    with pytest.raises(type(error)):
        synthesize(tmp_path / "w", **SMALL)
    assert len(calls) >= 20
    assert not list(tmp_path.iterdir())
