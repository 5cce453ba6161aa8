"""The raw layouts of the field's data sets, read as they are downloaded.

Each reader walks a folder once and returns its piles by the name of their field in `Dataset`, plus the
paths it found and did not expect. It raises ValueError only for a structure it cannot read; whether the
counts are the published ones is for `ecul.checks` to say.
"""

import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ecul import MODALITIES
from ecul.data.decode import pillow

SYSU_VISIBLE, SYSU_INFRARED = (1, 2, 4, 5), (3, 6)
LLCM_VISIBLE, LLCM_INFRARED = (1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 4, 5, 6, 7, 8, 9)

# Images by their name, which Pillow reads with a plug-in or never: they count as unreadable, not as absent.
CAMERA_FORMATS = frozenset((".heic", ".heif", ".hif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw"))
_LAYOUTS = {
    "sysu": "cam1 ... cam6, each with a folder an identity (cam1/0001/0001.jpg), and "
    "exp/train_id.txt, exp/val_id.txt, exp/test_id.txt",
    "regdb": "Visible/, Thermal/ and idx/{train,test}_{visible,thermal}_{1..10}.txt, whose lines are "
    "'Visible/1/name.bmp 0'",
    "llcm": "idx/train_vis.txt, idx/train_nir.txt, idx/test_id.txt, the images that they name, "
    "test_vis/cam1 ... cam9 and test_nir/cam1, cam2, cam4 ... cam9 with a folder an identity",
    "market": "rgb_modify/bounding_box_train and ir_modify/bounding_box_train with files like "
    "0001_c1_0001.jpg (and, for evaluation, query and bounding_box_test beside them)",
}


@dataclass
class Listing:
    """One pile as found on disk: names relative to the root, identities, cameras (0: unknown)."""

    names: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    camids: list[int] = field(default_factory=list)

    def add(self, names: list[str], pid: int, camid: int) -> None:
        self.names += names
        self.pids += [pid] * len(names)
        self.camids += [camid] * len(names)


Found = tuple[dict[str, Listing], list[str]]


def _fail(layout: str, root: Path, problem: str):
    raise ValueError(f"{problem}\n  {str(root)!r} should hold {_LAYOUTS[layout]}")


@lru_cache(maxsize=1)
def _extensions() -> frozenset[str]:
    image_module = pillow()[0]
    known = image_module.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in image_module.OPEN) | CAMERA_FORMATS


def list_folder(folder: Path, root: Path) -> tuple[list[str], list[str], list[str]]:
    """Sorted images, other files and sub-folders of a folder, relative to root; hidden ones are left out."""
    images, others, folders = [], [], []
    prefix = folder.relative_to(root).as_posix()
    for name in sorted(os.listdir(folder)):
        if name.startswith("."):
            continue
        relative = name if prefix == "." else f"{prefix}/{name}"
        if os.path.isdir(folder / name):
            folders.append(relative)
        elif os.path.splitext(name)[1].lower() in _extensions():
            images.append(relative)
        else:
            others.append(relative)
    return images, others, folders


def _text(path: Path) -> str:
    """Bytes that are not UTF-8 survive as they are, so that a path in them is still found."""
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")


def read_ids(path: Path, layout: str, root: Path) -> list[int]:
    """The identities of one comma-separated line, e.g. exp/train_id.txt."""
    if not path.is_file():
        _fail(layout, root, f"missing id file {str(path)!r}")
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if len(lines) != 1:
        raise ValueError(
            f"{str(path)!r} should hold one line of comma-separated identities, not {len(lines)}"
        )
    ids = []
    for place, entry in enumerate(lines[0].split(","), 1):
        if not entry.strip().isdecimal():
            hint = " (a trailing comma?)" if not entry.strip() else ""
            raise ValueError(
                f"{str(path)!r}: entry {place} should be an identity number, not {entry!r}{hint}"
            )
        ids.append(int(entry))
    if len(set(ids)) < len(ids):
        twice = sorted({pid for pid in ids if ids.count(pid) > 1})
        raise ValueError(f"{str(path)!r} names an identity twice: {twice}")
    return ids


def _read_identities(root: Path, folders: list[tuple[str, int]], ids: list[int], extra: list[str]) -> Listing:
    """Images of `ids`, in the published order: identities as sorted 4-digit strings, cameras, file names."""
    listing = Listing()
    for name in sorted(f"{pid:04d}" for pid in ids):
        for folder, camid in folders:
            if not os.path.isdir(root / folder / name):
                continue
            images, others, inner = list_folder(root / folder / name, root)
            listing.add(images, int(name), camid)
            extra += others + inner
    return listing


def _strangers(root: Path, folders: list[str], ids: set[int]) -> list[str]:
    """What lies in camera folders and belongs to no identity of the id files."""
    known = {f"{pid:04d}" for pid in ids}
    found = []
    for folder in folders:
        images, others, inner = list_folder(root / folder, root)
        found += images + others + [path for path in inner if path.rsplit("/", 1)[1] not in known]
    return found


def _need_folders(layout: str, root: Path, folders: list[str]) -> None:
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if missing:
        _fail(layout, root, f"missing folder{'s' * (len(missing) > 1)} {', '.join(missing)} in {str(root)!r}")


def _need_images(layout: str, root: Path, piles: dict[str, Listing]) -> None:
    for name, listing in piles.items():
        if not listing.names:
            _fail(layout, root, f"no image for {name.replace('_', ' ')} in {str(root)!r}")


def read_sysu(root: Path) -> Found:
    """SYSU-MM01: training is train + val, visible cameras 1, 2, 4, 5, infrared 3, 6."""
    cameras = {camid: f"cam{camid}" for camid in sorted(SYSU_VISIBLE + SYSU_INFRARED)}
    _need_folders("sysu", root, ["exp", *cameras.values()])
    ids = {
        split: read_ids(root / "exp" / f"{split}_id.txt", "sysu", root) for split in ("train", "val", "test")
    }
    ids["train"] = sorted({*ids["train"], *ids.pop("val")})
    piles, extra = {}, _strangers(root, list(cameras.values()), {*ids["train"], *ids["test"]})
    for split, prefix in (("train", ""), ("test", "test_")):
        for modality, members in (("visible", SYSU_VISIBLE), ("infrared", SYSU_INFRARED)):
            folders = [(cameras[camid], camid) for camid in members]
            piles[prefix + modality] = _read_identities(root, folders, ids[split], extra)
        held = {*piles[prefix + "visible"].pids, *piles[prefix + "infrared"].pids}
        if empty := sorted(set(ids[split]) - held):
            names = ", ".join(f"{pid:04d}" for pid in empty[:10])
            _fail("sysu", root, f"exp/ names {len(empty)} {split} identities without an image: {names}")
    _need_images("sysu", root, piles)
    return piles, extra


def _read_list(path: Path, layout: str, root: Path, camid: int | None = None) -> Listing:
    """Lines `relative/path label`; the camera is the argument, or is read from the path."""
    if not path.is_file():
        _fail(layout, root, f"missing list {str(path)!r}")
    listing = Listing()
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name.strip() or not label.isdecimal():
            raise ValueError(f"{str(path)!r}, line {number}: expected 'relative/path label', not {line!r}")
        name = name.strip()
        listing.add([name], int(label), camid_of(name) if camid is None else camid)
    return listing


def camid_of(name: str) -> int:
    """The camera that a path tells of: a folder `cam3`, or `_c3` / `_c03` in the file name; 0 if neither."""
    match = re.search(r"(?:^|/)cam(\d+)/", name) or re.search(r"_c(\d+)(?![a-z0-9])[^/]*$", name)
    return int(match.group(1)) if match else 0


def read_regdb(root: Path, trial: int = 1) -> Found:
    """RegDB, one of its ten trials; visible images count as camera 1, infrared as camera 2."""
    if trial not in range(1, 11):
        raise ValueError(f"trial: RegDB has trials 1 to 10, not {trial!r}")
    _need_folders("regdb", root, ["idx"])
    piles = {}
    for split, prefix in (("train", ""), ("test", "test_")):
        for modality, word, camid in (("visible", "visible", 1), ("infrared", "thermal", 2)):
            path = root / "idx" / f"{split}_{word}_{trial}.txt"
            piles[prefix + modality] = _read_list(path, "regdb", root, camid)
    _need_images("regdb", root, piles)
    return piles, []


def read_llcm(root: Path) -> Found:
    """LLCM: training from two lists, test from identity folders a camera."""
    vis = [(f"test_vis/cam{camid}", camid) for camid in LLCM_VISIBLE]
    nir = [(f"test_nir/cam{camid}", camid) for camid in LLCM_INFRARED]
    _need_folders("llcm", root, ["idx", *(folder for folder, _ in vis + nir)])
    ids = read_ids(root / "idx" / "test_id.txt", "llcm", root)
    extra = _strangers(root, [folder for folder, _ in vis + nir], set(ids))
    piles = {
        "visible": _read_list(root / "idx" / "train_vis.txt", "llcm", root),
        "infrared": _read_list(root / "idx" / "train_nir.txt", "llcm", root),
        "test_visible": _read_identities(root, vis, ids, extra),
        "test_infrared": _read_identities(root, nir, ids, extra),
    }
    if empty := sorted(set(ids) - {*piles["test_visible"].pids, *piles["test_infrared"].pids}):
        _fail("llcm", root, f"idx/test_id.txt names {len(empty)} identities without an image: {empty[:10]}")
    _need_images("llcm", root, piles)
    return piles, extra


def read_market(root: Path, trial: int | None = None) -> Found:
    """Market-1501-style folders a modality; with `trial`, `rgb_modify/<trial>/bounding_box_train`."""
    extra: list[str] = []
    piles = {}
    for modality, folder in (("visible", "rgb_modify"), ("infrared", "ir_modify")):
        base = folder if trial is None else f"{folder}/{trial}"
        _need_folders("market", root, [f"{base}/bounding_box_train"])
        piles[modality] = _read_named(root, [f"{base}/bounding_box_train"], extra)
        test = [f"{base}/{part}" for part in ("query", "bounding_box_test") if (root / base / part).is_dir()]
        piles["test_" + modality] = _read_named(root, test, extra)
    _need_images("market", root, {name: piles[name] for name in MODALITIES})
    if not (piles["test_visible"].names and piles["test_infrared"].names):
        piles = {name: piles[name] for name in MODALITIES}
    return piles, extra


def _read_named(root: Path, folders: list[str], extra: list[str]) -> Listing:
    """Files like 0001_c1_anything.jpg of several folders, by identity, camera, file name."""
    found = []
    for folder in folders:
        images, others, inner = list_folder(root / folder, root)
        extra += others + inner
        for name in images:
            short = name.rsplit("/", 1)[1]
            if match := re.match(r"(\d+)_c(\d+)(?!\d)", short):
                found.append((int(match.group(1)), int(match.group(2)), short, name))
            else:
                extra.append(name)
    listing = Listing()
    for pid, camid, _, name in sorted(found):
        listing.add([name], pid, camid)
    return listing
