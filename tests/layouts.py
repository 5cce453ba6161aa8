"""Tiny folders of each data set's exact layout, for all tests.

Every maker returns its root and is deterministic. Images are small noise, so that no two are alike.
"""

from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

SYSU_CAMERAS = (1, 2, 3, 4, 5, 6)
LLCM_VISIBLE, LLCM_INFRARED = (1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 4, 5, 6, 7, 8, 9)


def noise(*key, size=(12, 6)):
    """A (H, W, 3) uint8 image that depends on nothing but its key."""
    seed = [sum(ord(letter) * 31**place for place, letter in enumerate(str(part))) for part in key]
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def picture(path, size=(12, 6), mode="RGB"):
    """Write one noise image; the suffix chooses the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(path.name, path.parent.name, path.parent.parent.name, size=size)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def text(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def sysu(root, train=(1, 2, 3, 5), val=(4,), test=(6, 7, 8), images=3, skip=(), count=None, size=(12, 6)):
    """SYSU-MM01. skip: (pid, camera) pairs without a folder; count: {(pid, camera): images}."""
    root, count = Path(root), count or {}
    for pid, camid in product((*train, *val, *test), SYSU_CAMERAS):
        for number in range(1, 1 + count.get((pid, camid), 0 if (pid, camid) in skip else images)):
            path = root / f"cam{camid}" / f"{pid:04d}" / f"{number:04d}.jpg"
            picture(path, size, "L" if camid in (3, 6) else "RGB")
    for split, pids in (("train", train), ("val", val), ("test", test)):
        text(root / "exp" / f"{split}_id.txt", ",".join(map(str, pids)) + "\n")
    return root


def regdb(root, identities=6, images=2, trials=(1, 2), size=(12, 6)):
    """RegDB: half of the identities to train on, another half a trial."""
    root = Path(root)
    sides = (("Visible", "visible"), ("Thermal", "thermal"))
    for (folder, word), pid, number in product(sides, range(1, identities + 1), range(images)):
        picture(root / folder / str(pid) / f"male_front_{word[0]}_{number:05d}_{pid}.bmp", size)
    for trial in trials:
        order = np.random.default_rng(trial).permutation(identities) + 1
        halves = {"train": sorted(order[: identities // 2]), "test": sorted(order[identities // 2 :])}
        for (split, pids), (folder, word) in product(halves.items(), sides):
            lines = [
                f"{folder}/{pid}/male_front_{word[0]}_{number:05d}_{pid}.bmp {label}"
                for (label, pid), number in product(enumerate(pids), range(images))
            ]
            text(root / "idx" / f"{split}_{word}_{trial}.txt", "\n".join(lines) + "\n")
    return root


def llcm(root, train=(1, 2, 3), test=(4, 5), images=2, skip=(), size=(12, 6)):
    """LLCM: vis/ and nir/ to train on, test_vis/cam*/ and test_nir/cam*/. skip: (folder, pid, camera)."""
    root = Path(root)
    for kind in ("vis", "nir"):
        lines = []
        for (label, pid), camid, number in product(enumerate(train), (1, 2), range(images)):
            name = f"{kind}/{pid:04d}/{pid:04d}_c{camid:02d}_s{number:06d}_f{number}_{kind}.jpg"
            picture(root / name, size)
            lines.append(f"{name} {label}")
        text(root / "idx" / f"train_{kind}.txt", "\n".join(lines))
        for camid in LLCM_VISIBLE if kind == "vis" else LLCM_INFRARED:
            (root / f"test_{kind}" / f"cam{camid}").mkdir(parents=True)
            for pid in test:
                for number in range(images if (kind, pid, camid) not in skip else 0):
                    name = f"{pid:04d}_c{camid:02d}_s{number:06d}_f{number}_{kind}.jpg"
                    picture(root / f"test_{kind}" / f"cam{camid}" / f"{pid:04d}" / name, size)
    text(root / "idx" / "test_id.txt", ",".join(map(str, test)))
    return root


def market(root, train=(1, 2), test=(3, 4), images=2, trial=None, size=(12, 6)):
    """`{rgb,ir}_modify/bounding_box_train`, query and bounding_box_test."""
    root = Path(root)
    for folder, cameras in (("rgb_modify", (1, 2, 4, 5)), ("ir_modify", (3, 6))):
        base = root / folder / str(trial or "")
        for part, pids in (("bounding_box_train", train), ("query", test), ("bounding_box_test", test)):
            first = images + 1 if part == "bounding_box_test" else 1
            for pid, camid, number in product(pids, cameras, range(first, first + images)):
                picture(base / part / f"{pid:04d}_c{camid}_{number:04d}.jpg", size)
    return root


def folders(root, cameras=True, images=3, size=(12, 6)):
    """One's own images: root/day and root/night, with a sub-folder a camera or without."""
    root = Path(root)
    for side, camera, number in product(("day", "night"), ("gate", "hall"), range(images)):
        picture(root / side / (camera if cameras else ".") / f"{number}.png", size)
    return root / "day", root / "night"
