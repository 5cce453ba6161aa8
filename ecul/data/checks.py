"""What a data set should be, and whether it is: counts, missing and extra files, unreadable images."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ecul import MODALITIES
from ecul.common import logs
from ecul.common.names import printable, shorten
from ecul.common.records import COUNT, Schema, read_json
from ecul.data.decode import find_unreadable
from ecul.data.images import Images
from ecul.data.layouts import LAYOUTS, SYSU_INFRARED, SYSU_VISIBLE, Counts
from ecul.data.pack import Files

_SPLIT: Schema = {
    "visible": COUNT,
    "infrared": COUNT,
    "cameras": {str(camid): COUNT for camid in (*SYSU_VISIBLE, *SYSU_INFRARED)},
}
ON_PURPOSE = "for a subset or a set of one's own, on purpose, say subset=True (--option subset=true)"
FileId = tuple[int, int]  # a file's device and number: the same behind every link to it
DESCRIBED: Schema = {"counts": {"train": _SPLIT, "test": _SPLIT}}  # what synthetic.json says


@dataclass
class CheckResult:
    """What `check_dataset` found; `ok` when there is no error, `str()` for people, `to_dict()` for JSON.

    counts and expected: split -> {"identities", "images", "cameras": {camera: images}}. missing, unreadable,
    extra: all the paths, of which `errors` and `warnings` name the first few. hint: what may be done.
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
    hint: str = ""

    @property
    def ok(self) -> bool:
        """Whether no error was found."""
        return not self.errors

    @property
    def verdict(self) -> str:
        """One line."""
        if self.errors:
            found = f"NOT OK: {len(self.errors)} error{'s' * (len(self.errors) > 1)} in {self.name!r}"
            return "; ".join(filter(None, [found, self.hint]))
        return f"OK: {self.name!r}, {sum(c['images'] for c in self.counts.values()):,} images, {self.source}"

    def to_dict(self) -> dict[str, Any]:
        """What `json.dumps` takes."""
        return {"ok": self.ok, "verdict": self.verdict, **vars(self)}

    def __str__(self) -> str:
        lines = []
        for split, count in self.counts.items():
            wanted = self.expected.get(split, {})
            figures = ", ".join(_figure(kind, count, wanted) for kind in ("identities", "images"))
            cameras = ", ".join(f"{camera}: {images:,}" for camera, images in count["cameras"].items())
            told = f"by camera {cameras}" if cameras else "cameras unknown"
            lines.append(f"{split.replace('_', ' '):14} {figures}; {told}")
        lines += [f"error: {text}" for text in self.errors]
        lines += [f"warning: {text}" for text in self.warnings]
        return printable("\n".join([*lines, self.verdict]), "\n")


def _figure(kind: str, count: dict, wanted: dict) -> str:
    if count[kind] is None:
        return f"no {kind}"
    told = f"{count[kind]:,} {kind}"
    return told if wanted.get(kind, count[kind]) == count[kind] else f"{told} (expected {wanted[kind]:,})"


def check_dataset(dataset: Any, decode: bool = False, progress: bool = True) -> CheckResult:
    """Compare a `Dataset` with what was published, without raising.

    Counts are compared with those of `synthetic.json` where it lies in the root, else with the published
    ones, the data set's own before those of the one whose protocol it borrows; others are an error unless the
    data set was opened with subset=True. Missing and empty files, a file listed twice by its name, or in two
    splits by its name or by links, are errors, unexpected files a warning. decode=True also decodes every
    image to its end and compares packs with their hash, which takes minutes.
    """
    splits, extra = dataset.splits(), list(dataset.extra)
    result = CheckResult(dataset.name, "no published counts to compare with", {}, {}, extra=extra)
    owners = [LAYOUTS[name] for name in (dataset.name, dataset.protocol) if name in LAYOUTS]
    published = next((layout.counts for layout in owners if layout.counts), {})
    if dataset.root and published:
        _expect(Path(dataset.root) / "synthetic.json", published, result)
    if dataset.subset:
        result.source = "counts of its own, as asked for"
    files: dict[str, dict[FileId, str]] = {}
    for split, images in splits.items():
        result.counts[split], files[split] = _count(images), {}
        label = split.replace("_", " ")
        differs = list(_differences(result.counts[split], result.expected.get(split, {}), dataset.subset))
        looked = _look_at_files(images, result, files[split], progress)
        result.errors += [f"{label}: {text}" for text in [*differs, *looked]]
        result.hint = ON_PURPOSE if differs and len(images) else result.hint
    result.errors += _overlaps(splits, files, dataset.protocol)
    if decode:
        _decode(splits, result, progress)
    if extra:
        result.warnings.append(f"{len(extra)} unexpected, left out: {shorten(extra)}")
    return result


def _expect(described: Path, published: Counts, result: CheckResult) -> None:
    """Fill in the expected counts and where they come from."""
    if not described.is_file():
        result.expected, result.source = published, "as published"
        return
    result.source = "as synthetic.json says"
    try:
        counts = read_json(described, DESCRIBED)["counts"]
    except (OSError, ValueError) as error:
        result.errors.append(str(error))
        return
    for split, prefix in (("train", ""), ("test", "test_")):
        for modality, camids in (("visible", SYSU_VISIBLE), ("infrared", SYSU_INFRARED)):
            seen = {str(camid): counts[split]["cameras"][str(camid)] for camid in camids}
            result.expected[prefix + modality] = {
                "images": counts[split][modality],
                "cameras": {camera: images for camera, images in seen.items() if images},
            }


def _count(images: Images) -> dict[str, Any]:
    cameras, counts = np.unique(images.camids[images.camids > 0], return_counts=True)
    return {
        "identities": None if images.pids is None else len(np.unique(images.pids)),
        "images": len(images),
        "cameras": {str(camera): int(count) for camera, count in zip(cameras, counts, strict=True)},
    }


def _differences(count: dict, wanted: dict, subset: bool) -> Iterator[str]:
    if not count["images"]:
        yield "no images"
    compared = [(kind, count[kind], wanted[kind]) for kind in ("identities", "images") if kind in wanted]
    for camera in sorted({*count["cameras"], *wanted["cameras"]}) if "cameras" in wanted else ():
        held = count["cameras"].get(camera, 0), wanted["cameras"].get(camera, 0)
        compared.append((f"images of camera {camera}", *held))
    for kind, found, number in compared:
        if found != number and not subset:
            yield f"{found:,} {kind}, expected {number:,}"


def _look_at_files(
    images: Images, result: CheckResult, found: dict[FileId, str], progress: bool
) -> Iterator[str]:
    """The problems of a split's files; found: fills with the name of each file that is there."""
    if twice := [path for path, times in Counter(images.names).items() if times > 1]:
        yield f"{len(twice)} images are listed twice: {shorten(twice)}"
    if not isinstance(images.source, Files):
        return
    missing, empty = [], []
    named = zip(images.names, images.source.paths(images.rows), strict=True)
    for name, path in logs.progress(len(images), "looking at files", "image", progress, named):
        try:
            entry = os.stat(path)
            found[entry.st_dev, entry.st_ino] = name
            if not entry.st_size:
                empty.append(str(path))
        except OSError:
            missing.append(str(path))
    if missing:
        yield f"{len(missing)} images are missing: {shorten(missing)}"
    if empty:
        yield f"{len(empty)} images are empty files{images.source.advice}: {shorten(empty)}"
    result.missing += missing
    result.unreadable += empty


def _overlaps(
    splits: Mapping[str, Images], files: Mapping[str, Mapping[FileId, str]], protocol: str | None
) -> Iterator[str]:
    """No file belongs to two splits, by whatever links; for SYSU-MM01 no identity to training and test."""
    for (a, of_a), (b, of_b) in combinations(files.items(), 2):
        if both := sorted(of_a[file] for file in of_a.keys() & of_b.keys()):
            told = f"{a} and {b}".replace("_", " ")
            yield f"{told}: {len(both)} images are in both: {shorten(both)}"
    for modality in MODALITIES if protocol == "sysu" else ():
        train, test = splits[modality], splits.get("test_" + modality)
        if test is None or not isinstance(test.source, Files):
            continue
        if people := sorted({*train.identities()} & {*test.identities()}):
            names = [f"{pid:04d}" for pid in people]
            yield f"{modality}: {len(names)} identities to train and to test on: {shorten(names)}"


def clean_packs(dataset: Any) -> list[Path]:
    """Remove packs beside a `Dataset` that its images no longer match; returns their paths.

    Errors: ValueError for an image that is missing, without which nobody knows what a pack should match.
    """
    return [path for source in _sources(dataset.splits()) for path in source.clean()]


def _sources(splits: Mapping[str, Images]) -> list[Files]:
    sources = {id(images.source): images.source for images in splits.values()}
    return [source for source in sources.values() if isinstance(source, Files)]


def _decode(splits: Mapping[str, Images], result: CheckResult, progress: bool) -> None:
    files = _sources(splits)
    known = {*result.missing, *result.unreadable}
    problems = find_unreadable(
        [path for source in files for path in source.paths() if str(path) not in known], progress
    )
    result.unreadable += problems
    result.errors += map(str, problems.values())
    for pack in (pack for source in files for pack in source.damaged(progress)):
        result.errors.append(f"damaged pack, remove it: {str(pack)!r}")
