"""Retrieval across modalities as published: SYSU-MM01, RegDB, LLCM.

`evaluate` extracts the test images once, draws the galleries of every trial and averages. Each row of the
results names its protocol, mode, draw and re-ranking.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch

from ecul import MODALITIES
from ecul.common import logs
from ecul.common.arrays import as_tensor, check_sizes
from ecul.common.names import did_you_mean
from ecul.common.tables import render_table
from ecul.data.dataset import Dataset
from ecul.data.images import Images
from ecul.data.layouts import LAYOUTS
from ecul.evaluation.galleries import draw_random, group_rows, read_draw
from ecul.evaluation.metrics import score_queries, summarise
from ecul.evaluation.rerank import RERANKINGS, reranked
from ecul.features import extract

log = logging.getLogger("ecul")
MEASURES = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")
_NAMES = ("protocol", "caution", "mode", "shots", "direction", "draw", "reranking", "trials")
_ALL = {"shots": "all images", "draw": "nothing drawn"}
_I2V, _V2I = "infrared-to-visible", "visible-to-infrared"


class _Mode(NamedTuple):
    """A mode of a protocol: its names, who queries, the side that is drawn, the cameras of the gallery."""

    name: str
    direction: str
    query: str = "infrared"
    drawn: str = "gallery"  # `shots` images of each identity and camera; "": all images
    cameras: tuple[int, ...] = ()  # (): all


_PROTOCOLS = {  # the name in the results, and the modes
    "sysu": ("SYSU-MM01", {"all": _Mode("all", _I2V), "indoor": _Mode("indoor", _I2V, cameras=(1, 2))}),
    "regdb": ("RegDB", {
        _V2I: _Mode("all", _V2I, "visible", drawn=""),
        _I2V: _Mode("all", _I2V, drawn=""),
    }),
    "llcm": ("LLCM", {
        _I2V: _Mode("drawn gallery", _I2V),
        _V2I: _Mode("drawn gallery", _V2I, "visible"),
        f"{_V2I} (drawn queries)": _Mode("drawn queries", _V2I, drawn="query"),
    }),
}  # fmt: skip


class _Row(NamedTuple):
    """A row of the results: its names, its images, and the rows of both in each trial."""

    names: dict[str, str]
    query: Images
    gallery: Images
    trials: list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Results:
    """Rows of figures in percent: each measure is a mean over trials, with its deviation, `<measure>_std`.

    The deviation is `numpy.std` of the trials (not divided by n - 1). Figures are None in a row in which no
    query has a match. A row's `caution` is empty, or says why its figures cannot be compared with published
    ones: another number of test images.
    """

    rows: list[dict]

    def labels(self) -> list[str]:
        """The names in which the rows differ, for each row; empty for a single row."""
        return [" ".join(str(row[name]) for name in self._own()) for row in self.rows]

    def _own(self) -> list[str]:
        return [name for name in _NAMES if len({row[name] for row in self.rows}) > 1]

    def cells(self) -> tuple[str, list[list[str]]]:
        """A line with the names that all rows share, and a table of the others, its head first.

        Figures are mean ± deviation over trials; the figure alone for one trial; "-" where there is none.
        """
        own = self._own()
        lines = [[*own, *MEASURES]]
        for row in self.rows:
            figures = ["-" if row[name] is None else f"{row[name]:.2f}" for name in MEASURES]
            if row["trials"] > 1 and row["mAP"] is not None:
                spread = [f" ± {row[name + '_std']:.2f}" for name in MEASURES]
                figures = list(map(add, figures, spread))
            lines.append([str(row[name]) for name in own] + figures)
        several = any(row["trials"] > 1 for row in self.rows)
        shared = {name: str(self.rows[0][name]) for name in _NAMES if name not in own}
        if "trials" in shared:
            shared["trials"] = f"{shared['trials']} trials" if several else "one trial"
        told = [*filter(None, shared.values()), "percent, mean ± deviation" if several else "percent"]
        return "; ".join(told), lines

    def table(self, form: str = "text") -> str:
        """`cells` as "text", "markdown" or "latex"; as "csv" or "json" every figure, unrounded."""
        return render_table(form, *self.cells(), self.rows)

    __str__ = table


def check_validation(dataset: Dataset, every: Any) -> None:
    """Errors: ValueError for no number of epochs, no images to evaluate on, or the published test images."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(f"validate: expected a number of epochs, got {every!r}")
    if every:
        _plan(dataset, None, None, 1, "random")
    if every and dataset.root is not None and not dataset.options.get("validation"):
        raise ValueError(
            "validate: these are the published test images, which no choice may depend on; open the data set "
            "with validation=0.2 (--option validation=0.2), which holds out a fifth of the training people"
        )


def validation_figures(model: Any, dataset: Dataset) -> dict[str, float]:
    """Rank-1 and mAP of the protocol's first mode, for the reader of a log; nothing selects by them."""
    mode = next(iter(_PROTOCOLS[str(dataset.protocol)][1]))
    row = evaluate(model, dataset, modes=mode, progress=False).rows[0]
    return {f"validation_{name}": row[name] for name in ("rank1", "mAP") if row[name] is not None}


@torch.autocast("cpu", enabled=False)
def evaluate(
    model: Any,
    dataset: Dataset,
    *,
    modes: str | Sequence[str] | None = None,
    shots: int | Sequence[int] | None = None,
    trials: int = 10,
    draw: str | os.PathLike = "random",
    rerank: bool | str | None = False,
    batch_size: int = 256,
    flip: bool = True,
    features: dict | None = None,
    progress: bool = True,
) -> Results:
    """Evaluate the test images of `dataset` under its protocol; a row for each mode, figures in percent.

    modes: "sysu": "all", "indoor"; "regdb" and "llcm": "visible-to-infrared", "infrared-to-visible"; "llcm"
    also "visible-to-infrared (drawn queries)": as in the published branch of that name, drawn infrared images
    query all visible ones.
    shots: SYSU's gallery images of each identity and camera, 1 by default; 10 is multi-shot, (1, 10) gives
    rows of both. draw: "random" is `random.seed(t)` for trials t = 0, 1, ...; otherwise the path of SYSU's
    official rand_perm_cam.mat. Multi-shot with "random" takes `random.sample` of the sorted files, all where
    there are fewer [R: the published scripts draw them unseeded].
    rerank: "k-reciprocal" (or True) or "modality", see `ecul.evaluation.rerank`; the rows name it.
    features: {"visible": (N, D), "infrared": (N, D)} of the test images, instead of a model (then None).
    A row in which no query has a match is empty (None), with a warning.
    Raises ValueError for a data set without test images, identities or protocol, unknown modes or
    re-ranking, trials or shots that are not whole numbers of at least 1, before any image is read.
    """
    plan = _plan(dataset, modes, shots, trials, draw)
    name = "k-reciprocal" if rerank is True else rerank or None
    if name is not None and name not in RERANKINGS:
        raise ValueError(f"rerank: expected {', '.join(RERANKINGS)}, True or False, not {rerank!r}")
    reranking = "no re-ranking" if name is None else f"{name} ({RERANKINGS[name]})"
    vectors = _unit_rows(model, dataset, features, batch_size, flip, progress)
    rows = []
    for row in plan:
        drawn = logs.progress(len(row.trials), f"rank {row.names['mode']}", "trial", progress, row.trials)
        measured = [_measure(str(dataset.protocol), row, q, g, vectors, name) for q, g in drawn]
        rows.append(_figures({**row.names, "reranking": reranking, "trials": len(measured)}, measured))
        if rows[-1]["mAP"] is None:
            told = ", ".join(row.names[n] for n in ("protocol", "mode", "direction"))
            log.warning("%s: no query has a match in the gallery; the row is empty", told)
    return Results(rows)


def average(results: Iterable[Results]) -> Results:
    """The mean and deviation over several results of the same rows: RegDB's trials, or several seeds.

    A row's `trials` is then the number of results, and its deviation that of their means.
    """
    tables = [result.rows for result in results]
    same = [name for name in _NAMES if name not in ("protocol", "caution", "trials")]
    kinds = {tuple(tuple(row[name] for name in same) for row in table) for table in tables}
    if len(kinds) != 1:
        raise ValueError(f"results: expected one or more that measure the same, not {sorted(kinds, key=str)}")
    rows = []
    for group in zip(*tables, strict=True):
        protocols = sorted({row["protocol"].split(" trial")[0] for row in group})
        cautions = "; ".join(sorted({row["caution"] for row in group} - {""}))
        names = {**group[0], "protocol": " / ".join(protocols), "caution": cautions, "trials": len(group)}
        rows.append(_figures(names, [[row[name] for name in MEASURES] for row in group]))
    return Results(rows)


def _figures(names: dict, measured: Sequence[Sequence[float]]) -> dict:
    """The names of a row, then the mean and the deviation of each measure over these trials."""
    row, trials = {name: names[name] for name in _NAMES}, np.array(measured, np.float64)
    for name, mean, deviation in zip(MEASURES, trials.mean(0), trials.std(0), strict=True):
        row[name], row[name + "_std"] = (None if np.isnan(x) else float(x) for x in (mean, deviation))
    return row


def _plan(dataset: Dataset, modes: Any, shots: Any, trials: Any, draw: str | os.PathLike) -> list[_Row]:
    """All rows of the results, before their figures. Errors: those of `evaluate`."""
    protocol, visible, infrared = dataset.protocol, dataset.test_visible, dataset.test_infrared
    if protocol is None or visible is None or infrared is None:
        told = "has no test images with a protocol to evaluate with; `ecul report` works without them"
        raise ValueError(f"dataset {dataset.name!r} {told}")
    title, known = _PROTOCOLS[protocol]
    modes = list(known) if modes is None else [modes] if isinstance(modes, str) else modes
    if unknown := [mode for mode in modes if mode not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"modes: {protocol!r} knows {', '.join(known)}, not {unknown}{hint}")
    if protocol != "sysu" and (shots is not None or str(draw) != "random"):
        raise ValueError(f"shots and draw are for 'sysu', not {protocol!r}")
    counts = [1] if shots is None else [shots] if np.ndim(shots) == 0 else shots
    for count in counts:
        check_sizes(trials=trials, shots=count)
    shared = {"protocol": title, "caution": ""}
    for side in (visible, infrared):
        own = {"identities": len(side.people()), "images": len(side)}
        if own != LAYOUTS[protocol].counts[f"test_{side.modality}"]:
            shared["caution"] = f"not {title}'s own test set"
    if protocol == "regdb" and dataset.trial is not None:
        shared["protocol"] += f" trial {dataset.trial}"
    source = "random.seed(t)" if str(draw) == "random" else "rand_perm_cam.mat"
    plan = []
    for count in counts:
        told = {1: "single-shot", 10: "multi-shot"}.get(count, f"{count} shots")
        for mode in map(known.__getitem__, modes):
            names = {**shared, "mode": mode.name, "direction": mode.direction}
            names |= {"shots": told, "draw": source} if mode.drawn else _ALL
            images = (infrared, visible) if mode.query == "infrared" else (visible, infrared)
            plan.append(_Row(names, *images, _draw(mode, *images, count, trials, draw)))
    return plan


def _draw(
    mode: _Mode, query: Images, gallery: Images, shots: int, trials: int, draw: str | os.PathLike
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows of the query and gallery images in each trial; distractors are in every gallery."""
    seen = np.isin(gallery.camids, mode.cameras or gallery.camids)
    people = {"query": query.identities() >= 0, "gallery": seen & (gallery.identities() >= 0)}
    rows = {side: np.flatnonzero(chosen) for side, chosen in people.items()}
    distractors = np.flatnonzero(seen & (gallery.identities() < 0))
    picked = [rows]
    if mode.drawn:
        images = query if mode.drawn == "query" else gallery
        groups = group_rows(images, rows[mode.drawn])
        if str(draw) == "random":
            drawn = [draw_random(groups, trial, shots) for trial in range(trials)]
        else:
            drawn = read_draw(draw, images, groups, trials, shots)
        picked = [{**rows, mode.drawn: np.array(chosen, np.int64)} for chosen in drawn]
    return [(trial["query"], np.concatenate([trial["gallery"], distractors])) for trial in picked]


def _unit_rows(
    model: Any, dataset: Dataset, features: dict | None, batch_size: int, flip: bool, progress: bool
) -> dict[str, torch.Tensor]:
    """Unit rows of the test images by modality, from the model or from the given features."""
    if (model is None) == (features is None):
        raise ValueError("give either a model or features={'visible': ..., 'infrared': ...}")
    if features is None:
        options: dict[str, Any] = {"batch_size": batch_size, "flip": flip, "progress": progress}
        return {m: extract(model, getattr(dataset, f"test_{m}"), m, **options) for m in MODALITIES}
    if sorted(features) != ["infrared", "visible"]:
        raise ValueError(f"features: expected the keys 'visible' and 'infrared', not {sorted(features)}")
    vectors = {}
    for m in MODALITIES:
        count, given = len(getattr(dataset, f"test_{m}")), as_tensor(f"features[{m!r}]", features[m])
        if given.ndim != 2 or len(given) != count or not torch.isfinite(given).all():
            raise ValueError(f"features[{m!r}]: expected {count} finite rows, not {tuple(given.shape)}")
        vectors[m] = torch.nn.functional.normalize(given.detach().float().cpu(), dim=1)
    sizes = [rows.shape[1] for rows in vectors.values()]
    if sizes[0] != sizes[1]:
        raise ValueError(f"features: expected rows of one size, not of {sizes[0]} and {sizes[1]}")
    return vectors


def _measure(
    protocol: str, row: _Row, q: np.ndarray, g: np.ndarray, vectors: dict, rerank: str | None
) -> list[float]:
    """`MEASURES` in percent of a trial that ranks the rows `g` of the gallery for the rows `q`; else NaN."""
    query, gallery = row.query, row.gallery
    asked = vectors[query.modality][torch.from_numpy(q)]
    found = vectors[gallery.modality][torch.from_numpy(g)]

    def distances(block: slice) -> np.ndarray:
        return -(asked[block].numpy() @ found.numpy().T)

    ranked = reranked(asked, found, rerank) if rerank and len(q) and len(g) else distances
    pids = query.identities()[q], gallery.identities()[g]
    scores = score_queries(protocol, ranked, *pids, query.camids[q], gallery.camids[g])
    if np.isnan(scores).all():
        return [np.nan] * len(MEASURES)
    cmc, mean_precision, mean_penalty = summarise(scores)
    return [100 * figure for figure in (*cmc[[0, 4, 9, 19]], mean_precision, mean_penalty)]
