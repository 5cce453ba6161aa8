"""Retrieval across modalities as published: SYSU-MM01, RegDB, LLCM (METHOD §7).

`evaluate` extracts the test images once, draws the galleries of every trial and averages; what a figure
depends on (protocol, mode, draw, re-ranking) is named beside it. `eval_sysu`, `eval_regdb` and `eval_llcm`
are the parts that existing scripts call.
"""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from ecul.data import Dataset, Images
from ecul.metrics import (
    eval_llcm,
    eval_regdb,
    eval_sysu,
    llcm_scores,
    regdb_scores,
    summarise,
    sysu_scores,
)
from ecul.readers import SYSU_INFRARED
from ecul.rerank import k_reciprocal_distances

__all__ = ["Results", "average", "eval_llcm", "eval_regdb", "eval_sysu", "evaluate"]

MEASURES = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")
_NAMES = ("protocol", "mode", "shots", "direction", "draw", "reranking", "trials")
_SCORES = {"sysu": sysu_scores, "regdb": regdb_scores, "llcm": llcm_scores}
_SYSU_GALLERY = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
_I2V, _V2I = "infrared-to-visible", "visible-to-infrared"
_MODES = {
    "sysu": ("all", "indoor"),
    "regdb": (_V2I, _I2V),
    "llcm": (_I2V, _V2I, "visible-to-infrared (sampled queries)"),
}


@dataclass(frozen=True)
class Results:
    """Rows of figures in percent, each `<measure>` a mean over trials beside its `<measure>_std`.

    The deviation is that of the trials themselves (`numpy.std`, not divided by n - 1).
    """

    rows: list[dict]

    def table(self) -> str:
        """Plain text: what was measured, then the figures."""
        head = [*_NAMES, *MEASURES]
        lines = [head]
        for row in self.rows:
            figures = [f"{row[name]:.2f} ± {row[name + '_std']:.2f}" for name in MEASURES]
            lines.append([str(row[name]) for name in _NAMES] + figures)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

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
    "llcm" also "visible-to-infrared (sampled queries)", the reading in which the branch of that name asks
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
    """The mean and deviation over several results of the same rows: RegDB's trials, or several seeds."""
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
        names[0], names[-1] = " / ".join(protocols), f"{len(group)} models"
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
    vectors = {}
    for modality, pile in (("visible", dataset.test_visible), ("infrared", dataset.test_infrared)):
        if features is None:
            from ecul.features import extract

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
    protocol = dataset.protocol
    if protocol is None or dataset.test_visible is None or dataset.test_infrared is None:
        raise ValueError(f"dataset {dataset.name!r} has no test images with a protocol to evaluate with")
    if dataset.test_visible.pids is None or dataset.test_infrared.pids is None:
        raise ValueError(
            f"dataset {dataset.name!r}: evaluation needs the identities (pids) of the test images"
        )
    modes = _MODES[protocol] if modes is None else [modes] if isinstance(modes, str) else modes
    if unknown := [mode for mode in modes if mode not in _MODES[protocol]]:
        raise ValueError(f"modes: {protocol!r} knows {', '.join(_MODES[protocol])}, not {unknown}")
    if protocol != "sysu" and (shots is not None or str(draw) != "random"):
        raise ValueError(f"shots and draw are for 'sysu', not {protocol!r}")
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, not {trials}")
    if protocol == "sysu":
        shots = (1,) if shots is None else shots
        return [_sysu_task(dataset, mode, count, trials, draw) for count in shots for mode in modes]
    return [_crossed_task(dataset, mode, trials) for mode in modes]


def _sysu_task(dataset: Dataset, mode: str, shots: int, trials: int, draw) -> _Task:
    query, gallery = dataset.test_infrared, dataset.test_visible
    asked = np.flatnonzero(np.isin(query.camids, SYSU_INFRARED))
    folders = _folders(gallery, _SYSU_GALLERY[mode])
    if str(draw) == "random":
        name = "random.seed(t)"

        def drawn(trial):
            return _draw(folders, trial, shots)
    else:
        name = "rand_perm_cam.mat"
        permutations = _read_permutations(draw)

        def drawn(trial):
            return _draw_official(permutations, gallery, folders, trial, shots, draw)

    label = {1: "single", 10: "multi"}.get(shots, shots)
    return _Task(mode, _I2V, label, name, query, gallery, lambda trial: (asked, drawn(trial)), trials)


def _crossed_task(dataset: Dataset, mode: str, trials: int) -> _Task:
    """RegDB: everything against everything. LLCM: one image an identity and camera is drawn on one side."""
    query, gallery = dataset.test_visible, dataset.test_infrared
    if mode == _I2V:
        query, gallery = gallery, query
    direction = _I2V if mode == _I2V else _V2I
    everything = np.arange(len(query)), np.arange(len(gallery))
    if dataset.protocol == "regdb":
        return _Task("all", direction, "all", "all images", query, gallery, lambda trial: everything, 1)
    if "sampled queries" not in mode:
        folders = _folders(gallery)
        return _Task(
            "sampled gallery",
            direction,
            "single",
            "random.seed(t)",
            query,
            gallery,
            lambda trial: (everything[0], _draw(folders, trial, 1)),
            trials,
        )
    folders = _folders(gallery)
    return _Task(
        "sampled queries",
        direction,
        "single",
        "random.seed(t)",
        gallery,
        query,
        lambda trial: (_draw(folders, trial, 1), everything[0]),
        trials,
    )


def _folders(images: Images, cameras: Sequence[int] | None = None) -> list[np.ndarray]:
    """Rows of each (identity, camera), in the published order: 4-digit identity, camera, file name."""
    chosen = range(len(images)) if cameras is None else np.flatnonzero(np.isin(images.camids, cameras))

    def place(row):
        return f"{images.pids[row]:04d}", int(images.camids[row])

    ordered = sorted(chosen, key=lambda row: (*place(row), os.path.basename(images.names[row])))
    return [np.array(list(rows)) for _, rows in groupby(ordered, place)]


def _draw(folders: list[np.ndarray], trial: int, shots: int) -> np.ndarray:
    """`random.seed(trial)`, then one choice (or a sample of `shots`) a folder."""
    generator = random.Random(trial)
    if shots == 1:
        return np.array([generator.choice(rows) for rows in folders], np.int64)
    picked = [generator.sample(list(rows), min(shots, len(rows))) for rows in folders]
    return np.array([row for rows in picked for row in rows], np.int64)


def _read_permutations(path) -> list[np.ndarray]:
    """rand_perm_cam.mat: six cells (a camera) of cells (an identity) of (trials, images) 1-based numbers."""
    from scipy.io import loadmat

    try:
        cameras = loadmat(path)["rand_perm_cam"].ravel()
        permutations = [np.atleast_1d(camera.squeeze()) for camera in cameras]
        good = len(permutations) == 6 and all(
            camera.dtype == object and all(np.ndim(cell) == 2 for cell in camera) for camera in permutations
        )
    except Exception as error:  # scipy raises whatever its parser meets
        raise ValueError(f"draw: {str(path)!r} cannot be read as rand_perm_cam.mat: {error!r}") from error
    if not good:
        raise ValueError(
            f"draw: {str(path)!r}: rand_perm_cam should be 6 cells (cameras) of cells (identities) of "
            "matrices (trials x images)"
        )
    return permutations


def _draw_official(permutations, gallery: Images, folders, trial: int, shots: int, path) -> np.ndarray:
    """The first `shots` numbers of the trial's permutation, taken as file numbers within each folder."""
    drawn = []
    for rows in folders:
        pid, camid = int(gallery.pids[rows[0]]), int(gallery.camids[rows[0]])
        identities = permutations[camid - 1]
        cell = identities[pid - 1] if pid <= len(identities) else np.empty((0, 0))
        if len(cell) <= trial or not cell.shape[1]:
            raise ValueError(f"draw: {str(path)!r} has no trial {trial} for identity {pid} in camera {camid}")
        numbers = cell[trial, :shots].astype(int)
        if numbers.min() < 1 or numbers.max() > len(rows):
            raise ValueError(
                f"draw: {str(path)!r} asks for image {numbers.max()} of identity {pid} in camera {camid}, "
                f"which has {len(rows)}"
            )
        drawn += [rows[number - 1] for number in numbers]
    return np.array(drawn, np.int64)


def _trial_scores(protocol, task: _Task, query, gallery, asked, searched, rerank: bool) -> np.ndarray:
    """Scores of every query, a bounded block of the distance matrix at a time."""
    asked = asked[np.argsort(task.query.pids[asked], kind="stable")]
    found = gallery[torch.from_numpy(searched)]
    distances = None
    if rerank:
        distances = k_reciprocal_distances(query[torch.from_numpy(asked)], found)
    block = max(1, 8_000_000 // max(1, len(searched)))
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
                task.query.pids[rows],
                task.gallery.pids[searched],
                task.query.camids[rows],
                task.gallery.camids[searched],
            )
        )
    return np.concatenate(parts) if parts else np.empty((0, 3))
