"""Readers on every layout, regular and not; pixels; packs; checks."""

import errno
import io
import json
import os
import re
import struct
import sys
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import layouts
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny

import ecul.data.decode
from ecul import load_pixels, train
from ecul.data import Dataset, Images, open_dataset
from ecul.data.layouts import LAYOUTS
from ecul.run.saved import dataset_fingerprint
from ecul.trainset import load_images

SIZE = (16, 8)


# SYSU-MM01


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(1, 12)), max_size=12), st.data())
def test_sysu_reads_exactly_what_lies_there(tmp_path_factory, extra, data):
    root = tmp_path_factory.mktemp("irregular")
    wanted = {f"cam{c}/{pid:04d}/0001.jpg" for pid in (1, 2, 6) for c in (1, 3)}
    wanted |= {f"cam{camid}/{pid:04d}/{number:04d}.JPG" for pid, camid, number in extra}
    for camid in layouts.SYSU_CAMERAS:
        (root / f"cam{camid}").mkdir()
    for name in data.draw(st.permutations(sorted(wanted))):
        layouts.text(root / name, "")
    for split, pids in (("train", "1"), ("val", "2"), ("test", "6")):
        layouts.text(root / "exp" / f"{split}_id.txt", pids)
    dataset = open_dataset("sysu", root)
    for pile, pids, cameras in (
        (dataset.visible, (1, 2), (1, 2, 4, 5)),
        (dataset.infrared, (1, 2), (3, 6)),
        (dataset.test_visible, (6,), (1, 2, 4, 5)),
        (dataset.test_infrared, (6,), (3, 6)),
    ):
        inside = [name for name in wanted if int(name[3]) in cameras and int(name[5:9]) in pids]
        assert pile.names == sorted(inside, key=lambda name: (name[5:9], name[3], name))
        assert pile.pids.tolist() == [int(name[5:9]) for name in pile.names]
        assert pile.camids.tolist() == [int(name[3]) for name in pile.names]
    strangers = {name.rsplit("/", 1)[0] for name in wanted if int(name[5:9]) not in (1, 2, 6)}
    assert set(dataset.extra) == strangers


def test_sysu_takes_irregular_folders(tmp_path):
    root = layouts.sysu(tmp_path / "größe und leer", images=2)
    os.rename(root / "cam1/0003/0001.jpg", root / "cam1/0003/b image.JPEG")
    for name in ("cam1/0003/Thumbs.db", "cam1/0003/.hidden.jpg", "cam4/0099/0001.jpg"):
        layouts.text(root / name, "x")
    os.rename(root / "cam5", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", root / "cam5")
    os.symlink(root / "cam2/0003/0001.jpg", root / "cam2/0003/0003.jpg")
    dataset = open_dataset("sysu", root)
    own = [name for name in dataset.visible.names if name[5:9] == "0003"]
    assert own[:2] == ["cam1/0003/0002.jpg", "cam1/0003/b image.JPEG"] and "cam5/0003/0001.jpg" in own
    assert dataset.extra == ("cam1/0003/Thumbs.db", "cam4/0099")
    loaded = dataset.visible.load(SIZE)
    link, target = (dataset.visible.names.index(f"cam2/0003/000{n}.jpg") for n in (3, 1))
    assert torch.equal(loaded[link], loaded[target])
    assert dataset.check(decode=True).unreadable == []


@pytest.mark.parametrize(
    ("make", "away", "layout"),
    [
        (layouts.sysu, "cam6", "cam1 ... cam6"),
        (layouts.sysu, "exp", "cam1 ... cam6"),
        (layouts.sysu, "exp/val_id.txt", "cam1 ... cam6"),
        (layouts.regdb, "idx/train_visible_1.txt", "Visible"),
        (layouts.llcm, "test_nir/cam4", "idx/train_vis.txt"),
        (layouts.market, "rgb_modify/bounding_box_train", "rgb_modify"),
    ],
)
def test_what_is_missing_is_told_with_the_layout(tmp_path, make, away, layout):
    root = make(tmp_path / "root")
    os.rename(root / away, tmp_path / "away")
    if (tmp_path / "away").is_dir():  # a file in its place is no folder
        layouts.text(root / away, "")
    with pytest.raises(ValueError, match=f"(?s)missing (file|folder) .*{away} ?.*should hold {layout}"):
        open_dataset(make.__name__, root)


LONG, DIGITS = "9" * 20, "at most 18 digits, not '9"
SYSU_LIST, REGDB_LIST = (layouts.sysu, "exp/train_id.txt"), (layouts.regdb, "idx/test_thermal_1.txt")
BAD_LISTS = [
    (*SYSU_LIST, "1,2\n3,5\n", r"entry 2 .*not '2\\\\n3'"),
    (*SYSU_LIST, "", "entry 1 .*not ''"),
    (*SYSU_LIST, f"4,{LONG}", f"entry 2 .*{DIGITS}"),
    (*SYSU_LIST, "1,77", "listed without an image: 0077"),
    (*REGDB_LIST, f"a.bmp {LONG}", f"line 1: the label .*{DIGITS}"),
    (*REGDB_LIST, "a.bmp 0\n\nb.bmp x", "line 3: the label .* not 'x'"),
    (*REGDB_LIST, "no-label.bmp", "line 1: expected 'path label' .*not 'no-label.bmp'"),
    (layouts.llcm, "idx/train_vis.txt", f"a_c{LONG}_s1.jpg 0", f"line 1: the camera .*{DIGITS}"),
]
OUTSIDE = ("../outside.bmp", "{}/outside.bmp", "Visible/link.bmp", "away/outside.bmp", "a\0b")
BAD_LISTS += [
    (*REGDB_LIST, f"a.bmp 0\n{name} 3", "line 2: expected .* with a path inside .*root") for name in OUTSIDE
]


@pytest.mark.parametrize(("make", "file", "content", "problem"), BAD_LISTS)
def test_a_list_with_rubbish_is_named_with_the_place(tmp_path, make, file, content, problem):
    """A list also names images of its own folder alone."""
    root = make(tmp_path / "root")
    layouts.picture(tmp_path / "outside.bmp")
    layouts.picture(root / "Visible" / "near.bmp")
    (root / "Visible" / "link.bmp").symlink_to(tmp_path / "outside.bmp")
    (root / "Visible" / "own.bmp").symlink_to(root / "Visible" / "near.bmp")
    (root / "away").symlink_to(tmp_path)
    layouts.text(root / file, content.replace("{}", str(tmp_path)))
    with pytest.raises(ValueError, match=f"(?s)({Path(file).name}|1 train ident).*{problem}"):
        open_dataset(make.__name__, root, subset=True)
    if make is layouts.regdb:
        layouts.text(root / file, "Visible/own.bmp 3")
        assert len(open_dataset("regdb", root, subset=True).check().missing) == 0


# RegDB, LLCM, Market-1501 style


def test_regdb_trials_differ(tmp_path):
    root = layouts.regdb(tmp_path)
    first, second = (open_dataset("regdb", root, trial=trial) for trial in (1, 2))
    assert first.trial == 1 and first.protocol == "regdb"
    assert len(first.visible) == len(first.test_infrared) == 6
    assert first.visible.names != second.visible.names
    lines = (root / "idx/train_thermal_2.txt").read_text().splitlines()
    assert second.infrared.names == [line.split(" ")[0] for line in lines]
    assert second.infrared.pids.tolist() == [int(line.split(" ")[1]) for line in lines]
    for dataset in (first, second):
        for pile in dataset.splits().values():
            direct = Images.from_paths([root / name for name in pile.names], pile.modality)
            assert torch.equal(pile.load(SIZE), direct.load(SIZE))
    infrared, visible = packs_in(root / ".ecul-pack")  # of both trials
    assert infrared.startswith("regdb-infrared-16x8-") and visible.startswith("regdb-visible-16x8-")


def test_lists_may_come_from_another_system(tmp_path):
    root = layouts.regdb(tmp_path, trials=(1,))
    names = open_dataset("regdb", root).visible.names
    path = root / "idx/train_visible_1.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert open_dataset("regdb", root).visible.names == names
    layouts.picture(root / "Visible/größe/a b.bmp")
    path.write_text(path.read_text(encoding="utf-8-sig") + "Visible/größe/a b.bmp 3\n", encoding="utf-8")
    dataset = open_dataset("regdb", root, subset=True)
    assert dataset.visible.names[-1] == "Visible/größe/a b.bmp" and len(dataset.visible.load(SIZE)) == 7
    assert dataset.check().ok


def test_llcm_reads_lists_and_identity_folders(tmp_path):
    root = layouts.llcm(tmp_path, skip=[("nir", 4, 2)])
    dataset = open_dataset("llcm", root)
    assert dataset.visible.pids.tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert dataset.infrared.camids.tolist() == [1, 1, 2, 2] * 3
    assert sorted(set(dataset.test_visible.camids)) == list(layouts.LLCM_VISIBLE)
    assert sorted(set(dataset.test_infrared.camids)) == list(layouts.LLCM_INFRARED)
    assert set(dataset.test_infrared.pids) == {4, 5}
    assert len(dataset.test_infrared) == 2 * (8 + 7) and len(dataset.test_visible) == 2 * 2 * 9
    assert len(dataset.test_infrared.load(SIZE)) == 30


def test_market_reads_identity_and_camera_from_file_names(tmp_path):
    root = layouts.market(tmp_path, test=(3, 10))
    layouts.picture(root / "rgb_modify/bounding_box_train/odd.jpg")
    layouts.picture(root / "rgb_modify/bounding_box_train/20231105123456_c1_1.jpg")  # a date for an identity
    dataset = open_dataset("market", root, protocol="sysu")
    assert dataset.visible.names[0] == "rgb_modify/bounding_box_train/0001_c1_0001.jpg"
    assert dataset.visible.pids.tolist() == [*np.repeat([1, 2], 8), 20231105123456]
    assert dataset.infrared.camids.tolist() == [3, 3, 6, 6] * 2
    cell = [name for name in dataset.test_visible.names if "0003_c1" in name]
    assert [name.split("/")[1] for name in cell] == ["query"] * 2 + ["bounding_box_test"] * 2
    assert dataset.extra == ("rgb_modify/bounding_box_train/odd.jpg",)
    assert open_dataset("market", root).protocol is None
    with pytest.raises(ValueError, match="missing folder rgb_modify/2/bounding_box_train"):
        open_dataset("market", root, trial=2)
    trial = open_dataset("market", layouts.market(tmp_path / "regdb", trial=2), trial=2)
    assert trial.visible.names[0] == "rgb_modify/2/bounding_box_train/0001_c1_0001.jpg"
    layouts.picture(root / f"rgb_modify/bounding_box_train/{LONG}_c1_1.jpg")
    with pytest.raises(ValueError, match="name 'rgb_modify/.*/9+_c1_1.jpg' .*at most 18 digits, not '9"):
        open_dataset("market", root)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SYSU", {}, "expected one of sysu, regdb, llcm, market, folders, not 'SYSU'"),
        ("sysu", {"trial": 1}, "trial: no option of 'sysu'; its options are subset, validation, pack"),
        ("regdb", {"trail": 1}, "trail: no option of 'regdb'.*did you mean 'trial'"),
        ("sysu", {"subset": "maybe"}, "subset must be True or False, got 'maybe'"),
        ("regdb", {"trial": 11}, "trials 1 to 10, not 11"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(name, tmp_path, **options)


# One's own images


def test_from_folders_with_and_without_cameras(tmp_path):
    day, night = layouts.folders(tmp_path)
    dataset = Dataset.from_folders(visible=day, infrared=night)
    assert dataset.visible.names == [f"{c}/{n}.png" for c in ("gate", "hall") for n in range(3)]
    assert dataset.visible.pids is None and dataset.visible.camids.tolist() == [0] * 6
    cameras = Dataset.from_folders(visible=day, infrared=night, cameras=True)
    assert cameras.infrared.camids.tolist() == [1, 1, 1, 2, 2, 2]
    direct = Images.from_paths([night / name for name in cameras.infrared.names], "infrared")
    assert torch.equal(cameras.infrared.load(SIZE), direct.load(SIZE))
    assert cameras.check().ok and (night / ".ecul-pack").is_dir()
    assert Dataset.from_folders(visible=day, infrared=night).visible.names == dataset.visible.names
    layouts.picture(day / "loose.png")
    with pytest.raises(ValueError, match="'loose.png' belongs to no camera"):
        Dataset.from_folders(visible=day, infrared=night, cameras=True)
    (tmp_path / "empty").mkdir()
    for folder, problem in (("empty", "no image that Pillow reads"), ("none", "does not exist")):
        with pytest.raises(ValueError, match=problem):
            Dataset.from_folders(visible=tmp_path / folder, infrared=night)


def test_folders_open_by_name_and_open_again_by_their_options(tmp_path):
    day, night = layouts.folders(tmp_path)
    given = Dataset.from_folders(visible=day, infrared=night, cameras=True)
    assert {"visible": "day", "infrared": "night", "cameras": True}.items() <= given.options.items()
    (tmp_path / "visible").symlink_to(day)
    (tmp_path / "infrared").symlink_to(night)
    default = open_dataset("folders", tmp_path, visible=None, infrared=None, cameras=None)
    assert default.visible.names == given.visible.names and default.options["cameras"] is False
    (tmp_path / "visible").unlink()
    again = open_dataset("folders", given.root, **given.options)
    assert again.visible.names == given.visible.names and again.options == given.options
    np.testing.assert_array_equal(again.infrared.camids, given.infrared.camids)
    away = Dataset.from_folders(visible=day / "gate", infrared=night)
    assert away.options["infrared"] == str(night) and open_dataset("folders", away.root, **away.options)
    with pytest.raises(ValueError, match=r"(?s)missing folder visible in .*should hold visible/ and infr"):
        open_dataset("folders", tmp_path)
    for pack, kept in ((True, True), (False, False), (tmp_path / "packs", str(tmp_path / "packs"))):
        assert Dataset.from_folders(day, night, pack=pack).options["pack"] == kept
    for inside in (day, day / "gate", tmp_path):
        with pytest.raises(ValueError, match="expected two folders apart"):
            Dataset.from_folders(visible=day, infrared=inside)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names, and have no pipes")
def test_names_need_not_be_utf8_and_what_is_no_regular_file_is_no_image(tmp_path):
    day, night = layouts.folders(tmp_path)
    os.rename(day / "gate" / "0.png", os.fsencode(day / "gate") + b"/caf\xe9.png")
    os.mkfifo(day / "gate" / "pipe.jpg")
    dataset = Dataset.from_folders(visible=day, infrared=night)
    assert len(dataset.visible.load(SIZE, progress=False)) == 6
    assert dataset_fingerprint(dataset)["names_and_cameras"]
    assert dataset.extra == (str(day / "gate/pipe.jpg"),)
    assert dataset.check(decode=True, progress=False).ok
    with pytest.raises(ValueError, match="unreadable image .*pipe.jpg': it is no regular file"):
        load_pixels(day / "gate" / "pipe.jpg", SIZE)


def test_every_unreadable_photograph_is_named_and_left_out_on_request(tmp_path, caplog):
    day, night = layouts.folders(tmp_path)
    for name in ("gate/broken.png", "hall/phone.heic", "hall/notes.txt"):
        layouts.text(day / name, "not an image")
    for pack in (True, False):
        with pytest.raises(ValueError, match=r"2 of 8 images(.|\n)*broken.png(.|\n)*phone.heic.*pillow-heif"):
            Dataset.from_folders(visible=day, infrared=night, pack=pack).visible.load(SIZE, progress=False)
    dataset = Dataset.from_folders(visible=day, infrared=night, skip_unreadable=True)
    assert len(dataset.visible) == len(dataset.visible.load(SIZE, progress=False)) == 6
    assert "2 of 8 images cannot be read and are left out" in caplog.text and "phone.heic" in caplog.text
    assert dataset.extra == (str(day / "hall/notes.txt"),) and "notes.txt" in dataset.check().warnings[0]
    for file in (*day.rglob("*.png"), *night.rglob("*.png")):
        file.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="8 of 8 images cannot be read"):
        Dataset.from_folders(visible=day, infrared=night, skip_unreadable=True)


def test_a_heif_reader_is_used_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", module := Mock())
    ecul.data.decode.pillow.__wrapped__()
    module.register_heif_opener.assert_called_once_with()


def test_from_arrays_takes_every_form():
    colour, gray = layouts.noise("a", size=(5, 12, 6)).reshape(5, 12, 6, 3), layouts.noise("b")[None, ..., 0]
    dataset = Dataset.from_arrays(visible=colour, infrared=gray, visible_cameras=[1, 1, 2, 2, 3])
    assert dataset.visible.camids.tolist() == [1, 1, 2, 2, 3] and dataset.infrared.camids.tolist() == [0]
    assert torch.equal(dataset.visible.load((12, 6)), torch.from_numpy(colour).permute(0, 3, 1, 2))
    assert torch.equal(dataset.infrared.load((12, 6))[0], torch.from_numpy(gray[0]).expand(3, 12, 6))
    channels_first = torch.from_numpy(colour).permute(0, 3, 1, 2)
    again = Dataset.from_arrays(visible=channels_first, infrared=gray)
    assert torch.equal(again.visible.load((12, 6)), channels_first)
    resized = np.asarray(Image.fromarray(colour[2]).resize((8, 16), Image.Resampling.LANCZOS))
    assert torch.equal(again.visible.load(SIZE)[2], torch.from_numpy(resized.copy()).permute(2, 0, 1))
    for protocol in (None, "sysu"):  # nobody published counts for them
        assert Dataset.from_arrays(colour, gray, protocol=protocol).check().ok


def test_arrays_that_do_not_fit_are_refused():
    gray = np.zeros((2, 4, 4), np.uint8)
    huge = np.full(2, 2**64 - 1, np.uint64)
    wrong = [np.zeros(shape, np.uint8) for shape in ((2, 12, 6, 4), (2, 12, 6, 1), (2, 12), (2, 4, 12, 6))]
    for pixels in (*wrong, gray.astype(np.float32)):
        told = f"visible: expected uint8 images.* {pixels.dtype} {' x '.join(map(str, pixels.shape))}"
        with pytest.raises(ValueError, match=told):
            Dataset.from_arrays(pixels, gray)
    for kind, message, options in (
        (ValueError, "camids: 3 for 2", {"visible_cameras": [1, 2, 3]}),
        (TypeError, "camids: .* row of int", {"visible_cameras": [1.0, 2.0]}),
        (ValueError, "camids must be .* int64, got 18446744073", {"visible_cameras": huge}),
        (ValueError, "protocol: expected 'sysu'", {"protocol": "market"}),
    ):
        with pytest.raises(kind, match=message):
            Dataset.from_arrays(gray, gray, **options)
    assert Dataset.from_arrays(gray, gray[:0]).check().errors == ["infrared: no images"]


def test_a_subset_keeps_its_pixels_and_order(tmp_path):
    packed = open_dataset("sysu", layouts.sysu(tmp_path)).visible
    whole, paths = packed.load(SIZE), packed.source.paths()
    pile = Images.from_paths(paths, "visible", packed.camids, packed.pids)
    assert pile.names == [str(path) for path in paths] and torch.equal(pile.load(SIZE), whole)
    for index in ([5, 0, 5], slice(3, 9), pile.camids == 4, np.array([], np.int64)):
        part = pile.subset(index)
        rows = np.arange(len(pile))[index]
        assert part.names == [pile.names[row] for row in rows]
        assert torch.equal(part.load(SIZE), whole[torch.from_numpy(rows)])
        assert part.camids.tolist() == pile.camids[rows].tolist() == packed.subset(index).camids.tolist()
        assert part.pids.tolist() == pile.pids[rows].tolist() == packed.subset(index).pids.tolist()
    assert len(pile.subset([])) == 0
    twice = pile.subset(slice(2, 10)).subset([1])
    assert twice.names == [pile.names[3]] and torch.equal(twice.load(SIZE), whole[3:4])


# Pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_three_channels_by_pillows_lanczos(tmp_path, mode):
    path = layouts.picture(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), size=(31, 17), mode=mode)
    expected = Image.open(path).convert("RGB")
    np.testing.assert_array_equal(load_pixels(path, (31, 17)), np.asarray(expected))
    expected = expected.resize((8, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(load_pixels(path, SIZE), np.asarray(expected))


def test_every_format_is_listed_and_read(tmp_path):
    day, night = layouts.folders(tmp_path, cameras=False)
    names = [f"a{ending}" for ending in (".BMP", ".GIF", ".JPG", ".PNG", ".PPM", ".TIF", ".WEBP")]
    for name in names:
        layouts.picture(day / name)
    dataset = Dataset.from_folders(visible=day, infrared=night, pack=False)
    assert dataset.visible.names[3:] == names and dataset.visible.load(SIZE).shape == (10, 3, *SIZE)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "u2"), ("a.tif", "u2"), ("a.pgm", "u2"), ("a.tif", "i4"), ("a.tif", "f4")]
)
def test_deep_pixels_are_scaled_by_their_range_without_its_ends(tmp_path, name, kind):
    """Of 512 pixels three are left out at each end, so that dead and hot ones change no other."""
    thermal = np.random.default_rng(0).integers(7000, 9000, (32, 16))
    thermal[3, 4], thermal[20, 7] = 0, 65535
    low, high = np.sort(thermal, axis=None)[[3, -4]]
    scaled = ((thermal - low) * (255 / (high - low))).round().clip(0, 255)
    constant = np.full_like(thermal, 200 * 257)
    one_hot = np.where(thermal == 0, 9000, 8000)
    for values, expected in ((thermal, scaled), (constant, 200), (one_hot, 255 * (thermal == 0))):
        Image.fromarray(values.astype(kind)).save(tmp_path / name)
        found = load_pixels(tmp_path / name, (32, 16)).transpose(2, 0, 1)
        np.testing.assert_array_equal(found, np.broadcast_to(expected, (3, 32, 16)))


def deep_colours():
    """(name, content) of files with 16 bits a channel, which Pillow cannot write."""
    for mode in ("LA", "RGB", "RGBA"):
        Image.new(mode, (6, 12)).save(saved := io.BytesIO(), "PNG")
        png = saved.getvalue()
        head = png[12:24] + b"\x10" + png[25:29]
        yield f"{mode}.png", png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]
    Image.new("RGB", (6, 12)).save(saved := io.BytesIO(), "TIFF")
    yield "a.tif", saved.getvalue().replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))
    for largest in (65535, 9999):
        yield f"{largest}.ppm", b"P6 6 12 %d\n" % largest + bytes(6 * 12 * 6)
        yield f"plain {largest}.ppm", b"P3 6 12 %d\n" % largest + b"9 " * 6 * 12 * 3


def test_images_that_cannot_be_taken_are_refused(tmp_path, monkeypatch):
    for name, content in deep_colours():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}': it has more than 8 bits a channel"):
            load_pixels(tmp_path / name, SIZE)
    for wild in (np.nan, np.inf, -np.inf):
        Image.fromarray(np.array([[0, wild], [1, 2]], np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match="unreadable image .*a.tif.*not finite"):
            load_pixels(tmp_path / "a.tif", SIZE)
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="bomb.png': it has 9000 x 9000 pixels, more than 67,108,864"):
        load_pixels(tmp_path / "bomb.png", SIZE)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_exif_orientation_is_honoured(tmp_path, name):
    image, exif = Image.fromarray(layouts.noise("upright", size=(6, 12))), Image.Exif()
    image.save(tmp_path / name)
    stored = np.asarray(Image.open(tmp_path / name))
    turned = [stored, stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.swapaxes(0, 1)]
    turned += [np.rot90(stored, -1), np.rot90(stored, 2).swapaxes(0, 1), np.rot90(stored)]
    for orientation, expected in enumerate(turned):
        exif[0x0112] = orientation
        image.save(tmp_path / name, exif=exif)
        np.testing.assert_array_equal(load_pixels(tmp_path / name, expected.shape[:2]), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_metadata_makes_no_image_unreadable(tmp_path):
    """EXIF of which the tags, types, counts and places are drawn by chance."""
    saved = io.BytesIO()
    Image.fromarray(layouts.noise("metadata")).save(saved, "JPEG")
    jpeg, rng = saved.getvalue(), np.random.default_rng(0)
    for _ in range(300):
        body = struct.pack("<IH", 8, count := int(rng.integers(5)))
        for _ in range(count):  # an orientation of 9 or more, or one that is no number, is none
            tag, size = rng.choice([0x10F, 0x112, 0x128, 0x8769, 0x8825, 0xA005]), rng.choice([1, 9, 2**31])
            body += struct.pack("<HHII", tag, rng.integers(14), size, rng.integers(9, 60))
        segment = b"Exif\0\0II*\0" + (body + rng.bytes(30))[: rng.integers(1, 80)]
        head = b"\xff\xe1" + struct.pack(">H", len(segment) + 2)
        (tmp_path / "a.jpg").write_bytes(jpeg[:2] + head + segment + jpeg[2:])
        np.testing.assert_array_equal(load_pixels(tmp_path / "a.jpg", (12, 6)), Image.open(saved))


@pytest.mark.parametrize("kept", [500, 0])
@pytest.mark.parametrize("pack", [True, False])
def test_an_image_that_cannot_be_read_is_named(tmp_path, kept, pack):
    root = layouts.sysu(tmp_path, size=(64, 32))
    path = root / "cam4/0002/0002.jpg"
    path.write_bytes(path.read_bytes()[:kept])
    dataset = open_dataset("sysu", root, pack=pack, subset=True)
    with pytest.raises(ValueError, match="unreadable image .*cam4/0002/0002.jpg"):
        dataset.visible.load(SIZE)
    assert not list(root.glob(".ecul-pack/*"))
    report = dataset.check(decode=True, progress=False)
    assert not report.ok and report.unreadable == [str(path)]
    assert any("cam4/0002/0002.jpg" in error for error in report.errors)
    assert dataset.check().ok == (kept > 0)


# Packs


@pytest.fixture
def packed(tmp_path):
    root = layouts.sysu(tmp_path / "world", images=2)
    return open_dataset("sysu", root).visible, root


def packs_in(folder):
    return sorted(path.name for path in Path(folder).glob("*"))


def test_a_pack_holds_what_direct_reading_gives(packed, monkeypatch):
    pile, root = packed
    direct = open_dataset("sysu", root, pack=False).visible.load(SIZE)
    assert not (root / ".ecul-pack").exists()
    assert torch.equal(pile.load(SIZE), direct)
    (name,) = packs_in(root / ".ecul-pack")
    assert re.fullmatch("sysu-visible-16x8-[0-9a-f]{16}.npy", name)
    assert torch.equal(torch.from_numpy(np.load(root / ".ecul-pack" / name)).permute(0, 3, 1, 2), direct)
    monkeypatch.setattr(ecul.data.decode, "load_pixels", lambda path, size: pytest.fail("decoded"))
    assert torch.equal(open_dataset("sysu", root).visible.load(SIZE), direct)
    with pytest.raises(pytest.fail.Exception, match="decoded"):
        pile.load((8, 4))
    pile.load(SIZE).zero_()  # changes no pack
    assert torch.equal(pile.load(SIZE), direct)


def test_a_pack_is_rebuilt_when_a_source_changed(packed):
    pile, root = packed
    before = pile.load(SIZE).clone()
    first = packs_in(root / ".ecul-pack")
    path = root / pile.names[3]
    Image.fromarray(np.zeros((12, 6, 3), np.uint8)).save(path)
    os.utime(path, ns=(1, 1))
    after = open_dataset("sysu", root).visible.load(SIZE)
    assert after[3].max() == 0 and torch.equal(after[:3], before[:3])
    second = packs_in(root / ".ecul-pack")
    assert len(second) == len(first) == 1 and second != first
    os.remove(path)
    assert len(open_dataset("sysu", root).visible.load(SIZE)) == len(before) - 1


def test_a_damaged_pack_is_written_again_and_one_that_another_process_removes_is_not_needed(
    packed, monkeypatch
):
    pile, root = packed
    before = pile.load(SIZE).clone()
    pack = next((root / ".ecul-pack").glob("*.npy"))
    content, another = pack.read_bytes(), io.BytesIO()
    np.save(another, np.zeros((len(pile), 3, *SIZE), np.uint8))
    fortran = content.replace(b"False", b"True ", 1)
    for harmed in (content[:-17], b"", content[128:], content[:50], another.getvalue(), fortran):
        pack.write_bytes(harmed)
        assert torch.equal(open_dataset("sysu", root).visible.load(SIZE), before)
        assert pack.read_bytes() == content
    pack.unlink()
    monkeypatch.setattr(os, "replace", lambda source, target: os.remove(source))
    assert torch.equal(open_dataset("sysu", root).visible.load(SIZE), before)


def test_interrupted_packing_leaves_no_half_file(packed, monkeypatch):
    pile, root = packed
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ecul.data.decode, "load_pixels", Mock(side_effect=KeyboardInterrupt))
        pile.load(SIZE)
    assert packs_in(root / ".ecul-pack") == []
    names = (f".{'0a' * 8}.tmp", "notes.tmp", "sysu-visible-8x4-00.npy", f".{'0b' * 8}.tmp")
    abandoned, *kept = (root / ".ecul-pack" / name for name in names)
    for file in (abandoned, *kept):
        file.write_bytes(b"another")
        os.utime(file, None if file == kept[-1] else (1, 1))  # it may have a writer
    assert len(pile.load(SIZE)) == len(pile) and all(file.exists() for file in kept)
    assert not abandoned.exists()


@pytest.mark.parametrize("harm", ["a file in its way", "a full disk"])
def test_images_are_read_directly_where_no_pack_can_be_written(packed, monkeypatch, harm):
    """Each split has the same warning, so that Python shows it once."""
    pile, root = packed
    direct = open_dataset("sysu", root, pack=False).visible.load(SIZE)
    with monkeypatch.context() as patch:
        if harm == "a full disk":
            full = OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(os, "fsync", Mock(side_effect=full))
        else:
            layouts.text(root / ".ecul-pack", "in the way")
        why = "No space left on device|File exists"
        told = f"cannot pack into '[^ ]*world/.ecul-pack': ({why}); reading images directly"
        with pytest.warns(UserWarning, match=told):
            assert torch.equal(pile.load(SIZE), direct)
    assert packs_in(root / ".ecul-pack") == []


def test_a_folder_holds_the_packs_of_several_roots_and_trials(tmp_path):
    for trial in (1, 2):
        layouts.market(tmp_path, trial=trial)
        sysu = layouts.sysu(tmp_path / f"root-{trial}", images=trial)
        for name, root, options in (("sysu", sysu, {}), ("market", tmp_path, {"trial": trial})):
            pixels, direct = (
                open_dataset(name, root, pack=pack, **options).visible.load(SIZE)
                for pack in (tmp_path / "packs", False)
            )
            assert torch.equal(pixels, direct)
    assert len(packs_in(tmp_path / "packs")) == 4


# Checks


def test_a_check_compares_with_the_published_counts(tmp_path, monkeypatch):
    sysu, llcm = LAYOUTS["sysu"].counts, LAYOUTS["llcm"].counts
    assert sysu["visible"]["images"] + sysu["infrared"]["images"] == 34_167
    assert sum(pile["images"] for pile in llcm.values()) == 46_767
    assert llcm["visible"]["identities"] + llcm["test_visible"]["identities"] == 1_064
    root = layouts.sysu(tmp_path)
    report = open_dataset("sysu", root).check()
    assert not report.ok and "NOT OK" in str(report) and report.expected == LAYOUTS["sysu"].counts
    assert "visible: 60 images, expected 22,258" in report.errors
    assert str(report).count("subset=True (--option subset=true)") == 1
    assert report.counts["test_infrared"] == {"identities": 3, "images": 18, "cameras": {"3": 9, "6": 9}}
    subset = open_dataset("sysu", root, subset=True).check()
    assert subset.ok and "counts of its own, as asked for" in subset.verdict
    counted = report.counts.items()
    published = {name: {kind: own[kind] for kind in ("identities", "images")} for name, own in counted}
    monkeypatch.setitem(LAYOUTS, "sysu", replace(LAYOUTS["sysu"], counts=published))
    assert open_dataset("sysu", root).check().verdict == "OK: 'sysu', 144 images, as published"
    layouts.picture(root / "cam1/0001/0009.jpg")
    told = "visible: 61 images, expected 60"
    for option, errors in ((False, [told]), (True, [])):
        more = open_dataset("sysu", root, subset=option).check()
        assert more.errors == errors and "61 images; by camera 1: " in str(more)
    layouts.text(root / "synthetic.json", "{}")  # a rendered world may have any number
    verdict = open_dataset("sysu", root).check().verdict
    assert verdict == "OK: 'sysu', 145 images, no published counts to compare with"


def test_a_check_names_extra_missing_and_empty_files(tmp_path):
    root = layouts.sysu(tmp_path)
    layouts.text(root / "cam1/0001/notes.txt", "x")
    os.remove(root / "cam3/0001/0001.jpg")
    (root / "cam3/0001/0001.jpg").symlink_to("nowhere")  # as git-annex leaves what was not fetched
    dataset = open_dataset("sysu", root, subset=True)
    layouts.text(root / "cam1/0002/0002.jpg", "")
    with pytest.raises(FileNotFoundError, match="cam3/0001/0001.jpg"):
        dataset.infrared.load(SIZE)
    report = dataset.check()
    assert report.extra == ["cam1/0001/notes.txt"] and "cam1/0001/notes.txt" in report.warnings[0]
    assert report.missing == [str(root / "cam3/0001/0001.jpg")]
    assert report.unreadable == [str(root / "cam1/0002/0002.jpg")]
    assert len(report.errors) == 2 and "infrared: 1 images are missing: " in report.errors[1]
    told = json.loads(json.dumps(report.to_dict()))
    assert told["ok"] is False and told["missing"] == report.missing and told["verdict"] == report.verdict


def test_a_check_finds_test_images_and_identities_in_training(tmp_path):
    root = layouts.sysu(tmp_path)
    layouts.text(root / "exp/test_id.txt", "6,7,5")
    report = open_dataset("sysu", root, subset=True).check()
    assert "visible and test visible: 12 images are in both: cam1/0005/0001.jpg" in report.errors[0]
    assert "infrared and test infrared: 6 images are in both" in report.errors[1]
    root = layouts.regdb(tmp_path / "regdb")
    lines = (root / "idx/test_visible_1.txt").read_text()
    (root / "idx/test_visible_1.txt").write_text(lines + lines.splitlines()[0] + "\n")
    report = open_dataset("regdb", root, subset=True).check()
    assert len(report.errors) == 1 and "1 images are listed twice" in report.errors[0]


def test_links_among_the_folders_count_no_image_twice(tmp_path):
    day, night = layouts.folders(tmp_path)
    plain = Dataset.from_folders(day, night).visible.names
    (day / "up").symlink_to(tmp_path)
    (day / "hall" / "up").symlink_to(day)  # a loop
    (day / "other").symlink_to(day / "hall")
    for here in range(12):  # a web: as many ways through it as orders of its folders
        (day / f"web{here}").mkdir()
        for there in range(12):
            (day / f"web{here}" / f"to{there}").symlink_to(day / f"web{there}")
    dataset = Dataset.from_folders(day, night)
    assert dataset.visible.names == plain
    assert {str(day / name) for name in ("up", "hall/up", "other", "web0/to0")} <= set(dataset.extra)


def test_links_into_the_other_modality_are_refused(tmp_path):
    day, night = layouts.folders(tmp_path)
    for link, target, told in (
        (day / "hall" / "n.png", night / "hall" / "1.png", "1 images are in both: hall/n.png"),
        (day / "night", night, "6 images are in both: night/gate/0.png"),
    ):
        link.symlink_to(target)
        dataset = Dataset.from_folders(day, night)
        assert dataset.check().errors[0].startswith(f"visible and infrared: {told}")
        with pytest.raises(ValueError, match="images are in both"):
            train(dataset, tiny())


def test_all_of_an_array_in_its_own_size_is_no_copy():
    pixels = np.arange(4 * 16 * 8 * 3, dtype=np.int64).reshape(4, 16, 8, 3).astype(np.uint8)
    images = Images.from_array(pixels, "visible")
    assert np.shares_memory(images.subset(slice(1, 3)).load(SIZE).numpy(), pixels[1:3])
    fixed = pixels.copy()
    fixed.flags.writeable = False  # as np.load(..., mmap_mode="r") gives them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.shares_memory(Images.from_array(fixed, "visible").load(SIZE).numpy(), fixed)
    turned = Images.from_array(pixels[..., ::-1], "visible").load(SIZE)  # BGR as RGB
    assert torch.equal(turned, images.load(SIZE).flip(1))


def test_what_is_trained_on_is_held_once(tmp_path):
    """From packs nothing is copied; from memory the tensors are the arrays that were given."""
    dataset, size = Dataset.from_folders(*layouts.folders(tmp_path)), (512, 256)
    pixels = {name: images.load(size, progress=False) for name, images in dataset.splits().items()}
    tracemalloc.start()  # of arrays; maps of files are none
    held = load_images(dataset, size, torch.device("cpu"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < sum(side.numel() for side in held.pixels) / 4
    assert torch.equal(held.pixels[0], pixels["visible"])
    arrays = [side.permute(0, 2, 3, 1).numpy() for side in held.pixels]
    again = load_images(Dataset.from_arrays(*arrays), size, torch.device("cpu"))
    assert [p.data_ptr() for p in again.pixels] == [a.ctypes.data for a in arrays]
