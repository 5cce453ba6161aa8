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
from ecul.common.names import printable, shorten
from ecul.data.decode import find_unreadable
from ecul.data.images import Images
from ecul.data.layouts import LAYOUTS
from ecul.data.pack import Files

ON_PURPOSE = "if it is a subset or a set of one's own, give subset=True (--option subset=true)"


@dataclass
class CheckResult:
    """The result of `check_dataset`: `ok` without errors, `str()` for people, `to_dict()` for JSON.

    counts and expected: split -> {"identities", "images", "cameras": {camera: images}}. missing, unreadable,
    extra: all the paths; `errors` and `warnings` name the first few.
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

    @property
    def ok(self) -> bool:
        """Whether no error was found."""
        return not self.errors

    @property
    def verdict(self) -> str:
        """One line."""
        if self.errors:
            return f"NOT OK: {len(self.errors)} error{'s' * (len(self.errors) > 1)} in {self.name!r}"
        return f"OK: {self.name!r}, {sum(c['images'] for c in self.counts.values()):,} images, {self.source}"

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for `json.dumps`."""
        return {"ok": self.ok, "verdict": self.verdict, **vars(self)}

    def __str__(self) -> str:
        lines = []
        for split, count in self.counts.items():
            people = "no" if count["identities"] is None else f"{count['identities']:,}"
            cameras = ", ".join(f"{camera}: {images:,}" for camera, images in count["cameras"].items())
            told = f"{people} identities, {count['images']:,} images; by camera {cameras or 'unknown'}"
            lines.append(f"{split.replace('_', ' '):14} {told}")
        lines += [f"error: {text}" for text in self.errors]
        lines += [f"warning: {text}" for text in self.warnings]
        return printable("\n".join([*lines, self.verdict]), "\n")


def check_dataset(dataset: Any, decode: bool = False, progress: bool = True) -> CheckResult:
    """Compare a `Dataset` with the published one, without raising.

    The expected counts are those of its protocol's published data set. Other counts are errors, unless the
    data set was opened with subset=True. A synthetic world, arrays and one's own folders may have any. Errors
    too: missing and empty files, an image listed twice in a split, a file in two splits (by its name or by
    links). An unexpected file is a warning. decode=True also decodes every image to its end, which takes
    minutes.
    """
    result = CheckResult(dataset.name, "no published counts to compare with", extra=list(dataset.extra))
    rendered = dataset.root is not None and (Path(dataset.root) / "synthetic.json").is_file()
    if dataset.name in LAYOUTS and dataset.protocol and not rendered:
        result.expected = LAYOUTS[dataset.protocol].counts
        result.source = "counts of its own, as asked for" if dataset.subset else "as published"
    files: dict[str, dict[tuple[int, int], str]] = {}
    for split, images in dataset.splits().items():
        count, told, files[split] = count_images(images), split.replace("_", " "), {}
        result.counts[split] = count
        expected = {} if dataset.subset else result.expected.get(split, {})
        differ = [(kind, number) for kind, number in expected.items() if count[kind] != number]
        found = [f"{count[kind]:,} {kind}, expected {number:,}" for kind, number in differ]
        found += _look_at_files(images, result, files[split], decode, progress)
        result.errors += [f"{told}: {text}" for text in found]
        result.warnings = [ON_PURPOSE] if differ else result.warnings
    for (a, of_a), (b, of_b) in combinations(files.items(), 2):
        if both := sorted(of_a[file] for file in of_a.keys() & of_b.keys()):
            told = f"{a} and {b}".replace("_", " ")
            result.errors.append(f"{told}: {len(both)} images are in both: {shorten(both)}")
    if result.extra:
        result.warnings.append(f"{len(result.extra)} unexpected, left out: {shorten(result.extra)}")
    return result


def count_images(images: Images) -> dict[str, Any]:
    """{"identities": a number or None, "images": a number, "cameras": {camera: images}}."""
    cameras, counts = np.unique(images.camids[images.camids > 0], return_counts=True)
    return {
        "identities": None if images.pids is None else len(images.people()),
        "images": len(images),
        "cameras": {str(camera): int(count) for camera, count in zip(cameras, counts, strict=True)},
    }


def _look_at_files(
    images: Images, result: CheckResult, found: dict[tuple[int, int], str], decode: bool, progress: bool
) -> Iterator[str]:
    """The problems of a split's files; `found` gets the name of each, by its device and number."""
    if not len(images):
        yield "no images"
    if twice := [path for path, times in Counter(images.names).items() if times > 1]:
        yield f"{len(twice)} images are listed twice: {shorten(twice)}"
    if not isinstance(images.source, Files):
        return
    missing, empty, filled = (list[str]() for _ in range(3))
    named = zip(images.names, images.source.paths(images.rows), strict=True)
    for name, path in logs.progress(len(images), "looking at files", "image", progress, named):
        try:
            entry = os.stat(path)
        except OSError:
            missing.append(str(path))
            continue
        found[entry.st_dev, entry.st_ino] = name
        (filled if entry.st_size else empty).append(str(path))
    if missing:
        yield f"{len(missing)} images are missing: {shorten(missing)}"
    if empty:
        yield f"{len(empty)} images are empty files{images.source.advice}: {shorten(empty)}"
    problems = find_unreadable(filled, progress) if decode else {}
    yield from map(str, problems.values())
    result.missing += missing
    result.unreadable += [*empty, *problems]
