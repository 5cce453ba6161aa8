"""Several runs side by side: a table of their settings and results, and their curves."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecul.common.distributed import choose_device
from ecul.common.names import shorten
from ecul.common.tables import render_table
from ecul.config import METHODS, Config
from ecul.evaluation.protocols import evaluate
from ecul.model import load_model
from ecul.report.pictures import Panel, draw_curves
from ecul.run.saved import SavedRun, find_trials, read_run

log = logging.getLogger("ecul")
PANELS = (  # of the curves: title, beginning of the names in the log, and how several values become one
    ("label-free score", "score", np.mean),
    ("sum of the losses", "loss_", np.sum),
    ("adjusted Rand index (reads identities)", "monitor_", np.mean),
    ("mAP of the validation people", "validation_mAP", np.mean),
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed or trial alone.

    settings: the ones that differ between groups. figures: one value for each run under each heading.
    caution: a reason not to compare the accuracy.
    """

    runs: tuple[SavedRun, ...]
    settings: dict[str, Any]
    figures: dict[str, list[float]]
    caution: str = ""

    def row(self) -> dict[str, Any]:
        """Every figure, unrounded, beside the deviation over the runs."""
        row = {"runs": " ".join(str(run.directory) for run in self.runs), "n": len(self.runs)}
        row |= {**self.settings, "caution": self.caution}
        for heading, values in self.figures.items():
            row |= {heading: float(np.mean(values)), f"{heading} std": float(np.std(values))}
        return row

    def __str__(self) -> str:
        n = f" (n = {len(self.runs)})" if len(self.runs) > 1 else ""
        return shorten([str(run.directory) for run in self.runs], 1) + n


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, a `Group` a row."""

    groups: list[Group]

    def table(self, form: str = "text") -> str:
        """As "text", "markdown" or "latex": mean ± deviation; as "csv" or "json" every figure, unrounded."""
        settings = list(self.groups[0].settings)
        headings = list(dict.fromkeys(name for group in self.groups for name in group.figures))
        lines = [["run", *settings, *headings]]
        for group in self.groups:
            lines.append([str(group), *(str(group.settings[name]) for name in settings)])
            lines[-1] += [_told(heading, group.figures.get(heading, [])) for heading in headings]
        told = [*sorted({group.caution for group in self.groups} - {""}), "accuracy in percent"]
        told.append("mean ± deviation over runs that differ in seed or trial")
        return render_table(form, "; ".join(told), lines, [group.row() for group in self.groups])

    __str__ = table

    def draw(self, path: str | Path) -> None:
        """Write the curves of all groups in the same axes as a PNG."""
        panels = []
        for title, prefix, gather in PANELS:
            curves = {}
            for group in self.groups:
                told = shorten([str(group), *(f"{k} {v}" for k, v in group.settings.items())], 5)
                curves[told] = _curves(group, prefix, gather)
            if any(np.isfinite(values).any() for values in curves.values()):
                panels.append(Panel(title, "", curves))
        draw_curves(path, panels)


def compare(
    runs: Iterable[str | Path], *, root: str | Path | None = None, device: str | torch.device | None = None
) -> Comparison:
    """Compare the runs in these directories; all trials in a directory count, each as a run.

    Runs that differ in seed or trial alone are one row. Accuracy follows the published protocol. It needs the
    data set at its place in training or in `root`. Score and time come from the log. device: by default the
    GPU when there is one. Errors: ValueError for a directory that is no run.
    """
    groups: dict[str, list[SavedRun]] = {}
    for run in (read_run(path) for given in runs for path in find_trials(given)):
        groups.setdefault(json.dumps(_settings(run)), []).append(run)
    if not groups:
        raise ValueError("runs: expected one or more run directories")
    settings, place = [json.loads(own) for own in groups], choose_device(device)
    differ = _differing(settings)
    pairs = zip(settings, groups.values(), strict=True)
    return Comparison([_group(group, {n: own.get(n) for n in differ}, root, place) for own, group in pairs])


def _settings(run: SavedRun) -> dict[str, Any]:
    """The settings of a run without its seed, trial and paths: runs that share them are repetitions."""
    every = {"dataset": run.dataset["dataset"], **run.dataset["options"], **run.config.to_dict()}
    every["epochs done"] = len(run.history)
    return {name: value for name, value in every.items() if name not in ("trial", "pack", "seed")}


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that differ, without those for which every run has its method's own value."""
    presets = {method: Config.preset("sysu", method).to_dict() for method in METHODS}
    found = []
    for name in dict.fromkeys(name for own in settings for name in own):
        own_value = all(own.get(name) == presets[own["method"]].get(name, ...) for own in settings)
        differs = len({json.dumps(own.get(name)) for own in settings}) > 1
        if differs and (name == "method" or not own_value):
            found.append(name)
    return found


def _group(runs: Sequence[SavedRun], settings: dict, root: str | Path | None, device: torch.device) -> Group:
    """The figures of runs; without accuracy, with a warning, where images, identities or a protocol lack."""
    figures: dict[str, list[float]] = {}
    results = []
    for run in runs:
        held = {"validation": None} if run.options.get("validation") else {}  # not the people held out
        try:
            results.append(evaluate(load_model(run.directory).to(device), run.open(root, **held)))
        except (ValueError, OSError) as e:
            log.warning("%s: no accuracy: %s", run.directory, e)
    for label, row in (pair for found in results for pair in zip(found.labels(), found.rows, strict=True)):
        for heading, measure in (("Rank-1", "rank1"), ("mAP", "mAP")):
            if row[measure] is not None:
                figures.setdefault(f"{label} {heading}".strip(), []).append(row[measure])
    cautions = {row["caution"] for found in results for row in found.rows} - {""}
    if 0 < len(results) < len(runs):
        cautions.add(f"accuracy of {len(results)} of {len(runs)} runs")
    figures["score"] = [run.history[-1]["score"] for run in runs]
    figures["minutes"] = [sum(row["seconds"] for row in run.history) / 60 for run in runs]
    return Group(tuple(runs), settings, figures, "; ".join(sorted(cautions)))


def _told(heading: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = {"score": 3, "minutes": 1}.get(heading, 2)
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values):.{digits}f}"


def _curves(group: Group, prefix: str, gather: Callable) -> np.ndarray:
    """(runs, epochs): the values in the log whose names begin so, NaN where there are none."""
    table = np.full((len(group.runs), max(len(run.history) for run in group.runs)), np.nan)
    for line, run in zip(table, group.runs, strict=True):
        for row in run.history:
            if values := [value for name, value in row.items() if name.startswith(prefix)]:
                line[row["epoch"]] = gather(values)
    return table
