"""The images that each trial of SYSU-MM01 and LLCM draws, as in the published scripts."""

import os
import random
from collections.abc import Callable, Iterable, Sequence
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


def draw_random(groups: Sequence[np.ndarray], trial: int, shots: int) -> np.ndarray:
    """`random.seed(trial)`, then one choice (or a sample of `shots`) from each group."""
    generator = random.Random(trial)
    if shots == 1:
        return np.array([generator.choice(rows) for rows in groups], np.int64)
    picked = [generator.sample(list(rows), min(shots, len(rows))) for rows in groups]
    return np.array([row for rows in picked for row in rows], np.int64)


def read_draw(
    path: str | os.PathLike, images: Images, groups: Sequence[np.ndarray]
) -> Callable[[int, int], np.ndarray]:
    """The official draw, a function of trial and shots: the first numbers of a permutation within each group.

    path: SYSU-MM01's rand_perm_cam.mat: for each camera, identity and trial, 1-based numbers of images.
    Errors: those of `reading`; the function raises ValueError for a trial or an image that is absent.
    """
    from scipy.io import loadmat

    with reading(path):
        cameras = loadmat(path)["rand_perm_cam"].ravel()
        permutations = [np.atleast_1d(camera.squeeze()) for camera in cameras]
        cells = [cell for camera in permutations for cell in camera]
        if len(cameras) != 6 or not all(isinstance(cell, np.ndarray) and cell.ndim == 2 for cell in cells):
            raise ValueError("rand_perm_cam should be 6 cells of a cell an identity, each (trials, images)")

    def draw(trial: int, shots: int) -> np.ndarray:
        drawn: list[int] = []
        for rows in groups:
            pid, camid = int(images.identities()[rows[0]]), int(images.camids[rows[0]])
            cell = next(iter(permutations[camid - 1][pid - 1 : pid]), np.empty((0, 0)))
            who = f"identity {pid} in camera {camid}"
            if len(cell) <= trial or not cell.shape[1]:
                raise ValueError(f"draw: {str(path)!r} has no trial {trial} for {who}")
            numbers = cell[trial, :shots].astype(int)
            if absent := [n for n in numbers if not 1 <= n <= len(rows)]:
                asked = f"asks for image {absent[0]} of {who}, which has {len(rows)}"
                raise ValueError(f"draw: {str(path)!r} {asked}")
            drawn += [rows[number - 1] for number in numbers]
        return np.array(drawn, np.int64)

    return draw
