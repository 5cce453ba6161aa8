"""A run as its directory describes it: its settings, its history, its data set.

Runs of several trials of a data set lie together, as `trial-1`, `trial-2`, ... in one directory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ecul.common.files import reading
from ecul.common.pretrained import weights_file
from ecul.common.weights import read_metadata
from ecul.config import Config
from ecul.data.dataset import Dataset, open_dataset
from ecul.trainset import dataset_fingerprint

FILE = "resume.safetensors"  # of a run directory; its metadata hold what a `SavedRun` is made of


@dataclass(frozen=True)
class SavedRun:
    """What a run directory says of itself.

    history: a dict an epoch. dataset: `dataset_fingerprint`, and "root" and "options", with which it was
    opened. model: its class under "architecture", and its settings.
    """

    directory: Path
    config: Config
    history: list[dict]
    dataset: dict
    model: dict

    @property
    def options(self) -> dict[str, Any]:
        """The data set's options. Where to write a pack is not for a run to say."""
        options = self.dataset["options"]
        return {name: value for name, value in options.items() if name != "pack" or value is False}

    def options_for(self, dataset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options to open the data set of this name with: those of the training, then the given ones.

        Errors: ValueError for another trial than the run's: some of its test people were trained on.
        """
        known = self.options if self.dataset["dataset"] == dataset else {}
        trial, trained = given.get("trial"), known.get("trial")
        if None not in (trial, trained) and trial != trained:
            raise ValueError(
                f"{self.directory} was trained on trial {trained}, which holds test people of trial {trial}; "
                "leave out the trial, or give the model of that trial"
            )
        return {**known, **given}

    def open(self, root: str | Path | None = None, **options: Any) -> Dataset:
        """The run's data set with its options and these, from where it lay or from `root`.

        Errors: ValueError where it is no longer there.
        """
        known = self.dataset["root"]
        if known is None:
            raise ValueError("the images were in memory; in Python, report(run, dataset) takes them")
        kept = self.options | ({"pack": False} if root is None else {})
        if root in (None, known) and not Path(known).is_dir():
            raise ValueError(f"the images are no longer at {known}; --root (root=) names their folder")
        return open_dataset(self.dataset["dataset"], root or known, **{**kept, **options})

    def require_same(self, dataset: Dataset) -> None:
        """A ValueError that names what differs, unless the run was trained on this data set."""
        now, then = dataset_fingerprint(dataset), self.dataset
        told = [f"{k} is {v!r}, in training it was {then[k]!r}" for k, v in now.items() if then[k] != v]
        if told:
            raise ValueError(f"dataset: not the one that {self.directory} was trained on: {'; '.join(told)}")


def parse_run(directory: Path, metadata: Mapping[str, str]) -> SavedRun:
    """The run that the metadata of its resume.safetensors describe; call it in a block of `reading`."""
    about = json.loads(metadata["run"])
    for number, row in enumerate(about["history"]):
        if row["epoch"] != number or row["stage"] not in (1, 2) or not all(map(isfinite, row.values())):
            raise ValueError(f"its history has no row of numbers for epoch {number}")
    dataset, where = about["dataset"], (about["dataset"]["root"] or "", about["dataset"]["dataset"])
    if not isinstance(dataset["options"], dict) or not all(isinstance(text, str) for text in where):
        raise ValueError("its data set has no name, root and options")
    return SavedRun(directory, Config.from_dict(about["config"]), about["history"], dataset, about["model"])


def find_run(path: str | Path) -> SavedRun | None:
    """The run of a run directory, or of the weights in one; None for weights alone, as after an import."""
    directory = weights_file(path).parent
    if not (directory / FILE).is_file():
        return None
    with reading(directory / FILE):
        return parse_run(directory, read_metadata(directory / FILE))


def read_run(directory: str | Path) -> SavedRun:
    """The run of a directory. Errors: ValueError for a directory that `train` did not write."""
    run = find_run(Path(directory) / FILE)
    if run is None:
        raise ValueError(f"{directory} is no run directory: it has no {FILE}")
    return run


def trial_directory(output: str | Path, trial: int | None) -> Path:
    """Where the run of one trial lies among those of the others; None: there is one run alone."""
    return Path(output) if trial is None else Path(output) / f"trial-{trial}"


def find_trials(path: str | Path) -> list[Path]:
    """The runs of all trials in a directory, by number; the path alone where it is a run or a model."""
    path = Path(path)
    numbers = [p.name.removeprefix("trial-") for p in path.glob("trial-*/")]
    found = [trial_directory(path, n) for n in sorted(int(n) for n in numbers if n.isdecimal())]
    return [path] if (path / "model.safetensors").exists() or not found else found
