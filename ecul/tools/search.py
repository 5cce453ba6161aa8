"""People's own images: features of a folder, and which gallery images answer a query."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecul.common.files import hash_file, prepare_output, reading
from ecul.common.names import printable
from ecul.common.pretrained import weights_file
from ecul.common.weights import read_tensors, write_tensors
from ecul.data.folders import find_images
from ecul.data.images import check_modality
from ecul.evaluation.rerank import RERANKINGS, reranked
from ecul.features import FolderFeatures, extract_files
from ecul.kernels import topk_similarity
from ecul.tools.threshold import Threshold

__all__ = ["FolderFeatures", "Ranking", "image_files", "load_features", "save_features", "search"]

STRIP = 256  # queries re-ranked at a time


@dataclass(frozen=True)
class Ranking:
    """The answers to each query, best first: gallery rows (Q, top) int64, cosine similarities float32.

    threshold: answers of at least this similarity count as the same person; None where it is not known.
    rerank: the name of the re-ranking that ordered the answers; None: they are in the order of the cosines.
    """

    query: FolderFeatures
    gallery: FolderFeatures
    rows: torch.Tensor
    scores: torch.Tensor
    threshold: float | None = None
    rerank: str | None = None

    def is_same(self, score: float) -> bool:
        """Whether an answer of this similarity counts as the same person."""
        return self.threshold is not None and score >= self.threshold

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Query path -> list of {"score", "path"}, best first; with a threshold also "same": bool."""
        found: dict[str, list[dict[str, Any]]] = {}
        answers = zip(self.query.paths, self.rows.tolist(), self.scores.tolist(), strict=True)
        for path, rows, scores in answers:
            found[path] = []
            for row, score in zip(rows, scores, strict=True):
                same = {} if self.threshold is None else {"same": self.is_same(score)}
                found[path].append({"score": score, "path": self.gallery.paths[row], **same})
        return found

    def table(self) -> str:
        """A block of text for each query: rank, score and path of every answer, = for the same person."""
        lines = [f"in the order of {self.rerank} re-ranking, with cosines"] if self.rerank else []
        for path, answers in self.to_dict().items():
            known = self.threshold is None or any(a["same"] for a in answers)
            name = printable(path)
            lines.append(name if known else f"{name}: nobody (none reaches {self.threshold:.3f})")
            for rank, a in enumerate(answers, 1):
                mark = " =" if a.get("same") else ""
                lines.append(f"{rank:4d}  {a['score']:6.3f}{mark}  {printable(a['path'])}")
        return "\n".join(lines)


def image_files(folder: str | os.PathLike) -> list[Path]:
    """The files of all images below a folder, for `extract`; or the one image that it is.

    Errors: ValueError for a folder without images.
    """
    folder = Path(folder)
    return [folder] if folder.is_file() else [folder / name for name in find_images(folder)[0]]


def save_features(path: str | os.PathLike, found: FolderFeatures, model_path: str | os.PathLike) -> None:
    """Write a `FolderFeatures` as safetensors: tensor "features", and names, modality, model hash beside it.

    The metadata's values are strings: `names` and `unreadable` JSON lists of paths, `modality`, `model` and
    `model_sha256`, the weights that made the rows. `load_features` reads it back.
    Errors: ValueError for another suffix; FileNotFoundError when there is no model at model_path.
    """
    file = weights_file(model_path)
    about = {"names": json.dumps(found.paths), "unreadable": json.dumps(found.unreadable)}
    about |= {"modality": found.modality, "model": str(file)}
    about["model_sha256"] = found.model_sha256 or hash_file(file)
    write_tensors(prepare_output(path, ".safetensors"), {"features": found.features}, about)


def load_features(path: str | os.PathLike) -> FolderFeatures:
    """Read the file of `save_features`. Errors: FileNotFoundError; ValueError that names a damaged file."""
    with reading(path):
        tensors, about, _ = read_tensors(path)
        names, unreadable = json.loads(about["names"]), json.loads(about["unreadable"])
        check_modality(about["modality"])
        if tensors["features"].ndim != 2 or len(tensors["features"]) != len(names):
            raise ValueError(f"{len(names)} names for features of {tuple(tensors['features'].shape)}")
        return FolderFeatures(
            tensors["features"], names, about["modality"], unreadable, about["model_sha256"]
        )


def search(
    model: Any,
    query: str | os.PathLike,
    gallery: str | os.PathLike,
    query_modality: str,
    gallery_modality: str,
    *,
    top: int = 10,
    rerank: str | None = None,
    threshold: Threshold | None = None,
    **options: Any,
) -> Ranking:
    """The `top` gallery images most like each query, best first, as a `Ranking`.

        (query_features @ gallery_features.T).topk(top, dim=1)

    query: an image or a folder; gallery: a folder; each modality is "visible" or "infrared". top is clamped
    to the gallery's size. rerank: "k-reciprocal" or "modality" orders by the distances of
    `ecul.evaluation.rerank`, over all queries and the gallery together; the scores are still cosines.
    threshold: from `Threshold.load(model's directory)`; it marks answers as the same person or not, with a
    false-accept rate of 10 % for people who are not in the gallery. options: of `extract_files`, such as
    skip_unreadable. Errors: those of `extract_files`; ValueError, before any work, for a folder without
    images, another top or rerank.
    """
    if rerank is not None and rerank not in RERANKINGS:
        raise ValueError(f"rerank must be one of {', '.join(RERANKINGS)}, or None, got {rerank!r}")
    if not isinstance(top, int | np.integer) or top < 1:
        raise ValueError(f"top must be a whole number of at least 1, got {top!r}")
    check_modality(gallery_modality)
    query_files, gallery_files = image_files(query), image_files(gallery)  # both are there before any work
    queries = extract_files(model, query_files, query_modality, **options)
    answers = extract_files(model, gallery_files, gallery_modality, **options)
    top = min(int(top), len(answers.paths))
    if rerank is None:
        scores, rows = topk_similarity(queries.features, answers.features, top)
    else:
        distances = reranked(queries.features, answers.features, rerank)
        strips = (
            torch.from_numpy(distances(slice(n, n + STRIP))) for n in range(0, len(queries.paths), STRIP)
        )
        rows = torch.cat([strip.sort(stable=True).indices[:, :top] for strip in strips])
        pairs = zip(queries.features, rows, strict=True)
        scores = torch.stack([answers.features[found] @ query for query, found in pairs])
    sides = (query_modality, gallery_modality, len(answers.paths))
    least = None if threshold is None else threshold.at(*sides)
    return Ranking(queries, answers, rows, scores, least, rerank)
