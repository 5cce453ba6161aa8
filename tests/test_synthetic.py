"""The rendered world: layout, determinism, independence of the two modalities' tones, errors."""

import hashlib
import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from ecul.synthetic import world as synthetic
from ecul.synthetic.figures import CLOTH, HAIR, LUMA, Canvas, Person, draw_person, draw_tones, reflectance
from ecul.synthetic.world import CAMERAS, INFRARED_CAMERAS, VISIBLE_CAMERAS, Camera, render, synthesize

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


def test_splits_are_one_sequence_dealt_by_the_seed(world):
    train, val, test = (ids(world, split) for split in ("train", "val", "test"))
    assert sorted(train + val + test) == list(range(1, 10))
    assert len(train + val) == 6 and len(val) == 1 and len(test) == 3
    assert [train, val, test] == [sorted(train), sorted(val), sorted(test)]


def test_layout_holds_exactly_the_promised_files(world):
    expected = {"synthetic.json", *(f"exp/{split}_id.txt" for split in ("train", "val", "test"))}
    for camid in CAMERAS:
        for folder in (world / f"cam{camid}").iterdir():
            assert 1 <= int(folder.name) <= 9 and len(folder.name) == 4
            expected |= {f"cam{camid}/{folder.name}/{n:04d}.jpg" for n in (1, 2)}
    assert set(files(world)) == expected


def test_images_open_in_the_mode_of_their_camera(world):
    for name, path in files(world).items():
        if path.suffix != ".jpg":
            continue
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert image.size == (32, 64)
            assert image.mode == ("L" if int(name[3]) in INFRARED_CAMERAS else "RGB")
            assert np.asarray(image).std() > 10


def test_every_person_has_two_visible_and_one_infrared_camera_and_some_miss_one():
    missing = [6 - len(synthetic._cameras_of(0, pid)) for pid in range(1, 301)]
    assert set(missing) == {0, 1, 2} and missing.count(0) > 150
    for pid in range(1, 301):
        cameras = synthetic._cameras_of(0, pid)
        assert cameras == sorted(set(cameras)) and set(cameras) <= set(CAMERAS)
        assert len(set(cameras) & set(VISIBLE_CAMERAS)) >= 2
        assert len(set(cameras) & set(INFRARED_CAMERAS)) >= 1


def test_synthetic_json_tells_parameters_and_counts(world):
    about = json.loads((world / "synthetic.json").read_text())
    assert about["generator"] == "ecul synthesize" and about["version"] == synthetic.VERSION
    assert about["parameters"] == {
        "identities": 6,
        "test_identities": 3,
        "images": 2,
        "size": [64, 32],
        "seed": 5,
    }
    for split, pids in {"train": ids(world, "train") + ids(world, "val"), "test": ids(world, "test")}.items():
        cameras = {
            str(camid): sum(len(list((world / f"cam{camid}" / f"{pid:04d}").glob("*.jpg"))) for pid in pids)
            for camid in CAMERAS
        }
        assert about["counts"][split] == {
            "visible": sum(cameras[str(camid)] for camid in VISIBLE_CAMERAS),
            "infrared": sum(cameras[str(camid)] for camid in INFRARED_CAMERAS),
            "cameras": cameras,
            "identities": len(pids),
        }


def test_same_seed_same_bytes_other_seed_other_images(world, tmp_path):
    again = files(tmp_path / "again") if synthesize(tmp_path / "again", **SMALL) else {}
    assert {name: path.read_bytes() for name, path in again.items()} == {
        name: path.read_bytes() for name, path in files(world).items()
    }
    other = synthesize(tmp_path / "other", **{**SMALL, "seed": 6})
    common = [name for name in files(tmp_path / "other") if name in again and name.endswith(".jpg")]
    assert other and common
    assert all(again[name].read_bytes() != files(tmp_path / "other")[name].read_bytes() for name in common)


def test_an_image_does_not_depend_on_how_many_people_or_images_there_are(world, tmp_path):
    synthesize(tmp_path / "few", **{**SMALL, "identities": 2, "test_identities": 1, "images": 1})
    few = {name: path for name, path in files(tmp_path / "few").items() if name.endswith(".jpg")}
    assert len(few) > 9
    for name, path in few.items():
        assert path.read_bytes() == (world / name).read_bytes()


def test_default_number_of_held_out_people_and_other_sizes(tmp_path):
    synthesize(tmp_path / "w", identities=2, images=1, size=(48, 40), progress=False)
    assert len(ids(tmp_path / "w", "test")) == 2
    with Image.open(next((tmp_path / "w").rglob("*.jpg"))) as image:
        assert image.size == (40, 48)


def tones_of_many(channels, people=600):
    tones = [synthetic.appearance(0, pid, channels)[1] for pid in range(people)]
    return {name: np.stack([tone[name] for tone in tones]) for name in tones[0]}


def test_tones_lie_in_range_and_garments_have_contrast_of_either_sign():
    for channels, weights in ((1, np.ones(1)), (3, LUMA)):
        tones = tones_of_many(channels)
        for tone in tones.values():
            assert tone.shape == (600, channels)
            assert tone.min() >= -1e-6 and tone.max() <= 1 + 1e-6
        for name in ("upper", "lower"):
            contrast = (tones[name] - tones[name + "2"]) @ weights
            assert np.abs(contrast).min() >= 0.5 - 1e-5
            assert 0.4 < (contrast > 0).mean() < 0.6


def test_colours_tell_nothing_about_infrared_reflectances():
    """Neither the tones nor their distance from middle gray correlate, beyond five standard errors."""
    visible, infrared = (tones_of_many(channels) for channels in (3, 1))
    for a in visible.values():
        for b in infrared.values():
            for change in (np.asarray, lambda tone: np.abs(tone - 0.5)):
                correlation = np.corrcoef(change(np.hstack([a, b])).T)
                assert np.abs(correlation[:3, 3]).max() < 5 / np.sqrt(len(a))


def test_both_modalities_draw_the_same_shape():
    assert synthetic.appearance(0, 7, 1)[0] == synthetic.appearance(0, 7, 3)[0]
    assert synthetic.appearance(0, 7, 1)[0] != synthetic.appearance(0, 8, 1)[0]
    drawn = [asdict(synthetic.appearance(0, pid, 1)[0]) for pid in range(200)]
    assert {person["hair"] for person in drawn} == set(HAIR)
    assert len({person["height"] for person in drawn}) == 200


def test_a_person_fills_the_middle_and_mirrors_with_the_view():
    """On gray, the trunk covers the middle, the rim stays bare, and a handbag changes sides from behind."""
    person = next(
        p for p in (Person.draw(np.random.default_rng(i)) for i in range(500)) if p.bag == "handbag"
    )
    white = dict.fromkeys(draw_tones(np.random.default_rng(0), 1), np.zeros(1)) | {"bag": np.ones(1)}
    y, x = np.mgrid[:128, :64].astype(np.float32)
    pixels = np.full((2, 128, 64, 1), 0.5, np.float32)
    yaw = np.array([0.0, np.pi])[:, None, None]
    canvas = Canvas(pixels, (x[None] - 31.5) / 110 + 0 * yaw, (y[None] - 10) / 110 + 0 * yaw, 1 / 110)
    draw_person(canvas, person, white, yaw, 0 * yaw)
    middle_of_bag = (np.clip(canvas.pixels[..., 0] - 0.5, 0, 1) * canvas.x).sum((1, 2))
    assert middle_of_bag[0] * person.bag_side > 0 > middle_of_bag[1] * person.bag_side
    assert np.all(np.abs(canvas.pixels[:, 40:60, 28:36] - 0.5) > 0.05)
    assert np.all(canvas.pixels[:, :, [0, -1]] == 0.5)


def test_cameras_differ_and_images_of_one_person_differ():
    cameras = [Camera.draw(0, camid) for camid in VISIBLE_CAMERAS]
    shots = [np.stack(render(0, 1, camera, 3, (64, 32))) for camera in cameras]
    for i, one in enumerate(shots):
        assert len({image.tobytes() for image in one}) == 3
        for other in shots[:i]:
            assert np.abs(one.mean((0, 1, 2)) - other.mean((0, 1, 2))).max() > 2


def test_without_a_gap_the_pixels_are_those_of_the_first_release():
    digest = hashlib.sha256()
    for pid in (1, 2, 3):
        for camid in CAMERAS:
            for image in render(5, pid, Camera.draw(5, camid), 2, (64, 32)):
                digest.update(image.tobytes())
    assert digest.hexdigest() == "77351eaf1b83268d7f49566c8cb01e7349b1380730c08cee8397212df3dbb4e0"


def test_a_gap_of_zero_is_the_world_without_one_and_another_is_recorded(world, tmp_path):
    assert synthesize(world, **SMALL, gap=0) == str(world)
    synthesize(tmp_path / "w", **SMALL, gap=0.5)
    about = json.loads((tmp_path / "w" / "synthetic.json").read_text())
    assert about["parameters"]["gap"] == 0.5
    assert about["parameters"]["gap_table"] == {**synthetic.GAP, "types": synthetic.TYPES}
    assert synthesize(tmp_path / "w", **SMALL, gap=0.5) == str(tmp_path / "w")
    with pytest.raises(ValueError, match="'gap': 0.5"):
        synthesize(tmp_path / "w", **SMALL)
    with pytest.raises(ValueError, match="'gap': 0.5"):
        synthesize(world, **SMALL, gap=0.5)
    same = [
        name
        for name, path in files(tmp_path / "w").items()
        if path.read_bytes() == files(world)[name].read_bytes()
    ]
    assert sorted(same) == ["exp/test_id.txt", "exp/train_id.txt", "exp/val_id.txt"]


def test_a_world_with_a_gap_of_other_constants_is_another_world(world, tmp_path, monkeypatch):
    few = {**SMALL, "identities": 2, "test_identities": 1, "images": 1, "gap": 1.0}
    synthesize(tmp_path / "w", **few)
    for name, value in (("GAP", {**synthetic.GAP, "law": 0.5}), ("TYPES", 12)):
        with monkeypatch.context() as changed:
            changed.setattr(synthetic, name, value)
            with pytest.raises(ValueError, match="root: .* holds a world of"):
                synthesize(tmp_path / "w", **few)
            assert synthesize(world, **SMALL) == str(world)  # a world without a gap depends on neither
    assert synthesize(tmp_path / "w", **few) == str(tmp_path / "w")


def shown(people=300, gap=1.0):
    """People as visible and as infrared cameras show them: the shapes and the tones of both, four lists."""
    visible, infrared = (
        [synthetic.appearance(0, pid, channels, gap) for pid in range(people)] for channels in (3, 1)
    )
    return *zip(*visible, strict=True), *zip(*infrared, strict=True)


def test_over_a_gap_cloth_alone_is_another_one_in_infrared_and_only_now_and_then():
    visible, _, infrared, tones = shown()
    changed = np.array(
        [
            [getattr(a, name) != getattr(b, name) for name in CLOTH]
            for a, b in zip(visible, infrared, strict=True)
        ]
    )
    assert changed.any(0).min() > 0 and 0 < changed.mean() < synthetic.GAP["redrawn"] + 0.03
    cloth = [{name: getattr(a, name) for name in CLOTH} for a in visible]
    assert [replace(b, **own) for b, own in zip(infrared, cloth, strict=True)] == list(visible)
    assert len({tone["weave"].tobytes() for tone in tones}) == len(tones)


def test_people_share_more_traits_the_wider_the_gap():
    def distinct(gap):
        return len({person.height for person in shown(gap=gap)[0]})

    assert distinct(0.0) == 300 > distinct(0.5) > distinct(1.0) > synthetic.TYPES


def test_over_a_gap_the_hue_tells_part_of_the_reflectance():
    _, colours, _, tones = shown()
    for name in ("hair", "upper", "lower2", "bag"):
        law = [reflectance(colour[name]) for colour in colours]
        assert min(law) >= 0.1 and max(law) <= 0.9
        assert 0.2 < np.corrcoef(law, [float(tone[name][0]) for tone in tones])[0, 1] < 0.999
    tinted, bright = np.array([0.6, 0.3, 0.3]), np.array([0.9, 0.6, 0.6])
    assert reflectance(tinted) == pytest.approx(reflectance(bright))
    assert reflectance(-tinted) < 0.5 < reflectance(tinted)


def test_over_a_gap_light_and_colours_depend_on_the_camera():
    for camid in CAMERAS:
        plain, apart = Camera.draw(0, camid), Camera.draw(0, camid, 1.0)
        assert not plain.slope.any() and apart.slope.any()
        assert 0 < np.abs(apart.gain / plain.gain - 1).max() <= synthetic.GAP["cast"] + 1e-6
    for image in render(0, 1, Camera.draw(0, 3, 1.0), 2, (64, 32)):
        assert image.dtype == np.uint8 and image.shape == (64, 32) and image.std() > 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"gap": -0.1},
        {"gap": 1.1},
        {"gap": float("nan")},
        {"gap": True},
        {"gap": "wide"},
        {"identities": 1},
        {"identities": 0},
        {"identities": "many", "test_identities": None},
        {"identities": 2.5},
        {"identities": True},
        {"test_identities": 0},
        {"images": 0},
        {"seed": -1},
        {"size": (31, 32)},
        {"size": (64, 15)},
        {"size": 64},
        {"size": (64, 32, 3)},
        {"identities": 9999},
    ],
)
def test_parameters_out_of_range_are_named_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        synthesize(tmp_path / "w", **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_second_call_changes_nothing(world, monkeypatch):
    before = {name: path.stat().st_mtime_ns for name, path in files(world).items()}
    monkeypatch.setattr(synthetic, "_write_world", None)
    assert synthesize(world, **SMALL) == str(world)
    assert {name: path.stat().st_mtime_ns for name, path in files(world).items()} == before


def test_a_world_of_other_parameters_is_not_overwritten(world):
    before = set(files(world))
    with pytest.raises(ValueError, match="'images': 2.*'images': 3"):
        synthesize(world, **{**SMALL, "images": 3})
    assert set(files(world)) == before


@pytest.mark.parametrize("content", ["mine.txt", "synthetic.json"])
def test_a_foreign_folder_is_left_alone(content, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / content).write_text("{}")
    with pytest.raises(ValueError, match="not a synthetic world"):
        synthesize(tmp_path / "w", **SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["w", content]


@pytest.mark.parametrize("content", ["[" * 100_000, '{"version": ' + "9" * 5000 + "}", "NaN", "\udcff"])
def test_a_description_with_rubbish_is_no_world(content, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "synthetic.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="not a synthetic world"):
        synthesize(tmp_path / "w", **SMALL)


def test_a_draft_is_nobody_elses(tmp_path, monkeypatch):
    """Two containers with equal process numbers: neither removes what the other renders."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    drafts, write = [], synthetic._write_world

    def watched(partial, *rest):
        drafts.append(partial)
        if len(drafts) == 1:
            partial.mkdir(exist_ok=True)
            synthesize(tmp_path / "w", **{**SMALL, "progress": False})
            assert partial.is_dir()
            raise KeyboardInterrupt
        write(partial, *rest)

    monkeypatch.setattr(synthetic, "_write_world", watched)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "w", **{**SMALL, "progress": False})
    assert len(set(drafts)) == 2 and [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "w").write_text("hello")
    with pytest.raises(ValueError, match="root"):
        synthesize(tmp_path / "w", **SMALL)
    assert (tmp_path / "w").read_text() == "hello"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "a" / "b"):
        synthesize(root, **{**SMALL, "identities": 2, "test_identities": 1, "images": 1})
        assert (root / "synthetic.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interruption_leaves_no_world(error, tmp_path, monkeypatch):
    whole = synthetic._write_job
    calls = []

    def failing(*job):
        calls.append(job)
        if len(calls) == 20:
            raise error
        whole(*job)

    monkeypatch.setattr(synthetic, "_write_job", failing)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        synthesize(tmp_path / "w", **SMALL)
    assert len(calls) >= 20
    assert not list(tmp_path.iterdir())


def test_of_two_that_render_one_world_both_have_it(tmp_path, monkeypatch):
    write = synthetic._write_world

    def slower(root, parameters, progress):
        monkeypatch.setattr(synthetic, "_write_world", write)
        synthesize(tmp_path / "world", **SMALL)
        write(root, parameters, progress)

    monkeypatch.setattr(synthetic, "_write_world", slower)
    root = synthesize(tmp_path / "world", **SMALL)
    assert json.loads((tmp_path / "world" / "synthetic.json").read_text())["counts"]
    assert root == str(tmp_path / "world")
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
