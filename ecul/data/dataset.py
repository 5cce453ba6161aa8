"""Data sets: training and test images, from the field's downloads or from the user's own folders.

Only evaluation, monitors and checks read identities.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecul import MODALITIES
from ecul.common.names import did_you_mean
from ecul.data.checks import check_dataset
from ecul.data.decode import SKIP
from ecul.data.folders import find_images
from ecul.data.images import Column, Images, Pixels
from ecul.data.layouts import LAYOUTS, SPLITS, Folder
from ecul.data.pack import Files


@dataclass(frozen=True, eq=False)
class Dataset:
    """The splits of one data set: `visible`, `infrared` to train on, `test_*` to evaluate with `protocol`.

    Each split is an `Images`. trial: RegDB's. subset: other counts than the published ones are allowed.
    extra: unexpected paths. options: the options of `open_dataset` that open the same data set again.
    Errors: ValueError for an unknown protocol.
    """

    name: str
    root: str | None
    visible: Images
    infrared: Images
    test_visible: Images | None = None
    test_infrared: Images | None = None
    protocol: str | None = None
    trial: int | None = None
    subset: bool = False
    extra: tuple[str, ...] = field(default=(), repr=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.protocol not in ("sysu", "regdb", "llcm", None):
            raise ValueError(f"protocol: expected 'sysu', 'regdb', 'llcm' or None, not {self.protocol!r}")

    def splits(self) -> dict[str, Images]:
        """The existing splits, by name."""
        return {name: images for name in SPLITS if (images := getattr(self, name)) is not None}

    check = check_dataset  # (decode=False, progress=True) -> CheckResult

    @classmethod
    def from_arrays(
        cls,
        visible: Pixels,
        infrared: Pixels,
        *,
        visible_cameras: Column = None,
        infrared_cameras: Column = None,
        visible_pids: Column = None,
        infrared_pids: Column = None,
        test: "Dataset | None" = None,
        protocol: str | None = None,
        name: str = "arrays",
    ) -> "Dataset":
        """A data set in memory: uint8 N x H x W x 3 or N x H x W, NumPy or torch; cameras are optional.

        `test`: another data set from arrays, with pids: the test images. A negative pid marks a distractor,
        see `Images`. Errors: ValueError for pixels of another kind, or cameras or pids of another length.
        """
        return cls(
            name,
            None,
            Images.from_array(visible, "visible", visible_cameras, visible_pids),
            Images.from_array(infrared, "infrared", infrared_cameras, infrared_pids),
            None if test is None else test.visible,
            None if test is None else test.infrared,
            protocol,
        )

    @classmethod
    def from_folders(
        cls,
        visible: str | os.PathLike,
        infrared: str | os.PathLike,
        *,
        cameras: bool = False,
        skip_unreadable: bool = False,
        pack: bool | str | os.PathLike = True,
    ) -> "Dataset":
        """Two folders of one's own images, read with all their sub-folders; no identity is needed.

        cameras: the sub-folders of each folder are its cameras, numbered from 1 by name; clustering uses
        them. skip_unreadable: decode every image once more, and leave out and name unreadable ones; without
        it loading them is an error that names them all. pack: as in `open_dataset`.
        Errors: ValueError for a folder without images, or a folder inside the other.
        """
        places = {"visible": Path(visible).absolute(), "infrared": Path(infrared).absolute()}
        a, b = (folder.resolve() for folder in places.values())
        if a == b or a in b.parents or b in a.parents:  # its images would count in both modalities
            got = " and ".join(repr(str(folder)) for folder in places.values())
            raise ValueError(f"visible and infrared: expected two folders apart, got {got}")
        splits: dict[str, Any] = {}
        extra: list[str] = []
        for modality, folder in places.items():
            names, camids, others = find_images(folder, cameras, skip_unreadable)
            source = Files(folder, names, f"folders-{modality}", pack, SKIP)
            splits[modality] = Images(modality, names, source, camids)
            extra += [str(folder / other) for other in others]
        root = places["visible"].parent
        given = {m: str(f.relative_to(root) if f.is_relative_to(root) else f) for m, f in places.items()}
        options = {**given, "cameras": cameras, "skip_unreadable": skip_unreadable, "pack": _absolute(pack)}
        return cls("folders", str(root), **splits, extra=tuple(extra), options=options)


_SHARED: dict[str, Any] = {"subset": False, "validation": None, "pack": True}
OPTIONS = {name: {**layout.options, **_SHARED} for name, layout in LAYOUTS.items()}  # with their defaults
OPTIONS["folders"] = {**{m: m for m in MODALITIES}, "cameras": False, "skip_unreadable": False, "pack": True}


def open_dataset(name: str, root: str | os.PathLike, **options: Any) -> Dataset:
    """A data set in the folder `root`: "sysu", "regdb", "llcm" or "market" as downloaded, or "folders".

    Options, and the data sets that have them; None is the default:
    pack (all): decode each image once into `.ecul-pack` in the root, or in each of the two folders, or into
    the folder given here. False reads directly, and so does a folder that is read-only, with a warning.
    subset (all but "folders"): allow other numbers of images and people than published; evaluation then
    reports that these are not the published test images.
    validation (all but "folders"): hold out a share of the training people, such as 0.2. The network is not
    trained on them, and their images are the test images instead of the published ones.
    trial: "regdb"'s split, 1 to 10 (default 1); for "market", the sub-folder of a trial.
    protocol ("market"): evaluate as "sysu", "regdb" or "llcm".
    visible, infrared ("folders"): the two folders of `Dataset.from_folders`, inside the root or absolute, by
    default "visible" and "infrared"; cameras, skip_unreadable: as there.
    Raises ValueError that names the missing path and the expected layout, or an unknown option.
    """
    if name not in OPTIONS:
        listed = ", ".join(OPTIONS)
        raise ValueError(f"name: expected one of {listed}, not {name!r}{did_you_mean(name, OPTIONS)}")
    known = OPTIONS[name]
    for option, value in options.items():
        if option not in known:
            hint = did_you_mean(option, known)
            raise ValueError(f"{option}: no option of {name!r}{hint}; its options are {', '.join(known)}")
        if known[option] is False and not isinstance(value, bool | None):
            raise ValueError(f"{option} must be True or False, got {value!r}")
    root = Path(root).absolute()
    if not root.is_dir():
        raise ValueError(f"root: {str(root)!r} is not a folder")
    options = known | {option: value for option, value in options.items() if value is not None}
    if name in LAYOUTS:
        return _open_layout(name, root, **options)
    places = {m: str(options[m]) for m in MODALITIES}
    held = "visible/ and infrared/, or the folders that these two options name"
    Folder(root, held).require(*places.values())
    return Dataset.from_folders(**{**options, **{m: root / place for m, place in places.items()}})


def _open_layout(name: str, root: Path, subset: bool, validation: Any, pack: Any, **options: Any) -> Dataset:
    layout, trial, pack = LAYOUTS[name], options.get("trial"), _absolute(pack)
    folder, splits = Folder(root, layout.holds), {}
    found = layout.reader(folder, **options)
    for split, entries in found.items():
        if not entries:
            folder.fail(f"no image for {split.replace('_', ' ')} in {str(root)!r}")
        names, pids, camids = (list(column) for column in zip(*entries, strict=True))
        modality, label, held = split.removeprefix("test_"), f"{name}{trial or ''}-{split}", names
        if layout.shared:
            held = sorted({entry.name for part in (modality, f"test_{modality}") for entry in found[part]})
            label = f"{name}-{modality}"
        row = {path: place for place, path in enumerate(held)}
        source, rows = Files(root, held, label.replace("_", "-"), pack), [row[path] for path in names]
        splits[split] = Images(modality, names, source, camids, pids, rows)
    whole = Dataset(
        name,
        str(root),
        **splits,
        protocol=layout.protocol or options.get("protocol"),
        trial=trial,
        subset=subset,
        extra=folder.extra,
        options={**options, "subset": subset, "pack": pack},
    )
    return whole if validation is None else _hold_out(whole, validation)


def _hold_out(dataset: Dataset, share: Any) -> Dataset:
    """This data set with a share of its training people, always the same, as the test people."""
    if not isinstance(share, float) or not 0 < share < 1:
        told = "expected a share of the training people, above 0 and below 1"
        raise ValueError(f"validation: {told}, got {share!r}")
    people = np.union1d(dataset.visible.people(), dataset.infrared.people())
    held = np.random.default_rng(0).permutation(people)[: max(1, round(share * len(people)))]
    splits: dict[str, Any] = {}
    for modality in MODALITIES:
        images = getattr(dataset, modality)
        tested = np.isin(images.identities(), held)
        splits |= {modality: images.subset(~tested), f"test_{modality}": images.subset(tested)}
    return replace(dataset, **splits, subset=True, options={**dataset.options, "validation": share})


def _absolute(pack: Any) -> Any:
    """The option `pack`, with the folder that it may name as an absolute path."""
    return pack if isinstance(pack, bool) else os.path.abspath(pack)
