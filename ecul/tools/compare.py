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
from ecul.config import METHODS
from ecul.evaluation.protocols import Results, evaluate
from ecul.model import load_model
from ecul.report.pictures import Curve, Panel, draw_curves
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
        settings = list(dict.fromkeys(name for group in self.groups for name in group.settings))
        headings = list(dict.fromkeys(name for group in self.groups for name in group.figures))
        lines = [["run", *settings, *headings]]
        for group in self.groups:
            lines.append([str(group), *(str(group.settings[name]) for name in settings)])
            lines[-1] += [_told(heading, group.figures.get(heading, [])) for heading in headings]
        cautions = sorted({group.caution for group in self.groups} - {""})
        several = any(len(group.runs) > 1 for group in self.groups)
        spread = ["mean ± deviation over runs that differ in seed or trial"] if several else ["a run a row"]
        measured = ["accuracy in percent"] if any("mAP" in heading for heading in headings) else []
        head = "; ".join([*cautions, *measured, *spread])
        return render_table(form, head, lines, [group.row() for group in self.groups])

    __str__ = table

    def draw(self, path: str | Path) -> None:
        """Write the curves of all groups in the same axes as a PNG."""
        panels = []
        for title, prefix, gather in PANELS:
            curves = []
            for number, group in enumerate(self.groups):
                told = shorten([str(group), *(f"{k} {v}" for k, v in group.settings.items())], 5)
                look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
                curves.append(Curve(told, _curves(group, prefix, gather), look))
            if any(np.isfinite(curve.values).any() for curve in curves):
                panels.append(Panel(title, "", curves))
        draw_curves(path, panels, shared=True)


def compare(
    runs: Iterable[str | Path], *, root: str | Path | None = None, device: str | torch.device | None = None
) -> Comparison:
    """Compare the runs in these directories; all trials in a directory count, each as a run.

    Runs that differ in seed or trial alone are one row. Accuracy follows the published protocol. It needs the
    data set at its place in training or in `root`. Score and time come from the log. device: by default the
    GPU when there is one. Errors: ValueError for a directory that is no run, or a run without an epoch.
    """
    groups: dict[str, list[SavedRun]] = {}
    for run in (read_run(path) for given in runs for path in find_trials(given)):
        if not run.history:
            raise ValueError(f"{run.directory}: the run has not finished an epoch yet")
        groups.setdefault(json.dumps(_settings(run)), []).append(run)
    if not groups:
        raise ValueError("runs: expected one or more run directories")
    settings, place = [json.loads(own) for own in groups], choose_device(device)
    differ = _differing(settings)
    pairs = zip(settings, groups.values(), strict=True)
    return Comparison([_group(group, {n: own.get(n) for n in differ}, root, place) for own, group in pairs])


def _settings(run: SavedRun) -> dict[str, Any]:
    """The settings of a run without its seed, trial and paths: runs that share them are repetitions."""
    options = {k: v for k, v in run.dataset["options"].items() if k not in ("trial", "pack")}
    config = {k: v for k, v in run.config.to_dict().items() if k != "seed"}
    return {"dataset": run.dataset["dataset"], **options, **config, "epochs done": len(run.history)}


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that differ within a method, or that differ and were not set by the methods."""
    texts = [{name: json.dumps(value) for name, value in own.items()} for own in settings]
    presets = {json.dumps(m): {k: json.dumps(v) for k, v in own.items()} for m, own in METHODS.items()}
    found = []
    for name in dict.fromkeys(name for own in texts for name in own):
        beyond = [own for own in texts if own.get(name) != presets[own["method"]].get(name, ...)]
        within = [[own for own in texts if own["method"] == method] for method in presets]
        if any(len({own.get(name) for own in runs}) > 1 for runs in (beyond, *within)):
            found.append(name)
    return found


def _group(runs: Sequence[SavedRun], settings: dict, root: str | Path | None, device: torch.device) -> Group:
    figures: dict[str, list[float]] = {}
    results = [found for run in runs if (found := accuracy(run, root, device)) is not None]
    for found in results:
        for label, row in zip(found.labels(), found.rows, strict=True):
            for heading, measure in (("Rank-1", "rank1"), ("mAP", "mAP")):
                if row[measure] is not None:
                    figures.setdefault(f"{label} {heading}".strip(), []).append(row[measure])
    cautions = {row["caution"] for found in results for row in found.rows} - {""}
    if 0 < len(results) < len(runs):
        cautions.add(f"accuracy of {len(results)} of {len(runs)} runs")
    figures["score"] = [run.history[-1]["score"] for run in runs]
    figures["minutes"] = [sum(row["seconds"] for row in run.history) / 60 for run in runs]
    return Group(tuple(runs), settings, figures, "; ".join(sorted(cautions)))


def accuracy(run: SavedRun, root: str | Path | None, device: torch.device) -> Results | None:
    """The protocol's figures of a run; None, with a warning, without images, identities or protocol."""
    try:
        held = {"validation": None} if run.options.get("validation") else {}  # not the people held out
        return evaluate(load_model(run.directory).to(device), run.open(root, **held))
    except (ValueError, OSError) as e:
        log.warning("%s: no accuracy: %s", run.directory, e)
        return None


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
