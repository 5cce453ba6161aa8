"""A finished or stopped run as its directory tells of it: for reports, comparisons and evaluation.

Runs of several trials of a data set lie together, as `trial-1`, `trial-2`, ... in one directory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecul.common.pretrained import weights_file
from ecul.config import Config
from ecul.data.dataset import Dataset, open_dataset
from ecul.run.checkpoint import read_about, read_log
from ecul.trainset import dataset_fingerprint


@dataclass(frozen=True)
class SavedRun:
    """What a run directory says of itself: its configuration, its log, and its data set."""

    directory: Path
    config: Config
    history: list[dict]
    dataset: dict

    @property
    def options(self) -> dict[str, Any]:
        """Those of the data set, but for a place of `pack`: where to write is never a run's to say."""
        options = self.dataset["options"]
        return {name: value for name, value in options.items() if name != "pack" or value is False}

    def options_of(self, dataset: str) -> dict[str, Any]:
        """`options` for a data set of this name; none where the run was trained on one of another."""
        return self.options if self.dataset["dataset"] == dataset else {}

    def open(self, root: str | Path | None = None, options: dict | Iterable[tuple[str, Any]] = ()) -> Dataset:
        """The data set of the run with its options and these, from where it lay or from `root`.

        Errors: ValueError where it is no more.
        """
        known = self.dataset
        if known["root"] is None:
            raise ValueError("the images were in memory; in Python, report(run, dataset) takes them")
        kept = self.options | ({"pack": False} if root is None else {})
        root = root or known["root"]
        if root == known["root"] and not Path(root).is_dir():
            raise ValueError(f"the images are no longer at {root}; --root (root=) names their folder")
        return open_dataset(known["dataset"], root, **{**kept, **dict(options)})

    def require_same(self, dataset: Dataset) -> None:
        """A ValueError naming what differs, unless the run was trained on this data set."""
        differs = [
            f"{name} is {value!r}, in training it was {self.dataset[name]!r}"
            for name, value in dataset_fingerprint(dataset).items()
            if self.dataset.get(name, value) != value
        ]
        if differs:
            raise ValueError(
                f"dataset: not the one that {self.directory} was trained on: {'; '.join(differs)}"
            )


def read_run(directory: str | Path) -> SavedRun:
    """Read a run directory. Errors: ValueError for a directory that `train` did not write."""
    directory = Path(directory)
    try:
        about, history = read_about(directory), read_log(directory)
    except OSError as e:
        raise ValueError(f"{directory} is no run directory ({e})") from e
    return _saved(directory, about, history)


def _saved(directory: Path, about: dict, history: list[dict]) -> SavedRun:
    dataset = {"root": about["root"], "options": about["options"], **about["dataset"]}
    return SavedRun(directory, about["config"], history, dataset)


def find_run(path: str | Path) -> SavedRun | None:
    """The run of a run directory, or of the weights in one; None where there is none, as of a model that was
    imported. It needs no log."""
    directory = weights_file(path).parent
    if not (directory / "resume.json").is_file():
        return None
    about = read_about(directory)
    return _saved(directory, about, about["history"])


def trial_directory(output: str | Path, trial: int | None) -> Path:
    """Where the run of one trial lies among those of the others; None: there is one run alone."""
    return Path(output) if trial is None else Path(output) / f"trial-{trial}"


def find_trials(path: str | Path) -> list[Path]:
    """The runs of all trials in a directory, by number; the path alone where it is a run or a model."""
    path = Path(path)
    numbers = [p.name.removeprefix("trial-") for p in path.glob("trial-*/")]
    found = [trial_directory(path, n) for n in sorted(int(n) for n in numbers if n.isdecimal())]
    return [path] if (path / "model.safetensors").exists() or not found else found


def trained_trial(run: SavedRun | None, dataset: str, trial: int | None) -> int | None:
    """The trial of `dataset` to evaluate a model on: the one that its run (`find_run`) knows, else this one.

    Errors: ValueError for another one than the run knows: some of its test people were trained on.
    """
    trained = None if run is None else run.options_of(dataset).get("trial")
    if run is None or trained is None:
        return trial
    if trial not in (None, trained):
        raise ValueError(
            f"{run.directory} was trained on trial {trained}, which holds test people of trial {trial}; "
            "leave the trial away, or give the model of that trial"
        )
    return trained
