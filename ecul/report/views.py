"""Views of the features: matched clusters, a map of both modalities, and where a network looks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ecul.augment import normalize
from ecul.features import evaluating
from ecul.labels import Labels
from ecul.report import pictures
from ecul.report.embedded import Embedded
from ecul.report.page import Section
from ecul.report.pictures import Cell

MAPPED = 600  # images of a map


def match_rows(
    table: Embedded, labels: Labels, similarity: np.ndarray, match: np.ndarray, same: np.ndarray | None,
    each: int = 2, images: int = 4,
) -> tuple[list[tuple[str, list[Cell]]], int]:  # fmt: skip
    """Rows of a sheet, and its lead: the best, middle and worst matches, visible images beside infrared ones.

    similarity: (B, A) cosines of the centres; match: bool (B, A); same: bool (B, A), one person, or None.
    """
    pairs = np.argwhere(match)
    pairs = pairs[np.argsort(-similarity[tuple(pairs.T)], kind="stable")]
    middle = max(0, len(pairs) // 2 - each // 2)
    places = {"best": range(each), "middle": range(middle, middle + each)}
    places["worst"] = range(len(pairs) - each, len(pairs))
    chosen = {p: name for name, found in reversed(places.items()) for p in found if 0 <= p < len(pairs)}
    sides = [*labels.sides.values()]
    sizes = [torch.bincount(side[side >= 0]) for side in sides]
    shown = [(chosen[place], *pairs[place].tolist()) for place in sorted(chosen)]
    lead = min(images, *(int(min(sizes[0][a], sizes[1][b])) for _, b, a in shown))
    rows = []
    for name, b, a in shown:
        cells, offset = [], 0
        for side, cluster, centers in zip(sides, (a, b), labels.centers, strict=True):
            members = torch.nonzero(side == cluster)[:, 0] + offset
            nearest = (table.features[members] @ centers[cluster]).argsort(descending=True, stable=True)
            cells += [table.cell(row) for row in members[nearest[:lead]].tolist()]
            offset = len(side)
        told = "" if same is None else "\nsame person" if same[b, a] else "\nanother person"
        rows.append((f"{name}\ncosine {similarity[b, a]:.3f}{told}", cells))
    return rows, lead


def view_sections(folder: Path, table: Embedded, model: Any) -> list[Section]:
    """The map, and activation maps of the best and the worst queries where the network has such."""
    rows = np.linspace(0, len(table.features) - 1, min(MAPPED, len(table.features))).round().astype(int)
    pids, border = table.pids(), len(table.images[0])
    points, how = flattened(table.features[torch.from_numpy(rows)].numpy())
    pictures.draw_map(folder / "map.png", points, rows >= border, None if pids is None else pids[rows])
    text = f"{len(rows)} images by {how}: near each other where the features are. A modality apart from "
    text += "the other is a gap that training has not closed."
    sections = [Section("Map of the features", text, folder / "map.png")]
    cells = _looked_at(table, model)
    if cells:
        pictures.draw_sheet(folder / "activations.png", cells, lead=2)
        text = "An infrared query and its best visible answer, each with how strongly the last feature map "
        text += "responds (its norm, red the most): the surest queries first, then the least sure."
        sections.append(Section("Where the network looks", text, folder / "activations.png"))
    return sections


def flattened(rows: np.ndarray) -> tuple[np.ndarray, str]:
    """Points (n, 2) of features (n, D): t-SNE where scikit-learn is there, else principal components."""
    centred = rows - rows.mean(0)
    plane = np.linalg.svd(centred, full_matrices=False)[2][:2]
    points = centred @ plane.T
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return points, "principal components"
    if len(rows) < 8:  # too few for neighbourhoods
        return points, "principal components"
    start = (points / max(points[:, 0].std(), 1e-9) * 1e-4).astype(np.float32)
    tsne = TSNE(perplexity=min(30.0, (len(rows) - 1) / 3), init=start, random_state=0)
    return tsne.fit_transform(rows), "t-SNE"


def _looked_at(table: Embedded, model: Any, each: int = 2) -> list[tuple[str, list[Cell]]]:
    """Rows of (query, its map, answer, its map) for the best and the worst queries by their best cosine."""
    visible, infrared = table.by_modality(table.features)
    scores, answers = (infrared @ visible.T).max(1)
    order = scores.argsort(descending=True, stable=True).tolist()
    chosen = {**dict.fromkeys(order[-each:], "least sure"), **dict.fromkeys(order[:each], "surest")}
    rows = []
    for query in sorted(chosen, key=order.index):
        cells = []
        for row, name in ((len(visible) + query, "query"), (int(answers[query]), "answer")):
            images, place, side = table.side(row)
            strength = activation(model, table.pixels[side][place], images.modality)
            if strength is None:
                return []
            shown, color = table.thumbnail(row), pictures.MODALITY[images.modality]
            cells += [Cell(shown, name, color), Cell(pictures.heated(shown, strength), "", color)]
        rows.append((f"{chosen[query]}\ncosine {scores[query]:.3f}", cells))
    return rows


@torch.no_grad()
def activation(model: Any, pixels: torch.Tensor, modality: str) -> np.ndarray | None:
    """How strongly the last feature map of an image, uint8 (3, H, W), responds: (H, W), 0 to 1, or None."""
    found: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, out: found.append(out) if _is_map(out) else None)
        for module in model.modules()
    ]
    try:
        with evaluating(model):
            device = next(model.parameters()).device
            model.embed(normalize(pixels[None].to(device)), modality)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None
    norms = found[-1].float().norm(dim=1)[:, None]
    strength = F.interpolate(norms, tuple(pixels.shape[1:]), mode="bilinear")[0, 0]
    low, high = strength.min(), strength.max()
    return ((strength - low) / (high - low).clamp(min=1e-9)).cpu().numpy()


def _is_map(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1
