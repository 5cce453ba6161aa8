"""People's own images: features of a folder, and which gallery images answer a query."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ecul.common.files import hash_file, prepare_output, write_tensors
from ecul.common.pretrained import weights_file
from ecul.data.decode import read_images, unreadable
from ecul.data.folders import read_folder
from ecul.data.images import check_modality
from ecul.features import embed_pixels, require_model
from ecul.kernels import topk_similarity

CHUNK = 4096  # images decoded before they are embedded and forgotten


@dataclass(frozen=True)
class FolderFeatures:
    """One folder's (N, num_features) float32 unit rows, each row's path, and what was skipped."""

    features: torch.Tensor
    paths: list
    modality: str
    unreadable: list


@dataclass(frozen=True)
class Ranking:
    """The best answers to each query: gallery rows (Q, top) int64, cosine similarities (Q, top) float32."""

    query: FolderFeatures
    gallery: FolderFeatures
    rows: torch.Tensor
    scores: torch.Tensor

    def to_dict(self) -> dict:
        """Query path -> list of {"score", "path"}, best first."""
        return {
            path: [
                {"score": score, "path": self.gallery.paths[row]}
                for row, score in zip(rows, scores, strict=True)
            ]
            for path, rows, scores in zip(
                self.query.paths, self.rows.tolist(), self.scores.tolist(), strict=True
            )
        }

    def table(self) -> str:
        """A block of text for each query: rank, score and path of every answer."""
        lines = []
        for path, answers in self.to_dict().items():
            lines.append(path)
            lines += [f"{rank:4d}  {a['score']:6.3f}  {a['path']}" for rank, a in enumerate(answers, 1)]
        return "\n".join(lines)


def extract_folder(model, folder, modality, *, skip_unreadable=False, batch_size=256, progress=True):
    """Embeddings of every image below a folder, or of one image file, as a `FolderFeatures`.

        extract(model, paths, modality)          # a chunk at a time, with the paths, and some left out

    model: anything with `embed(x, modality)`, `input_size` and `num_features`, on any device. Images are
    decoded a chunk at a time; batch_size is halved while a batch does not fit the GPU's memory.
    skip_unreadable: leave such files out and list them in `unreadable`. Errors: ValueError for a folder
    without images, an unknown modality, or, naming all of them, files that cannot be read.
    """
    return _extract_paths(model, _paths(folder), modality, skip_unreadable, batch_size, progress)


def _extract_paths(model, paths, modality, skip_unreadable=False, batch_size=256, progress=True):
    """`extract_folder` where the images have been found."""
    check_modality(modality)
    require_model(model)
    kept, rows = [], []
    problems: dict[str, ValueError] = {}
    for start in range(0, len(paths), CHUNK):
        chunk = paths[start : start + CHUNK]
        decoded = zip(chunk, read_images(chunk, model.input_size, progress, "reading"), strict=True)
        read = {str(path): image for path, image in decoded}
        problems |= {path: image for path, image in read.items() if isinstance(image, ValueError)}
        pixels = [image for path, image in read.items() if path not in problems]
        if pixels and (skip_unreadable or not problems):
            kept += [path for path in read if path not in problems]
            stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
            rows.append(embed_pixels(model, stacked, modality, batch_size, progress=progress).cpu())
    if problems and not (skip_unreadable and kept):
        advice = "" if skip_unreadable else "; skip_unreadable leaves such images out"
        raise unreadable(list(problems.values()), len(paths), advice)
    return FolderFeatures(torch.cat(rows), kept, modality, list(problems))


def _paths(folder):
    """The files of a folder's images, or the one image."""
    folder = Path(folder)
    return [folder] if folder.is_file() else [folder / name for name in read_folder(folder)[0].names]


def save_features(path, found, model_path):
    """Write a `FolderFeatures` as safetensors: tensor "features", and names, modality, model hash beside it.

    The metadata's values are strings: `names` and `unreadable` JSON lists of paths, `modality`, `model` and
    `model_sha256`, the file that made the rows. Read back with `safetensors.safe_open(path, "pt")`.
    Errors: ValueError for another suffix; FileNotFoundError when there is no model at model_path.
    """
    path = prepare_output(path, ".safetensors")
    file = weights_file(model_path)
    metadata = {
        "names": json.dumps(found.paths),
        "unreadable": json.dumps(found.unreadable),
        "modality": found.modality,
        "model": file,
        "model_sha256": hash_file(file, hashlib.sha256()),
    }
    write_tensors(path, {"features": found.features}, metadata)


def search(model, query, gallery, query_modality, gallery_modality, *, top=10, **options):
    """The `top` gallery images most like each query, best first, as a `Ranking`.

        (query_features @ gallery_features.T).topk(top, dim=1)

    query: an image or a folder; gallery: a folder; each modality is "visible" or "infrared". top is clamped
    to the gallery's size. options: those of `extract_folder`. Errors: those of `extract_folder`; ValueError
    for top below 1.
    """
    if not isinstance(top, int | np.integer) or top < 1:
        raise ValueError(f"top must be a whole number of at least 1, got {top!r}")
    check_modality(gallery_modality)
    asks, answers = _paths(query), _paths(gallery)
    asked = _extract_paths(model, asks, query_modality, **options)
    searched = _extract_paths(model, answers, gallery_modality, **options)
    scores, rows = topk_similarity(asked.features, searched.features, min(int(top), len(searched.paths)))
    return Ranking(asked, searched, rows, scores)
