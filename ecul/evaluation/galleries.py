"""The images that each trial of SYSU-MM01 and LLCM draws, as in the published scripts."""

import os
import random
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from ecul.common.files import reading
from ecul.data.images import Images


def group_rows(images: Images, rows: Iterable[int]) -> list[np.ndarray]:
    """These rows by (identity, camera), in the published order: 4-digit identity, camera, file name."""
    pids = images.identities()

    def place(row: int) -> tuple[str, int]:
        return f"{pids[row]:04d}", int(images.camids[row])

    ordered = sorted(rows, key=lambda row: (*place(row), os.path.basename(images.names[row])))
    return [np.array(list(group)) for _, group in groupby(ordered, place)]


def draw_random(groups: Sequence[np.ndarray], trial: int, shots: int) -> list[int]:
    """`random.seed(trial)`, then a sample of `shots` from each group; a sample of one is `random.choice`."""
    generator = random.Random(trial)
    picked = [generator.sample(rows.tolist(), min(shots, len(rows))) for rows in groups]
    return [row for rows in picked for row in rows]


def read_draw(
    path: str | os.PathLike, images: Images, groups: Sequence[np.ndarray], trials: int, shots: int
) -> list[list[int]]:
    """The official draw of each trial: the first numbers of a permutation within each group.

    path: SYSU-MM01's rand_perm_cam.mat: for each camera, identity and trial, 1-based numbers of images.
    Errors: those of `reading`, also for a trial or an image that is absent.
    """
    from scipy.io import loadmat

    drawn: list[list[int]] = [[] for _ in range(trials)]
    with reading(path):
        cameras = enumerate(loadmat(path)["rand_perm_cam"].ravel(), 1)
        cells = {(camid, pid): cell for camid, own in cameras for pid, cell in enumerate(own.ravel(), 1)}
        for rows in groups:
            camid, pid = int(images.camids[rows[0]]), int(images.identities()[rows[0]])
            permutations = cells.get((camid, pid), np.empty((0, 0)))  # (trials, images)
            for trial, chosen in enumerate(drawn):
                numbers = permutations[trial : trial + 1, :shots].astype(int).ravel()
                if not numbers.size or numbers.min() < 1 or numbers.max() > len(rows):
                    told = f"images 1 to {len(rows)} of identity {pid} in camera {camid}"
                    raise ValueError(f"trial {trial} should name {told}, not {numbers.tolist()}")
                chosen += rows[numbers - 1].tolist()
    return drawn
