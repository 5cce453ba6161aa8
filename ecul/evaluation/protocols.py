"""Retrieval across modalities as published: SYSU-MM01, RegDB, LLCM.

`evaluate` extracts the test images once, draws the galleries of every trial and averages; what a figure
depends on (protocol, mode, draw, re-ranking) is named beside it. `eval_sysu`, `eval_regdb` and `eval_llcm`
are the parts that existing scripts call.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ecul.data.dataset import Dataset
from ecul.data.images import Images
from ecul.data.layouts import SYSU_INFRARED
from ecul.evaluation.galleries import draw_official, draw_random, folders_of, read_permutations
from ecul.evaluation.metrics import (
    eval_llcm,
    eval_regdb,
    eval_sysu,
    llcm_scores,
    regdb_scores,
    summarise,
    sysu_scores,
)
from ecul.evaluation.rerank import k_reciprocal_distances
from ecul.features import extract

__all__ = ["Results", "average", "eval_llcm", "eval_regdb", "eval_sysu", "evaluate"]

MEASURES = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")
_NAMES = ("protocol", "mode", "shots", "direction", "draw", "reranking", "trials")
_SCORES = {"sysu": sysu_scores, "regdb": regdb_scores, "llcm": llcm_scores}
_SYSU_GALLERY = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
_BLOCK = 8_000_000  # entries of the distance matrix at a time
_I2V, _V2I = "infrared-to-visible", "visible-to-infrared"
_LLCM_DRAWN_QUERIES = "visible-to-infrared (drawn queries)"
_MODES: dict[str, tuple[str, ...]] = {
    "sysu": ("all", "indoor"),
    "regdb": (_V2I, _I2V),
    "llcm": (_I2V, _V2I, _LLCM_DRAWN_QUERIES),
}


@dataclass(frozen=True)
class Results:
    """Rows of figures in percent, each `<measure>` a mean over trials beside its `<measure>_std`.

    The deviation is that of the trials themselves (`numpy.std`, not divided by n - 1).
    """

    rows: list[dict]

    def cells(self) -> tuple[str, list[list[str]]]:
        """A line of what all rows share, and a table, its head first, of the rest: mean ± deviation."""
        shared = [name for name in _NAMES if len({row[name] for row in self.rows}) == 1]
        own = [name for name in _NAMES if name not in shared]
        lines = [[*own, *MEASURES]]
        for row in self.rows:
            figures = [f"{row[name]:.2f} ± {row[name + '_std']:.2f}" for name in MEASURES]
            lines.append([str(row[name]) for name in own] + figures)
        told = [f"{self.rows[0][name]}{' trials' * (name == 'trials')}" for name in shared]
        return "; ".join([*told, "percent, mean ± deviation"]), lines

    def table(self) -> str:
        """Plain text of `cells`."""
        head, lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join([head, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)])

    def to_dict(self) -> dict:
        """What `json.dumps` takes."""
        return {"rows": self.rows}

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class _Task:
    """One row of a protocol: who asks, who answers, and who is drawn in trial t."""

    mode: str
    direction: str
    shots: str | int
    draw: str
    query: Images
    gallery: Images
    trial_rows: Callable[[int], tuple[np.ndarray, np.ndarray]]
    trials: int


def evaluate(
    model,
    dataset: Dataset,
    *,
    modes: Sequence[str] | None = None,
    shots: Sequence[int] | None = None,
    trials: int = 10,
    draw: str | os.PathLike = "random",
    rerank: bool = False,
    batch_size: int = 256,
    flip: bool = True,
    features: dict | None = None,
    progress: bool = True,
) -> Results:
    """The test piles of `dataset` under its protocol; a row a mode, figures in percent.

    modes: "sysu": "all", "indoor"; "regdb" and "llcm": "visible-to-infrared", "infrared-to-visible";
    "llcm" also "visible-to-infrared (drawn queries)", the reading in which the branch of that name asks
    with the drawn infrared images and searches all visible ones. shots: SYSU's gallery images an identity
    and camera, (1,) by default; 10 is multi-shot. draw: "random" is `random.seed(t)` for trials t = 0, 1,
    ...; otherwise the path of SYSU's official rand_perm_cam.mat. Multi-shot with "random" takes
    `random.sample` of the sorted files, all where fewer [R: the published scripts draw them unseeded].
    rerank: k-reciprocal re-ranking (k1 = 20, k2 = 6, lambda = 0.3), named in the rows.
    features: {"visible": (N, D), "infrared": (N, D)} of the test piles instead of a model (then None).
    Raises ValueError for a data set without test images, identities or protocol, or unknown modes.
    """
    tasks = _tasks(dataset, modes, shots, trials, draw)
    vectors = _vectors(model, dataset, features, batch_size, flip, progress)
    rows = []
    for task in tasks:
        query, gallery = vectors[task.query.modality], vectors[task.gallery.modality]
        measured = np.empty((task.trials, len(MEASURES)))
        for trial in range(task.trials):
            asked, searched = task.trial_rows(trial)
            values = _trial_scores(dataset.protocol, task, query, gallery, asked, searched, rerank)
            measured[trial] = _percent(values)
        names = (
            _protocol_name(dataset),
            task.mode,
            task.shots,
            task.direction,
            task.draw,
            "k-reciprocal (k1=20, k2=6, lambda=0.3)" if rerank else "no re-ranking",
            task.trials,
        )
        rows.append(_row(names, measured))
    return Results(rows)


def average(results: Iterable[Results]) -> Results:
    """The mean and deviation over several results of the same rows: RegDB's trials, or several seeds.

    A row's `trials` is then the number of results, and its deviation that of their means.
    """
    tables = [result.rows for result in results]
    if not tables or any(len(table) != len(tables[0]) for table in tables):
        raise ValueError("results: expected one or more, each with the same rows")
    rows = []
    for group in zip(*tables, strict=True):
        keys = {tuple(row[name] for name in _NAMES if name not in ("protocol", "trials")) for row in group}
        if len(keys) > 1:
            raise ValueError(f"results: the rows differ in what they measure: {sorted(keys, key=str)}")
        protocols = sorted({row["protocol"].split(" trial")[0] for row in group})
        names = [group[0][name] for name in _NAMES]
        names[0], names[-1] = " / ".join(protocols), len(group)
        rows.append(_row(names, np.array([[row[name] for name in MEASURES] for row in group])))
    return Results(rows)


def _row(names: Sequence, measured: np.ndarray) -> dict:
    row = dict(zip(_NAMES, names, strict=True))
    for name, mean, deviation in zip(MEASURES, measured.mean(0), measured.std(0), strict=True):
        row[name], row[name + "_std"] = float(mean), float(deviation)
    return row


def _percent(values: np.ndarray) -> list[float]:
    cmc, mean_precision, mean_penalty = summarise(values, 20)
    return [100 * figure for figure in (*cmc[[0, 4, 9, 19]], mean_precision, mean_penalty)]


def _protocol_name(dataset: Dataset) -> str:
    name = {"sysu": "SYSU-MM01", "regdb": "RegDB", "llcm": "LLCM"}[str(dataset.protocol)]
    return name if dataset.protocol != "regdb" or dataset.trial is None else f"{name} trial {dataset.trial}"


def _vectors(model, dataset, features, batch_size, flip, progress) -> dict[str, torch.Tensor]:
    """Unit rows of both test piles."""
    if (model is None) == (features is None):
        raise ValueError("give either a model or features={'visible': ..., 'infrared': ...}")
    if features is not None and sorted(features) != ["infrared", "visible"]:
        raise ValueError(f"features: expected the keys 'visible' and 'infrared', not {sorted(features)}")
    vectors = {}
    for modality, pile in (("visible", dataset.test_visible), ("infrared", dataset.test_infrared)):
        if features is None:
            vectors[modality] = extract(
                model, pile, modality, batch_size=batch_size, flip=flip, progress=progress
            )
            continue
        given = torch.as_tensor(features[modality]).detach().float().cpu()
        if given.ndim != 2 or len(given) != len(pile) or not torch.isfinite(given).all():
            raise ValueError(
                f"features[{modality!r}]: expected {len(pile)} finite rows, not {tuple(given.shape)}"
            )
        vectors[modality] = torch.nn.functional.normalize(given, dim=1)
    return vectors


def _tasks(dataset: Dataset, modes, shots, trials: int, draw) -> list[_Task]:
    protocol, visible, infrared = dataset.protocol, dataset.test_visible, dataset.test_infrared
    if protocol is None or visible is None or infrared is None:
        raise ValueError(f"dataset {dataset.name!r} has no test images with a protocol to evaluate with")
    modes = _MODES[protocol] if modes is None else [modes] if isinstance(modes, str) else modes
    if unknown := [mode for mode in modes if mode not in _MODES[protocol]]:
        raise ValueError(f"modes: {protocol!r} knows {', '.join(_MODES[protocol])}, not {unknown}")
    if protocol != "sysu" and (shots is not None or str(draw) != "random"):
        raise ValueError(f"shots and draw are for 'sysu', not {protocol!r}")
    if trials < 1 or any(count < 1 for count in shots or ()):
        raise ValueError(f"trials and shots: expected at least 1, not {trials} and {shots}")
    if protocol == "regdb":
        return [_regdb_task(visible, infrared, mode) for mode in modes]
    if protocol == "llcm":
        return [_llcm_task(visible, infrared, mode, trials) for mode in modes]
    shots = (1,) if shots is None else shots
    return [_sysu_task(visible, infrared, mode, count, trials, draw) for count in shots for mode in modes]


def _sysu_task(visible: Images, infrared: Images, mode: str, shots: int, trials: int, draw) -> _Task:
    asked = np.flatnonzero(np.isin(infrared.camids, SYSU_INFRARED))
    folders = folders_of(visible, _SYSU_GALLERY[mode])
    name = "random.seed(t)" if str(draw) == "random" else "rand_perm_cam.mat"
    permutations = None if str(draw) == "random" else read_permutations(draw)

    def rows(trial):
        if permutations is None:
            return asked, draw_random(folders, trial, shots)
        return asked, draw_official(permutations, visible, folders, trial, shots, draw)

    label = {1: "single-shot", 10: "multi-shot"}.get(shots, f"{shots} shots")
    return _Task(mode, _I2V, label, name, infrared, visible, rows, trials)


def _regdb_task(visible: Images, infrared: Images, mode: str) -> _Task:
    """Everything against everything."""
    query, gallery = (infrared, visible) if mode == _I2V else (visible, infrared)
    rows = np.arange(len(query)), np.arange(len(gallery))
    return _Task("all", mode, "all images", "nothing drawn", query, gallery, lambda trial: rows, 1)


def _llcm_task(visible: Images, infrared: Images, mode: str, trials: int) -> _Task:
    """One image an identity and camera is drawn on one side, all of the other side are there."""
    whole, drawn = (infrared, visible) if mode == _I2V else (visible, infrared)
    everything, folders = np.arange(len(whole)), folders_of(drawn)
    direction = _I2V if mode == _I2V else _V2I
    drawn_asks = mode == _LLCM_DRAWN_QUERIES
    query, gallery = (drawn, whole) if drawn_asks else (whole, drawn)

    def rows(trial):
        picked = draw_random(folders, trial, 1)
        return (picked, everything) if drawn_asks else (everything, picked)

    name = "drawn queries" if drawn_asks else "drawn gallery"
    return _Task(name, direction, "single-shot", "random.seed(t)", query, gallery, rows, trials)


def _trial_scores(protocol, task: _Task, query, gallery, asked, searched, rerank: bool) -> np.ndarray:
    """Scores of every query, a bounded block of the distance matrix at a time."""
    q_pids, g_pids = task.query.identities(), task.gallery.identities()
    found = gallery[torch.from_numpy(searched)]
    distances = None
    if rerank:
        distances = k_reciprocal_distances(query[torch.from_numpy(asked)], found)
    block = max(1, _BLOCK // max(1, len(searched)))
    parts = []
    for start in range(0, len(asked), block):
        rows = asked[start : start + block]
        if distances is None:
            part = -(query[torch.from_numpy(rows)] @ found.T).numpy()
        else:
            part = distances[start : start + block]
        parts.append(
            _SCORES[protocol](
                part,
                q_pids[rows],
                g_pids[searched],
                task.query.camids[rows],
                task.gallery.camids[searched],
            )
        )
    return np.concatenate(parts) if parts else np.empty((0, 3))
