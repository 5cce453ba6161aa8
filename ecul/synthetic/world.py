"""A rendered visible-infrared world in SYSU-MM01's raw layout, to try the method without a data set.

People keep their shape and the pattern of their clothes across modalities. Their tones are drawn anew, so
colour tells identities apart among visible images and says nothing across modalities. With a gap people keep
less, and infrared differs in three ways: by a law of hue, by chance, and by a weave that only infrared shows
(`GAP`). A figure measured on this world is a figure of this world only.
"""

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ecul.common import logs
from ecul.common.files import read_json, write_json
from ecul.common.names import printable
from ecul.data.decode import pillow
from ecul.data.layouts import SYSU_CAMERAS
from ecul.synthetic import figures
from ecul.synthetic.figures import Canvas, Person, Tones, draw_tones, draw_traits, mixed

VERSION = 2  # of what the files hold, constants included
CAMERAS = (1, 2, 3, 4, 5, 6)
SEEN_FROM_BEHIND = (2, 5, 6)
# Each kind of thing has its own stream of random numbers, so that no kind depends on the number of another.
_PERSON, _TONES, _CAMERA, _IMAGE, _MISSING, _SPLIT, _TYPE, _CLOTH, _LIGHT, _WALL = range(10)
# What sets the modalities apart in a world whose gap is 1; another gap scales all of it.
GAP = {
    "alike": 0.1,  # probability that a trait is not a person's own but that of one of TYPES people
    "law": 0.6,  # share of the hue in a reflectance in infrared: pairs can teach it, one modality cannot
    "redrawn": 0.05,  # probability that a trait of the cloth is drawn anew for infrared
    "weave": 0.05,  # brightness of a cloth's weave: it tells people apart, in infrared alone
    "slope": 0.3,  # how much brighter one side of a camera's picture is, at most
    "cast": 0.1,  # how far a camera's channels are off, at most
    "clutter": 0.0,  # how bright the waves on a camera's wall and floor are, at most
}
TYPES = 24
# What changes from image to image: the lowest and the highest value of each.
SHOT = {
    "yaw": (-0.35, 0.35), "phase": (-np.pi, np.pi), "shift_x": (-0.03, 0.03), "shift_y": (-0.03, 0.03),
    "zoom": (0.94, 1.04), "light": (0.88, 1.12), "sway": (-0.1, 0.1), "occluded": (0.0, 1.0),
    "side": (-1.0, 1.0), "kind": (0.0, 1.0), "gray": (0.1, 0.8),
}  # fmt: skip
Gap = float | Mapping[str, float]
Camera = dict[str, Any]  # what all images of one camera share; lengths are fractions of the frame's height


def synthesize(
    root: str | os.PathLike,
    *,
    identities: int = 96,
    test_identities: int | None = None,
    images: int = 4,
    size: tuple[int, int] = (64, 32),
    seed: int = 0,
    gap: Gap = 0.0,
    progress: bool = True,
) -> str:
    """Render walking people as JPEG files under `root` and return `root` as a string.

    The layout is SYSU-MM01's: RGB files ``cam{1..6}/{id:04d}/{n:04d}.jpg`` (cameras 1, 2, 4, 5 are visible; 3
    and 6 are infrared, with equal channels) and ``exp/{train,val,test}_id.txt``. ``synthetic.json`` holds the
    parameters.

    identities: people in training (train + val), at least 2. test_identities: people held out, at least 1,
    default ``max(2, identities // 2)``. images: per person and camera; some people miss one or two cameras.
    size: (height, width) in pixels, at least (32, 16). seed: non-negative. gap: 0 to 1, how far apart the
    modalities are; at 0 they share shape and pattern, at 1 they differ by all of `GAP`; or the values of
    `GAP` by name, 0 to 1, where a missing one is 0. An image depends on the seed, the gap, its person,
    camera and number only.

    The world is built in a folder ``.synthetic-*`` beside `root`, which is renamed when complete. A call
    removes those that killed calls left a day ago or earlier. A complete world with the same parameters is
    left as it is. Raises ValueError for a parameter out of range, or when `root` holds something else.
    """
    parameters = _check_parameters(identities, test_identities, images, size, seed, gap)
    home = Path(root).absolute()
    if _holds_world(home, parameters):
        return str(root)
    for old in home.parent.glob(f".synthetic-{'[0-9a-f]' * 16}"):
        with suppress(OSError):  # another process may have removed it
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old)
    draft = home.with_name(f".synthetic-{secrets.token_hex(8)}")
    try:
        _write_world(draft, parameters, progress)
        if home.is_dir():
            home.rmdir()
        draft.rename(home)
    except OSError:
        if not _holds_world(home, parameters):  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return str(root)


def _check_parameters(
    identities: Any, test_identities: Any, images: Any, size: Any, seed: Any, gap: Any
) -> dict[str, Any]:
    """The parameters as synthetic.json holds them, or a ValueError that names the first wrong one."""
    if np.shape(size) != (2,):
        raise ValueError(f"size must be (height, width), got {size!r}")
    numbers = {"identities": (identities, 2), "images": (images, 1), "seed": (seed, 0)}
    numbers |= {"size: height": (size[0], 32), "size: width": (size[1], 16)}
    numbers["test_identities"] = (1 if test_identities is None else test_identities, 1)
    for name, (value, least) in numbers.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    held_out = max(2, identities // 2) if test_identities is None else test_identities
    if identities + held_out > 9999:
        raise ValueError(f"identities + test_identities must be at most 9999, got {identities} + {held_out}")
    values = gap if isinstance(gap, Mapping) else dict.fromkeys(GAP, gap)
    in_range = all(isinstance(v, int | float | np.number) and 0 <= v <= 1 for v in values.values())
    if not in_range or not values.keys() <= GAP.keys():
        named = ", ".join(GAP)
        raise ValueError(f"gap must be a number from 0 to 1, or such numbers by {named}, got {gap!r}")
    gap = {name: float(v) for name, v in gap.items()} if isinstance(gap, Mapping) else float(gap)
    whole = {"identities": identities, "test_identities": held_out, "images": images, "seed": seed}
    return {name: int(n) for name, n in whole.items()} | {"size": [*map(int, size)], "gap": gap}


def _holds_world(root: Path, parameters: dict[str, Any]) -> bool:
    """Whether `root` holds a complete world of these parameters. ValueError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = read_json(root / "synthetic.json")
        about, version = found["parameters"], found["version"]
    except (OSError, ValueError, TypeError, KeyError):
        reason = "files that are not a synthetic world"
    else:
        if (about, version) == (parameters, VERSION):
            return True
        reason = printable(f"a world of {about}, version {version}")[:500]
    raise ValueError(
        f"root: {root} holds {reason}; asked for {parameters}, version {VERSION}: "
        "name another folder or remove this one"
    )


def _write_world(root: Path, parameters: dict[str, Any], progress: bool) -> None:
    seed, gap = parameters["seed"], parameters["gap"]
    splits = _split(seed, parameters["identities"], parameters["test_identities"])
    jobs = [(pid, camid) for pid in sorted(sum(splits.values(), [])) for camid in _cameras_of(seed, pid)]
    cameras = {camid: draw_camera(seed, camid, gap) for camid in CAMERAS}
    with ThreadPoolExecutor() as pool, logs.progress(len(jobs), "render", "folder", progress) as bar:
        for _ in pool.map(lambda job: _write_job(root, parameters, job[0], cameras[job[1]]), jobs):
            bar.update()
    (root / "exp").mkdir()
    for name, pids in splits.items():
        (root / "exp" / f"{name}_id.txt").write_text(",".join(map(str, pids)) + "\n")
    about = {"generator": "ecul synthesize", "version": VERSION, "parameters": parameters}
    write_json(root / "synthetic.json", about)


def _split(seed: int, identities: int, held_out: int) -> dict[str, list[int]]:
    """Identities 1, 2, ... in one sequence, dealt to the three lists by the seed."""
    order = np.random.default_rng([seed, _SPLIT]).permutation(identities + held_out) + 1
    val = max(1, identities // 8)
    parts = np.split(order, [identities - val, identities])
    return {name: sorted(part.tolist()) for name, part in zip(("train", "val", "test"), parts, strict=True)}


def _cameras_of(seed: int, pid: int) -> list[int]:
    """The cameras that see this person: all, or one or two fewer; at least two visible and one infrared."""
    rng = np.random.default_rng([seed, _MISSING, pid])
    missing = rng.choice(3, p=[0.7, 0.2, 0.1])
    visible, infrared = rng.permutation(SYSU_CAMERAS["visible"]), SYSU_CAMERAS["infrared"]
    if missing and rng.random() < 0.5:
        missing, infrared = missing - 1, (rng.choice(infrared),)
    return sorted(int(camid) for camid in [*visible[missing:], *infrared])


def _write_job(root: Path, parameters: dict[str, Any], pid: int, camera: Camera) -> None:
    folder = root / f"cam{camera['camid']}" / f"{pid:04d}"
    folder.mkdir(parents=True)
    asked = {name: parameters[name] for name in ("images", "size", "gap")}
    for n, pixels in enumerate(render(parameters["seed"], pid, camera, **asked), 1):
        pillow().fromarray(pixels).save(folder / f"{n:04d}.jpg", quality=90)


def spread(gap: Gap) -> Mapping[str, float]:
    """How far apart the modalities are, by the names of `GAP`."""
    return {name: gap.get(name, 0.0) if isinstance(gap, Mapping) else gap * v for name, v in GAP.items()}


def draw_camera(seed: int, camid: int, gap: Gap = 0.0) -> Camera:
    """The camera of this number in the world of this seed and gap."""
    streams, apart = (_CAMERA, _LIGHT, _WALL), spread(gap)
    rng, light, waves = (np.random.default_rng([seed, stream, camid]) for stream in streams)
    channels = 1 if camid in SYSU_CAMERAS["infrared"] else 3

    def tone(middle: float | np.ndarray) -> np.ndarray:
        return middle + rng.uniform(-0.2, 0.2) + rng.uniform(-0.06, 0.06, channels).astype(np.float32)

    wall = tone(0.5)
    cast = 1 + apart["cast"] * light.uniform(-1, 1, channels).astype(np.float32)
    return {
        "camid": camid,
        "gain": rng.uniform(0.9, 1.15) * rng.uniform(0.92, 1.08, channels).astype(np.float32) * cast,
        "gamma": rng.uniform(0.85, 1.2),
        "noise": rng.uniform(0.005, 0.02),
        "blur": rng.uniform(0.8, 1.5) / 64,
        "yaw": np.pi * (camid in SEEN_FROM_BEHIND) + rng.uniform(-0.45, 0.45),
        "scale": rng.uniform(0.94, 1.0),
        "wall": wall,
        "floor": tone(0.5),
        "horizon": rng.uniform(0.6, 0.85),
        # x, y, half the width, the height, and the tone of each
        "boxes": [
            (*rng.uniform([-0.35, 0.0, 0.03, 0.1], [0.35, 0.8, 0.15, 0.4]).tolist(), tone(wall))
            for _ in range(4)
        ],
        # how much brighter it is to the right and downwards, per half a height
        "slope": apart["slope"] * light.uniform(-1, 1, 2).astype(np.float32),
        # the direction, the period, the phase and the height of each wave
        "waves": waves.uniform([0, 0.06, 0, 0], [np.pi, 0.4, 1, apart["clutter"]], (3, 4)).astype(np.float32),
    }


def appearance(seed: int, pid: int, channels: int, gap: Gap = 0.0) -> tuple[Person, Tones]:
    """A person's traits and tones as one modality shows them (visible has 3 channels, infrared 1).

    Without a gap both modalities show the same traits, and the tones of one tell nothing about the other's.
    """

    def rng(*stream: int) -> np.random.Generator:
        return np.random.default_rng([seed, *stream])

    person, tones = draw_traits(rng(_PERSON, pid)), draw_tones(rng(_TONES, pid, channels), channels)
    apart = spread(gap)
    if not any(apart.values()):
        return person, tones
    own = rng(_TYPE, pid)
    person = mixed(person, draw_traits(rng(_TYPE, 0, int(own.integers(TYPES)))), own, apart["alike"])
    if channels == 1:
        cloth = rng(_CLOTH, pid)
        person = mixed(person, draw_traits(cloth), cloth, apart["redrawn"], figures.CLOTH)
        for name, colour in draw_tones(rng(_TONES, pid, 3), 3).items():
            tones[name] += apart["law"] * (figures.reflectance(colour) - tones[name])
        tones["weave"] = cloth.uniform([0, 0.06, 0.0], [np.pi, 0.14, apart["weave"]]).astype(np.float32)
    return person, tones


def render(
    seed: int, pid: int, camera: Camera, images: int, size: tuple[int, int], gap: Gap = 0.0
) -> np.ndarray:
    """The images of one person before one camera: uint8 (images, H, W, 3); infrared has equal channels."""
    channels = len(camera["gain"])
    person, tones = appearance(seed, pid, channels, gap)
    rngs = [np.random.default_rng([seed, _IMAGE, pid, camera["camid"], n]) for n in range(images)]
    drawn = np.stack([rng.uniform(*zip(*SHOT.values(), strict=True)) for rng in rngs], 1)
    shot = dict(zip(SHOT, drawn.astype(np.float32)[..., None, None], strict=True))

    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    x, y = (x - width / 2) / height, y / height
    pixels = np.zeros((images, height, width, channels), np.float32)
    _draw_backdrop(Canvas(pixels, x + shot["sway"], y, camera["blur"]), camera)
    stature = 0.96 * person["height"] * camera["scale"] * shot["zoom"]
    crown = 0.97 + shot["shift_y"] - stature
    figure = Canvas(pixels, (x - shot["shift_x"]) / stature, (y - crown) / stature, camera["blur"] / stature)
    figures.draw_person(figure, person, tones, camera["yaw"] + shot["yaw"], shot["phase"])
    _draw_obstacle(Canvas(pixels, x, y, camera["blur"]), shot)

    light = shot["light"] * (1 + 2 * (camera["slope"][0] * x + camera["slope"][1] * (y - 0.5)))
    pixels = np.clip(pixels * camera["gain"] * light[..., None], 0, 1) ** camera["gamma"]
    pixels += camera["noise"] * np.stack([rng.standard_normal(pixels.shape[1:], np.float32) for rng in rngs])
    return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8).repeat(3 // channels, axis=3)


def _draw_backdrop(canvas: Canvas, camera: Camera) -> None:
    canvas.paint(canvas.y - 2, camera["wall"])
    canvas.paint(camera["horizon"] - canvas.y, camera["floor"])
    for x, y, half, tall, tone in camera["boxes"]:
        canvas.paint(canvas.trapezoid(x, y, y + tall, half, half), tone)
    for turn, period, phase, high in camera["waves"]:
        along = canvas.x * np.cos(turn) + canvas.y * np.sin(turn)
        canvas.pixels[:] += high * np.sin(2 * np.pi * (along / period + phase))[..., None]


def _draw_obstacle(canvas: Canvas, shot: dict[str, np.ndarray]) -> None:
    """In one image of ten: a post beside the middle, or a box at the foot."""
    post = np.abs(canvas.x - 0.15 * shot["side"]) - 0.035
    box = 0.85 + 0.05 * shot["side"] - canvas.y
    shape = np.where(shot["kind"] < 0.5, post, box)
    canvas.paint(np.where(shot["occluded"] < 0.1, shape, np.inf), shot["gray"][..., None])
