"""Piles of images and the data sets made of them.

`Images` is one ordered pile of one modality, `Dataset` holds the piles to train and test on, and
`open_dataset` reads the field's downloads as they are. Identities are only ever read by evaluation, by
monitors and by checks.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ecul import MODALITIES
from ecul.common.names import did_you_mean
from ecul.data import checks, folders, layouts
from ecul.data.images import Images
from ecul.data.pack import Files

PILES = ("visible", "infrared", "test_visible", "test_infrared")


@dataclass(frozen=True, eq=False)
class Dataset:
    """The piles of one data set: `visible`, `infrared` to train on, `test_*` to evaluate with `protocol`.

    Each pile is an `Images`. trial: RegDB's. subset: fewer images than published were asked for. extra: paths
    that the reader did not expect. options: what `open_dataset` needs besides name and root to open it again.
    `check()` compares all of it with what was published. Errors: ValueError for an unknown protocol or a
    pile of the other modality.
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
    options: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.protocol not in (None, "sysu", "regdb", "llcm"):
            raise ValueError(f"protocol: expected 'sysu', 'regdb', 'llcm' or None, not {self.protocol!r}")
        for name in PILES:
            pile = getattr(self, name)
            if pile is not None and pile.modality != name.removeprefix("test_"):
                raise ValueError(f"{name}: expected {name.removeprefix('test_')} images, not {pile.modality}")

    def piles(self) -> dict[str, Images]:
        """The piles that are there, by name."""
        return {name: pile for name in PILES if (pile := getattr(self, name)) is not None}

    def check(self, decode: bool = False, progress: bool = True) -> checks.Report:
        """Compare it with what was published, without raising; see `ecul.data.checks.check_images`."""
        return checks.check_images(
            self.piles(),
            name=self.name,
            root=self.root,
            protocol=self.protocol,
            subset=self.subset,
            extra=self.extra,
            decode=decode,
            progress=progress,
        )

    @classmethod
    def from_arrays(
        cls,
        visible,
        infrared,
        *,
        visible_cameras=None,
        infrared_cameras=None,
        visible_pids=None,
        infrared_pids=None,
        test: "Dataset | None" = None,
        protocol: str | None = None,
        name: str = "arrays",
    ) -> "Dataset":
        """A data set in memory: uint8 N x H x W x 3 or N x H x W, NumPy or torch; cameras are optional.

        `test`: another data set from arrays, with pids, whose images are those to evaluate on. Errors:
        ValueError for pixels of another kind, or cameras or pids of another length.
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
        visible,
        infrared,
        *,
        cameras: bool = False,
        skip_unreadable: bool = False,
        pack: bool | str | Path = True,
    ) -> "Dataset":
        """Two folders of one's own images, read with all their sub-folders; no identity is needed.

        cameras: the sub-folders of each folder are its cameras, numbered from 1 in the order of their names,
        which the clustering then tells apart. skip_unreadable: decode every image once more, to leave out
        and name those that cannot be read; otherwise loading them is an error that names them all. pack: as
        in `open_dataset`. Errors: ValueError for a folder without images, or one that lies in the other.
        """
        places = {"visible": Path(visible).absolute(), "infrared": Path(infrared).absolute()}
        folders.require_apart(*places.values())
        advice = "; skip_unreadable=True leaves such images out"
        piles, extra = {}, []
        for modality, folder in places.items():
            found, others = folders.read_folder(folder, cameras)
            if skip_unreadable:
                found = folders.only_readable(found, folder)
            source = Files(folder, found.names, f"folders-{modality}", pack, advice)
            piles[modality] = Images._of(modality, found.names, found.camids, None, source)
            extra += [str(folder / other) for other in others]
        root = places["visible"].parent
        given = {m: str(f.relative_to(root) if f.is_relative_to(root) else f) for m, f in places.items()}
        options = {**given, **_packing(pack), "cameras": cameras, "skip_unreadable": skip_unreadable}
        visible, infrared = (piles[m] for m in MODALITIES)
        return cls("folders", str(root), visible, infrared, extra=tuple(extra), options=options)


_OPTIONS = {
    "sysu": ("subset", "pack"),
    "regdb": ("trial", "subset", "pack"),
    "llcm": ("subset", "pack"),
    "market": ("trial", "protocol", "subset", "pack"),
    "folders": ("visible", "infrared", "cameras", "skip_unreadable", "pack"),
}
_FLAGS = ("subset", "cameras", "skip_unreadable")


def open_dataset(name: str, root, **options) -> Dataset:
    """A data set in the folder `root`: "sysu", "regdb", "llcm" or "market" as downloaded, or "folders".

    Options, and the data sets that have them:
    pack (all): decode each image once into `.ecul-pack` in the root, or in each of the two folders (or into
    the user's cache where that is read-only), or into the folder given here; False reads directly.
    subset (all but "folders"): allow fewer images than published.
    trial: "regdb"'s split, 1 to 10 (default 1); for "market", the sub-folder of a trial.
    protocol ("market"): whose protocol to evaluate with, "sysu", "regdb" or "llcm".
    visible, infrared ("folders"): the two folders of `Dataset.from_folders`, inside the root or absolute, by
    default "visible" and "infrared"; cameras, skip_unreadable: as there.
    Raises ValueError naming what is missing and what the layout should be, or an option that is none.
    """
    if name not in _OPTIONS:
        listed = ", ".join(_OPTIONS)
        raise ValueError(f"name: expected one of {listed}, not {name!r}{did_you_mean(name, _OPTIONS)}")
    known = _OPTIONS[name]
    for option, value in options.items():
        if option not in known:
            hint = did_you_mean(option, known)
            raise ValueError(f"{option}: no option of {name!r}{hint}; its options are {', '.join(known)}")
        if option in _FLAGS and not isinstance(value, bool):
            raise ValueError(f"{option} must be True or False, got {value!r}")
    root = Path(root).absolute()
    if not root.is_dir():
        raise ValueError(f"root: {str(root)!r} is not a folder")
    if name == "folders":
        places = {m: root / options.get(m, m) for m in MODALITIES}
        if absent := [str(folder) for folder in places.values() if not folder.is_dir()]:
            raise ValueError(
                f"root: {str(root)!r} should hold the folders visible and infrared, unless the options of "
                f"these names say otherwise; there is no {' nor '.join(absent)}"
            )
        return Dataset.from_folders(**{**options, **places})
    return _open_published(name, root, **options)


def _packing(pack) -> dict:
    """The option `pack` where it is not the default, for `Dataset.options`."""
    return {} if pack is True else {"pack": pack and os.path.abspath(pack)}


_READERS: dict[str, Callable[..., layouts.Found]] = {
    "sysu": layouts.read_sysu,
    "regdb": layouts.read_regdb,
    "llcm": layouts.read_llcm,
    "market": layouts.read_market,
}


def _open_published(name: str, root: Path, pack=True, subset=False, trial=None, protocol=None) -> Dataset:
    if name == "regdb" and trial is None:
        trial = 1
    found, extra = _READERS[name](root, trial) if name in ("regdb", "market") else _READERS[name](root)
    given = {"subset": subset or None, "trial": trial, "protocol": protocol}
    return Dataset(
        name=name,
        root=str(root),
        **_piles(root, name, trial, found, pack),
        protocol=protocol if name == "market" else name,
        trial=trial,
        subset=subset,
        extra=tuple(extra),
        options={option: value for option, value in given.items() if value is not None} | _packing(pack),
    )


def _piles(root: Path, name: str, trial, found: dict[str, layouts.Listing], pack) -> dict[str, Images]:
    """RegDB's ten trials share one source a modality, so that its images are packed once."""
    label = name if name == "regdb" or trial is None else f"{name}{trial}"
    sources = {}
    for key, listing in found.items():
        if name != "regdb":
            sources[key] = Files(root, listing.names, f"{label}-{key.replace('_', '-')}", pack)
        elif not key.startswith("test_"):
            names = sorted({*listing.names, *found["test_" + key].names})
            sources[key] = sources["test_" + key] = Files(root, names, f"{label}-{key}", pack)
    piles = {}
    for key, listing in found.items():
        row = {path: place for place, path in enumerate(sources[key].names)}
        piles[key] = Images(
            key.removeprefix("test_"),
            listing.names,
            np.array(listing.camids, np.int64),
            np.array(listing.pids, np.int64),
            sources[key],
            np.array([row[path] for path in listing.names], np.int64),
        )
    return piles
