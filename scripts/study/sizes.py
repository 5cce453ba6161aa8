"""k1, k2 and eps of each kind of clustering, by one rule that needs no identities.

Of the same grid for every kind, the setting with the best score of `ecul.tools.tuning.tune` is taken: the
mean over the tuning worlds, and over visible and infrared, of the features that training starts from. k3
follows the relatives of the papers: twice k2 within a modality, k1 for both modalities together.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch

from ecul import MODALITIES, Config, open_dataset
from ecul.features import extract_sides
from ecul.optim import build_model
from ecul.tools.tuning import tune

# With k1 = 6 or k2 = 2, below `min_samples`, the score is higher still: it rewards splitting people.
K1, K2, EPS = (8, 12, 20), (3, 6), (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
KINDS: dict[str, Callable[[int, int], int | None]] = {
    "plain": lambda k1, k2: None,
    "EMCC": lambda k1, k2: 2 * k2,
    "joint EMCC": lambda k1, k2: k1,
}


def scores(root: str, config: Config) -> dict[str, dict[str, float]]:
    """The score of each setting by kind, on the training images of one world."""
    torch.set_num_threads(1)
    dataset, model = open_dataset("sysu", root), build_model(config, torch.device("cpu")).eval()
    images = [getattr(dataset, modality) for modality in MODALITIES]
    rows, cameras, sides = extract_sides(model, images, progress=False)
    joint = [(rows, cameras, sides)]
    own = [(rows[sides == side], cameras[sides == side], None) for side in (0, 1)]
    found: dict[str, dict[str, float]] = {}
    for kind, k2 in itertools.product(KINDS, K2):
        for k1 in K1:
            k3 = KINDS[kind](k1, k2)
            if k3 is not None and k3 < k2:
                continue
            fixed = {"k1": k1, "k2": k2, "k3": k3, "eps": EPS, "min_samples": config.min_samples}
            tables = [tune(*data, **fixed) for data in (joint if kind.startswith("joint") else own)]
            for rows in zip(*tables, strict=True):
                name = f"k1={k1} k2={k2} k3={k3} eps={rows[0]['eps']}"
                found.setdefault(kind, {})[name] = float(np.mean([row["score"] for row in rows]))
    return found


def table(worlds: list[dict[str, dict[str, float]]], best: int = 5) -> str:
    """The best settings of each kind, by the mean score over the worlds."""
    lines = []
    for kind in KINDS:
        mean = {name: np.mean([world[kind][name] for world in worlds]) for name in worlds[0][kind]}
        for name in sorted(mean, key=mean.get, reverse=True)[:best]:  # type: ignore[arg-type]
            lines.append(f"{kind}: {name} score {mean[name]:.3f}")
    return "\n".join(lines)
