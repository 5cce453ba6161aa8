"""The published data sets as they are downloaded: one specification each, in `LAYOUTS`.

A reader walks a folder once and raises ValueError for a structure that it cannot read. `ecul.data.checks`
compares the counts with the published ones.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ecul import MODALITIES
from ecul.common.names import clipped, shorten
from ecul.data.folders import list_folder

SYSU_CAMERAS = {"visible": (1, 2, 4, 5), "infrared": (3, 6)}
SPLITS = ("visible", "infrared", "test_visible", "test_infrared")


class Entry(NamedTuple):
    """One image: its path relative to the root, identity (negative: a distractor) and camera (0: unknown)."""

    name: str
    pid: int
    camid: int


Splits = dict[str, list[Entry]]


class Folder:
    """The root of a data set while it is read; all paths are relative to it.

    listed: what lies in the folders that were looked at, except images of the splits. opened: the folders
    whose images were taken. An error of `fail` ends with the expected content of the root.
    """

    def __init__(self, root: Path, holds: str):
        self.root, self.holds = root, holds
        self.listed: set[str] = set()
        self.opened: set[str] = set()

    @property
    def extra(self) -> tuple[str, ...]:
        """The unexpected paths."""
        return tuple(sorted(self.listed - self.opened))

    def fail(self, problem: str) -> NoReturn:
        """A ValueError about the structure of this folder."""
        raise ValueError(f"{problem}\n  {str(self.root)!r} should hold {self.holds}")

    def require(self, *folders: str) -> None:
        """An error naming which of these folders are missing."""
        if missing := [folder for folder in folders if not (self.root / folder).is_dir()]:
            self.fail(f"missing folder{'s' * (len(missing) > 1)} {', '.join(missing)} in {str(self.root)!r}")

    def images(self, folder: str) -> list[str]:
        """The sorted images of one folder; whatever else lies there is unexpected."""
        images, others, inner = list_folder(self.root / folder, self.root)
        self.opened.add(folder)
        self.listed.update(others, inner)
        return images

    def text(self, file: str) -> str:
        """The text of an index file; paths in it need not be UTF-8."""
        path = self.root / file
        if not path.is_file():
            self.fail(f"missing file {str(path)!r}")
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")

    def ids(self, file: str) -> set[int]:
        """The identities of a file with one comma-separated line."""
        entries, path = self.text(file).split(","), repr(str(self.root / file))
        return {whole_number(text, f"{path}: entry {n} (an identity)") for n, text in enumerate(entries, 1)}

    def entries(self, file: str, camid: int = 0) -> list[Entry]:
        """The images of a file with lines `relative/path label`; the camera is given, or `_c03` in the name.

        A path that leaves the root, by `..` or by a link, is an error.
        """
        found, root = [], os.path.join(os.path.realpath(self.root), "")
        for number, line in enumerate(map(str.strip, self.text(file).splitlines()), 1):
            if not line:
                continue
            place = f"{str(self.root / file)!r}, line {number}"
            name, label = (part.strip() for part in ("", *line.rsplit(" ", 1))[-2:])
            if "\0" in name or not os.path.realpath(self.root / name).startswith(root):
                expected = f"expected 'path label' with a path inside {str(self.root)!r}"
                raise ValueError(f"{place}: {expected}, not {line[:200]!r}")
            match = None if camid else re.search(r"_c(\d+)(?![a-z0-9])[^/]*$", name)
            camera = whole_number(match[1], f"{place}: the camera") if match else camid
            found.append(Entry(name, whole_number(label, f"{place}: the label"), camera))
        return found

    def identities(self, prefix: str, cameras: dict[str, dict[str, int]], pids: set[int]) -> Splits:
        """The splits of these identities, each a folder in the folder of each camera, in the published order.

        cameras: {modality: {folder: camera}}. The order: identities as sorted 4-digit strings, then cameras
        as given, then file names. Other files and folders there are unexpected; an identity without an image
        is an error.
        """
        splits: Splits = {}
        for modality, folders in cameras.items():
            splits[prefix + modality] = []
            for folder in folders:
                self.listed.update(*list_folder(self.root / folder, self.root))
            for pid, folder in product(sorted(f"{pid:04d}" for pid in pids), folders):
                if (self.root / folder / pid).is_dir():
                    images = self.images(f"{folder}/{pid}")
                    splits[prefix + modality] += [Entry(name, int(pid), folders[folder]) for name in images]
        if empty := pids - {entry.pid for entries in splits.values() for entry in entries}:
            names, whose = shorten(f"{pid:04d}" for pid in sorted(empty)), "test" if prefix else "train"
            self.fail(f"{len(empty)} {whose} identities are listed without an image: {names}")
        return splits


def whole_number(value: str, where: str) -> int:
    """The number that a file states in at most 18 digits, so that int64 holds it.

    Errors: ValueError that begins with `where`: the file, and the place in it.
    """
    text = value.strip()
    if text.isascii() and text.isdecimal() and len(text.lstrip("0")) <= 18:
        return int(text)
    raise ValueError(f"{where} should be a whole number of at most 18 digits, not {clipped(text, 60)!r}")


def _read_sysu(folder: Folder) -> Splits:
    """Training is train + val."""
    cameras = {m: {f"cam{camid}": camid for camid in camids} for m, camids in SYSU_CAMERAS.items()}
    folder.require("exp", *sorted(name for folders in cameras.values() for name in folders))
    train, val, test = (folder.ids(f"exp/{split}_id.txt") for split in ("train", "val", "test"))
    return folder.identities("", cameras, train | val) | folder.identities("test_", cameras, test)


def _read_regdb(folder: Folder, trial: Any) -> Splits:
    """One of ten trials; visible images count as camera 1, infrared ones as camera 2."""
    if trial not in range(1, 11):
        raise ValueError(f"trial: RegDB has trials 1 to 10, not {trial!r}")
    folder.require("idx")
    return {
        prefix + modality: folder.entries(f"idx/{split}_{word}_{trial}.txt", camid)
        for split, prefix in (("train", ""), ("test", "test_"))
        for modality, word, camid in (("visible", "visible", 1), ("infrared", "thermal", 2))
    }


def _read_llcm(folder: Folder) -> Splits:
    """Training from two lists, test from identity folders a camera."""
    members = {"visible": ("vis", (1, 2, 3, 4, 5, 6, 7, 8, 9)), "infrared": ("nir", (1, 2, 4, 5, 6, 7, 8, 9))}
    cameras = {m: {f"test_{w}/cam{c}": c for c in camids} for m, (w, camids) in members.items()}
    folder.require("idx", *(name for folders in cameras.values() for name in folders))
    ids = folder.ids("idx/test_id.txt")
    train = {m: folder.entries(f"idx/train_{word}.txt") for m, (word, _) in members.items()}
    return train | folder.identities("test_", cameras, ids)


def _read_market(folder: Folder, trial: Any, protocol: Any) -> Splits:
    """Folders a modality, of a trial's sub-folder where one is given; the test images may be absent."""
    splits: Splits = {}
    for modality, side in (("visible", "rgb_modify"), ("infrared", "ir_modify")):
        base = side if trial is None else f"{side}/{trial}"
        folder.require(f"{base}/bounding_box_train")
        splits[modality] = _read_named(folder, f"{base}/bounding_box_train")
        splits["test_" + modality] = _read_named(folder, f"{base}/query", f"{base}/bounding_box_test")
    tested = splits["test_visible"] and splits["test_infrared"]
    return splits if tested else {m: splits[m] for m in MODALITIES}


def _read_named(folder: Folder, *places: str) -> list[Entry]:
    """Files like 0001_c1_anything.jpg of the folders that exist, by identity, camera, file name.

    As in Market-1501, 0000 marks a distractor (here -1), and files that begin with -1 are not used.
    """
    found = []
    for name in (n for place in places if (folder.root / place).is_dir() for n in folder.images(place)):
        file = name.rsplit("/", 1)[1]
        if match := re.match(r"(\d+)_c(\d+)", file):
            pid, camid = (whole_number(digits, f"a number in the name {name!r}") for digits in match.groups())
            found.append(Entry(name, pid or -1, camid))
        elif not file.startswith("-1_"):
            folder.listed.add(name)
    return sorted(found, key=lambda entry: (entry.pid, entry.camid, entry.name.rsplit("/", 1)[1], entry.name))


Counts = dict[str, dict[str, int]]  # by split, "identities" and "images"


def _published(*counts: tuple[int, int]) -> Counts:
    named = zip(SPLITS, counts, strict=True)
    return {split: {"identities": people, "images": images} for split, (people, images) in named}


@dataclass(frozen=True)
class Layout:
    """A data set: the content of its root, its reader, its published counts.

    options: the reader's, with their defaults. protocol: how it is evaluated. counts: published identities
    and images of each split. shared: its trials split the same images, and share a pack for each modality.
    """

    holds: str
    reader: Callable[..., Splits]
    options: dict[str, Any] = field(default_factory=dict)
    protocol: str | None = None
    counts: Counts = field(default_factory=dict)
    shared: bool = False


LAYOUTS = {
    # Wu et al., ICCV 2017: train + val
    "sysu": Layout(
        "cam1 ... cam6, each with a folder an identity (cam1/0001/0001.jpg), and exp/train_id.txt, "
        "exp/val_id.txt, exp/test_id.txt",
        _read_sysu,
        protocol="sysu",
        counts=_published((395, 22_258), (395, 11_909), (96, 6_775), (96, 3_803)),
    ),
    # Nguyen et al., Sensors 2017: a trial
    "regdb": Layout(
        "Visible/, Thermal/ and idx/{train,test}_{visible,thermal}_{1..10}.txt with lines like "
        "'Visible/1/name.bmp 0'",
        _read_regdb,
        options={"trial": 1},
        protocol="regdb",
        counts=_published(*[(206, 2_060)] * 4),
        shared=True,
    ),
    # Zhang and Wang, CVPR 2023
    "llcm": Layout(
        "idx/train_vis.txt, idx/train_nir.txt, idx/test_id.txt, the images that they name, "
        "test_vis/cam1 ... cam9 and test_nir/cam1, cam2, cam4 ... cam9 with a folder an identity",
        _read_llcm,
        protocol="llcm",
        counts=_published((713, 16_946), (713, 13_975), (351, 8_680), (351, 7_166)),
    ),
    "market": Layout(
        "rgb_modify/bounding_box_train and ir_modify/bounding_box_train with files like 0001_c1_0001.jpg "
        "(and, for evaluation, query and bounding_box_test beside them)",
        _read_market,
        options={"trial": None, "protocol": None},
    ),
}
