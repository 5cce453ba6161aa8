"""What a data set should be, and whether it is: counts, missing and extra files, unreadable images."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ecul import MODALITIES
from ecul.common.names import shorten
from ecul.data.decode import read_images
from ecul.data.images import Images
from ecul.data.layouts import SYSU_INFRARED, SYSU_VISIBLE
from ecul.data.pack import Files

# Identities and images. SYSU-MM01: Wu et al., ICCV 2017, train + val; RegDB: Nguyen et al., Sensors 2017, a
# trial; LLCM: Zhang and Wang, CVPR 2023.
PUBLISHED = {
    "sysu": {
        "visible": {"identities": 395, "images": 22_258},
        "infrared": {"identities": 395, "images": 11_909},
        "test_visible": {"identities": 96, "images": 6_775},
        "test_infrared": {"identities": 96, "images": 3_803},
    },
    "regdb": {
        pile: {"identities": 206, "images": 2_060}
        for pile in ("visible", "infrared", "test_visible", "test_infrared")
    },
    "llcm": {
        "visible": {"identities": 713, "images": 16_946},
        "infrared": {"identities": 713, "images": 13_975},
        "test_visible": {"identities": 351, "images": 8_680},
        "test_infrared": {"identities": 351, "images": 7_166},
    },
}


@dataclass
class Report:
    """What `check_images` found; `ok` when there is no error, `str()` for people, `to_dict()` for JSON.

    counts and expected: pile -> {"identities", "images", "cameras": {camera: images}}. missing, unreadable,
    extra: all the paths, of which `errors` and `warnings` name the first few.
    """

    name: str
    source: str
    counts: dict[str, dict]
    expected: dict[str, dict]
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors

    @property
    def verdict(self) -> str:
        """One line."""
        images = sum(pile["images"] for pile in self.counts.values())
        if self.errors:
            return f"NOT OK: {len(self.errors)} error{'s' * (len(self.errors) > 1)} in {self.name!r}"
        return f"OK: {self.name!r}, {images:,} images, {self.source}"

    def to_dict(self) -> dict:
        """What `json.dumps` takes."""
        return {"ok": self.ok, "verdict": self.verdict, **vars(self)}

    def __str__(self) -> str:
        lines = []
        for pile, count in self.counts.items():
            wanted = self.expected.get(pile, {})
            figures = ", ".join(_figure(kind, count, wanted) for kind in ("identities", "images"))
            cameras = ", ".join(f"{camera}: {images:,}" for camera, images in count["cameras"].items())
            lines.append(f"{pile.replace('_', ' '):14} {figures}; by camera {cameras or 'unknown'}")
        lines += [f"error: {text}" for text in self.errors]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, self.verdict])


def _figure(kind: str, count: dict, wanted: dict) -> str:
    if count[kind] is None:
        return f"no {kind}"
    told = f"{count[kind]:,} {kind}"
    return told if wanted.get(kind, count[kind]) == count[kind] else f"{told} (expected {wanted[kind]:,})"


def check_images(
    piles: dict[str, Images],
    *,
    name: str,
    root: str | None = None,
    protocol: str | None = None,
    subset: bool = False,
    extra: Sequence[str] = (),
    decode: bool = False,
    progress: bool = True,
) -> Report:
    """Compare the piles of a data set with what was published, without raising.

    Counts are compared with the published ones, or with those of `synthetic.json` where it lies in the
    root; fewer are an error unless the data set was opened with subset=True. Missing and empty files, a file
    listed twice or in training and test are errors, unexpected files a warning. decode=True also decodes
    every image to its end and compares packs with their hash, which takes minutes.
    """
    report = Report(name, "no published counts to compare with", {}, {})
    _expect(root, protocol, report)
    if subset:
        report.source = "a subset, as asked for"
    for label, pile in piles.items():
        report.counts[label] = _count(pile)
        _compare(label, subset, report)
        _look_at_files(pile, label, report)
    _look_for_overlap(piles, protocol, report)
    if decode:
        _decode(piles, report, progress)
    report.extra = list(extra)
    if report.extra:
        report.warnings.append(f"{len(report.extra)} unexpected paths: {shorten(report.extra)}")
    return report


def _expect(root: str | None, protocol: str | None, report: Report) -> None:
    """Fill in the expected counts and where they come from."""
    described = Path(root) / "synthetic.json" if root and protocol else None
    if described is not None and described.is_file():
        try:
            counts = json.loads(described.read_text(encoding="utf-8"))["counts"]
            for split, prefix in (("train", ""), ("test", "test_")):
                for modality, cameras in (("visible", SYSU_VISIBLE), ("infrared", SYSU_INFRARED)):
                    seen = {str(camid): int(counts[split]["cameras"][str(camid)]) for camid in cameras}
                    report.expected[prefix + modality] = {
                        "images": int(counts[split][modality]),
                        "cameras": {camera: images for camera, images in seen.items() if images},
                    }
        except (ValueError, KeyError, TypeError) as error:
            report.errors.append(f"{str(described)!r} cannot be read: {error!r}")
        report.source = "as synthetic.json says"
    elif protocol in PUBLISHED and root:
        report.expected = PUBLISHED[protocol]
        report.source = "as published"


def _count(pile: Images) -> dict:
    cameras, images = np.unique(pile.camids[pile.camids > 0], return_counts=True)
    return {
        "identities": None if pile.pids is None else len(np.unique(pile.pids)),
        "images": len(pile),
        "cameras": {str(camera): int(count) for camera, count in zip(cameras, images, strict=True)},
    }


def _compare(name: str, subset: bool, report: Report) -> None:
    count, wanted = report.counts[name], report.expected.get(name, {})
    label = name.replace("_", " ")
    if not count["images"]:
        report.errors.append(f"{label}: no images")
    compared = [(kind, count[kind], wanted[kind]) for kind in ("identities", "images") if kind in wanted]
    for camera in sorted({*count["cameras"], *wanted["cameras"]}) if "cameras" in wanted else ():
        held = count["cameras"].get(camera, 0), wanted["cameras"].get(camera, 0)
        compared.append((f"images of camera {camera}", *held))
    for kind, found, number in compared:
        if found == number or (subset and found < number):
            continue
        hint = "" if found > number else "; for a subset on purpose say subset=True"
        report.errors.append(f"{label}: {found:,} {kind}, expected {number:,}{hint}")


def _look_at_files(pile: Images, name: str, report: Report) -> None:
    label = name.replace("_", " ")
    if len(set(pile.names)) < len(pile):
        twice = [path for path, times in Counter(pile.names).items() if times > 1]
        report.errors.append(f"{label}: {len(twice)} images are listed twice: {shorten(twice)}")
    if not isinstance(pile.source, Files):
        return
    missing, empty = [], []
    for path in pile.source.paths(pile.rows):
        try:
            if not os.stat(path).st_size:
                empty.append(str(path))
        except OSError:
            missing.append(str(path))
    if missing:
        report.errors.append(f"{label}: {len(missing)} images are missing: {shorten(missing)}")
    if empty:
        report.errors.append(
            f"{label}: {len(empty)} images are empty files{pile.source.advice}: {shorten(empty)}"
        )
    report.missing += missing
    report.unreadable += empty


def _look_for_overlap(piles: dict[str, Images], protocol: str | None, report: Report) -> None:
    """A test image, or for SYSU-MM01 a test identity, must not be trained on."""
    for modality in MODALITIES:
        test = piles.get("test_" + modality)
        if test is None or not isinstance(test.source, Files):
            continue
        if both := sorted({*piles[modality].names} & {*test.names}):
            report.errors.append(f"{modality}: {len(both)} images to train and to test on: {shorten(both)}")
        if protocol != "sysu":
            continue
        if shared := {*piles[modality].identities()} & {*test.identities()}:
            ids = [f"{pid:04d}" for pid in sorted(shared)]
            report.errors.append(f"{modality}: {len(ids)} identities to train and to test on: {shorten(ids)}")


def _decode(piles: dict[str, Images], report: Report, progress: bool) -> None:
    sources = {id(pile.source): pile.source for pile in piles.values()}
    files = [source for source in sources.values() if isinstance(source, Files)]
    known = {*report.missing, *report.unreadable}
    paths = [path for source in files for path in source.paths() if str(path) not in known]
    unreadable = []
    for path, image in zip(paths, read_images(paths, (8, 4), progress, "decoding"), strict=True):
        if isinstance(image, ValueError):
            report.errors.append(str(image))
            unreadable.append(str(path))
    report.unreadable += unreadable
    for source in files:
        for pack in source.damaged():
            report.errors.append(f"damaged pack, remove it: {str(pack)!r}")
