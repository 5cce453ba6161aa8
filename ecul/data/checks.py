"""Whether a data set is complete: counts, missing and extra files, unreadable images, overlapping splits."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ecul.common import logs
from ecul.common.files import read_json, reading
from ecul.common.names import printable, shorten
from ecul.data.decode import find_unreadable
from ecul.data.images import Images
from ecul.data.layouts import LAYOUTS, SYSU_CAMERAS, whole_number
from ecul.data.pack import Files

ON_PURPOSE = "if it is a subset or a set of one's own, give subset=True (--option subset=true)"


@dataclass
class CheckResult:
    """The result of `check_dataset`: `ok` without errors, `str()` for people, `to_dict()` for JSON.

    counts and expected: split -> {"identities", "images", "cameras": {camera: images}}. missing, unreadable,
    extra: all the paths; `errors` and `warnings` name the first few. hint: advice about the errors.
    """

    name: str
    source: str
    counts: dict[str, dict] = field(default_factory=dict)
    expected: dict[str, dict] = field(default_factory=dict)
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
        """A dictionary for `json.dumps`."""
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
    """Compare a `Dataset` with the published one, without raising.

    The expected counts are those in the root's `synthetic.json`, else the published ones of the data set,
    else of the data set whose protocol it borrows. Other counts are errors, unless the data set was opened
    with subset=True. Errors too: missing and empty files, an image listed twice in a split, a file in two
    splits (by its name or by links). An unexpected file is a warning. decode=True also decodes every image to
    its end, which takes minutes.
    """
    result = CheckResult(dataset.name, "no published counts to compare with", extra=list(dataset.extra))
    owners = [LAYOUTS[name] for name in (dataset.name, dataset.protocol) if name in LAYOUTS]
    published = next((layout.counts for layout in owners if layout.counts), {})
    if published:
        result.expected, result.source = published, "as published"
        if dataset.root and (described := Path(dataset.root) / "synthetic.json").is_file():
            _read_counts(described, result)
    if dataset.subset:
        result.source = "counts of its own, as asked for"
    files: dict[str, dict[tuple[int, int], str]] = {}
    for split, images in dataset.splits().items():
        count, files[split] = count_images(images), {}
        result.counts[split] = count
        differs = [] if dataset.subset else list(_differences(count, result.expected.get(split, {})))
        found = [*differs, *_look_at_files(images, result, files[split], progress)]
        found += [] if len(images) else ["no images"]
        result.errors += [f"{split.replace('_', ' ')}: {text}" for text in found]
        result.hint = ON_PURPOSE if differs and len(images) else result.hint
    for (a, of_a), (b, of_b) in combinations(files.items(), 2):
        if both := sorted(of_a[file] for file in of_a.keys() & of_b.keys()):
            told = f"{a} and {b}".replace("_", " ")
            result.errors.append(f"{told}: {len(both)} images are in both: {shorten(both)}")
    if decode:
        sources = {images.source: None for images in dataset.splits().values()}
        paths = [path for source in sources if isinstance(source, Files) for path in source.paths()]
        known = {*result.missing, *result.unreadable}
        problems = find_unreadable([path for path in paths if str(path) not in known], progress)
        result.unreadable += problems
        result.errors += map(str, problems.values())
    if result.extra:
        result.warnings.append(f"{len(result.extra)} unexpected, left out: {shorten(result.extra)}")
    return result


def _read_counts(path: Path, result: CheckResult) -> None:
    """Take the expected counts from `synthetic.json`."""
    result.expected, result.source = {}, "as synthetic.json says"
    try:
        with reading(path):
            counts = read_json(path)["counts"]
            for split, prefix in (("train", ""), ("test", "test_")):
                for modality, camids in SYSU_CAMERAS.items():
                    images = whole_number(counts[split][modality], modality)
                    cameras = {str(c): whole_number(counts[split]["cameras"][str(c)], str(c)) for c in camids}
                    result.expected[prefix + modality] = {"images": images, "cameras": cameras}
    except (OSError, ValueError) as error:
        result.errors.append(str(error))


def count_images(images: Images) -> dict[str, Any]:
    """{"identities": a number or None, "images": a number, "cameras": {camera: images}}."""
    cameras, counts = np.unique(images.camids[images.camids > 0], return_counts=True)
    return {
        "identities": None if images.pids is None else len(images.people()),
        "images": len(images),
        "cameras": {str(camera): int(count) for camera, count in zip(cameras, counts, strict=True)},
    }


def _differences(count: dict, wanted: dict) -> Iterator[str]:
    compared = [(kind, count[kind], wanted[kind]) for kind in ("identities", "images") if kind in wanted]
    for camera in sorted({*count["cameras"], *wanted["cameras"]}) if "cameras" in wanted else ():
        held = count["cameras"].get(camera, 0), wanted["cameras"].get(camera, 0)
        compared.append((f"images of camera {camera}", *held))
    for kind, found, number in compared:
        if found != number:
            yield f"{found:,} {kind}, expected {number:,}"


def _look_at_files(
    images: Images, result: CheckResult, found: dict[tuple[int, int], str], progress: bool
) -> Iterator[str]:
    """The problems of a split's files; `found` gets the name of each, by its device and number."""
    if twice := [path for path, times in Counter(images.names).items() if times > 1]:
        yield f"{len(twice)} images are listed twice: {shorten(twice)}"
    if not isinstance(images.source, Files):
        return
    missing, empty = [], []
    named = zip(images.names, images.source.paths(images.rows), strict=True)
    for name, path in logs.progress(len(images), "looking at files", "image", progress, named):
        try:
            entry = os.stat(path)
        except OSError:
            missing.append(str(path))
            continue
        found[entry.st_dev, entry.st_ino] = name
        if not entry.st_size:
            empty.append(str(path))
    if missing:
        yield f"{len(missing)} images are missing: {shorten(missing)}"
    if empty:
        yield f"{len(empty)} images are empty files{images.source.advice}: {shorten(empty)}"
    result.missing += missing
    result.unreadable += empty
