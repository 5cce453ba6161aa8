"""A rendered visible-infrared world, written to disk in SYSU-MM01's raw layout.

People keep their shape and the pattern of their clothes across modalities; the tones are drawn anew, so that
colour tells identities apart among visible images and nothing at all across modalities. With a gap they keep
less, and what infrared shows instead is a matter of law, chance and temptation (`GAP`). It exists to try the
method end to end without a data set; a figure measured on it is a figure of this world only.
"""

import json
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecul.common import logs
from ecul.common.files import read_json
from ecul.common.names import printable
from ecul.synthetic.figures import CLOTH, Canvas, Person, Tones, draw_person, draw_tones, mixed, reflectance

VERSION = 1
VISIBLE_CAMERAS = (1, 2, 4, 5)
INFRARED_CAMERAS = (3, 6)
CAMERAS = (1, 2, 3, 4, 5, 6)
SEEN_FROM_BEHIND = (2, 5, 6)
# One stream of random numbers for each kind of thing, so that none depends on how many there are of another.
_PERSON, _TONES, _CAMERA, _IMAGE, _MISSING, _SPLIT, _TYPE, _CLOTH, _LIGHT = range(9)
# What sets the modalities apart in a world whose gap is 1; another gap scales all of it.
GAP = {
    "alike": 0.1,  # probability that a trait is not a person's own but that of one of TYPES people
    "law": 0.6,  # share of the hue in a reflectance in infrared: what pairs teach, and one modality cannot
    "redrawn": 0.05,  # probability that a trait of the cloth is another one in infrared, by chance
    "weave": 0.05,  # brightness of a cloth's weave: it tells people apart, in infrared alone
    "slope": 0.3,  # how much brighter one side of a camera's picture is, at most
    "cast": 0.1,  # how far a camera's channels are off, at most
}
TYPES = 24


def synthesize(
    root: str | os.PathLike,
    *,
    identities: int = 96,
    test_identities: int | None = None,
    images: int = 4,
    size: tuple[int, int] = (64, 32),
    seed: int = 0,
    gap: float = 0.0,
    progress: bool = True,
) -> str:
    """Render walking people as JPEG files under `root` and return `root` as a string.

    Equals SYSU-MM01's raw layout: ``cam{1..6}/{id:04d}/{n:04d}.jpg`` (cameras 1, 2, 4, 5 visible RGB; 3, 6
    infrared, one channel) and ``exp/{train,val,test}_id.txt``, plus ``synthetic.json`` with the
    parameters, the constants of a gap (`GAP` and `TYPES`, where there is one) and the number of images of
    each split and camera.

    identities: people in training (train + val), at least 2. test_identities: people held out, at least 1,
    default ``max(2, identities // 2)``. images: per person and camera; some people miss one or two cameras.
    size: (height, width) in pixels, at least (32, 16). seed: non-negative. gap: 0 to 1, how far apart the
    modalities are; at 0 shape and pattern carry over whole, at 1 as little as `GAP` says. An image depends
    on the seed, the gap, its person, camera and number only.

    The world is built beside `root` and renamed when complete. A complete world with the same parameters is
    left as it is. Raises ValueError for a parameter out of range, or when `root` holds something else.
    """
    parameters = _check_parameters(identities, test_identities, images, size, seed, gap)
    home = Path(root).absolute()
    if _holds_world(home, parameters):
        return str(root)
    partial = home.with_name(f".{home.name}.partial-{secrets.token_hex(8)}")
    try:
        _write_world(partial, parameters, progress)
        try:
            if home.is_dir():
                home.rmdir()
            partial.rename(home)
        except OSError:  # it is there now: another process was first
            if not _holds_world(home, parameters):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(root)


def _check_parameters(
    identities: Any, test_identities: Any, images: Any, size: Any, seed: Any, gap: Any
) -> dict[str, Any]:
    """The parameters as synthetic.json holds them, or a ValueError that names the first wrong one."""

    def integer(name: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        return int(value)

    identities = integer("identities", identities, 2)
    held_out = max(2, identities // 2) if test_identities is None else test_identities
    held_out = integer("test_identities", held_out, 1)
    if identities + held_out > 9999:
        raise ValueError(f"identities + test_identities must be at most 9999, got {identities} + {held_out}")
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"size must be (height, width), got {size!r}")
    if isinstance(gap, bool) or not isinstance(gap, int | float | np.number) or not 0 <= gap <= 1:
        raise ValueError(f"gap must be a number from 0 to 1, got {gap!r}")
    return {
        "identities": identities,
        "test_identities": held_out,
        "images": integer("images", images, 1),
        "size": [integer("size: height", size[0], 32), integer("size: width", size[1], 16)],
        "seed": integer("seed", seed, 0),
        # A world without a gap is what it always was; another depends on these constants too.
        **({"gap": float(gap), "gap_table": {**GAP, "types": TYPES}} if gap else {}),
    }


def _holds_world(root: Path, parameters: dict[str, Any]) -> bool:
    """True for a complete world of these parameters, False for nothing; anything else must not be touched."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = read_json(root / "synthetic.json")
        if found["version"] == VERSION and found["parameters"] == parameters:
            return True
        reason = printable(f"a world of {found['parameters']}, version {found['version']}")[:500]
    except (OSError, ValueError, TypeError, KeyError):
        reason = "files that are not a synthetic world"
    raise ValueError(
        f"root: {root} holds {reason}; asked for {parameters}, version {VERSION}: "
        "name another folder or remove this one"
    )


def _write_world(root: Path, parameters: dict[str, Any], progress: bool) -> None:
    splits = _split(parameters)
    people = sorted(sum(splits.values(), []))
    jobs = [(pid, camid) for pid in people for camid in _cameras_of(parameters["seed"], pid)]
    gap = parameters.get("gap", 0.0)
    cameras = {camid: Camera.draw(parameters["seed"], camid, gap) for camid in CAMERAS}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        done = [pool.submit(_write_job, root, parameters, pid, cameras[camid]) for pid, camid in jobs]
        with logs.progress(len(done), "render", "folder", progress) as bar:
            for job in as_completed(done):
                job.result()
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    (root / "exp").mkdir()
    for name, pids in splits.items():
        (root / "exp" / f"{name}_id.txt").write_text(",".join(map(str, pids)) + "\n")
    counts = {
        "train": _count(jobs, splits["train"] + splits["val"], parameters["images"]),
        "test": _count(jobs, splits["test"], parameters["images"]),
    }
    about = {"generator": "ecul synthesize", "version": VERSION, "parameters": parameters, "counts": counts}
    (root / "synthetic.json").write_text(json.dumps(about, indent=2) + "\n")


def _split(parameters: dict[str, Any]) -> dict[str, list[int]]:
    """Identities 1, 2, ... in one sequence, dealt to the three lists by the seed."""
    identities, held_out = parameters["identities"], parameters["test_identities"]
    order = np.random.default_rng([parameters["seed"], _SPLIT]).permutation(identities + held_out) + 1
    val = max(1, identities // 8)
    parts = np.split(order, [identities - val, identities])
    return {name: sorted(part.tolist()) for name, part in zip(("train", "val", "test"), parts, strict=True)}


def _cameras_of(seed: int, pid: int) -> list[int]:
    """The cameras that see this person: all, or one or two fewer; two visible and one infrared at least."""
    rng = np.random.default_rng([seed, _MISSING, pid])
    missing = rng.choice(3, p=[0.7, 0.2, 0.1])
    visible = rng.permutation(VISIBLE_CAMERAS)
    if missing and rng.random() < 0.5:
        infrared = [rng.choice(INFRARED_CAMERAS)]
        return sorted(int(camid) for camid in [*visible[missing - 1 :], *infrared])
    return sorted(int(camid) for camid in [*visible[missing:], *INFRARED_CAMERAS])


def _count(jobs: list[tuple[int, int]], pids: list[int], images: int) -> dict[str, Any]:
    members = set(pids)
    seen = [camid for pid, camid in jobs if pid in members]
    cameras = {str(camid): images * seen.count(camid) for camid in CAMERAS}
    return {
        "visible": sum(cameras[str(camid)] for camid in VISIBLE_CAMERAS),
        "infrared": sum(cameras[str(camid)] for camid in INFRARED_CAMERAS),
        "cameras": cameras,
        "identities": len(pids),
    }


def _write_job(root: Path, parameters: dict[str, Any], pid: int, camera: "Camera") -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("writing images needs Pillow: pip install 'ecul[images]'") from error
    folder = root / f"cam{camera.camid}" / f"{pid:04d}"
    folder.mkdir(parents=True)
    images, size, gap = parameters["images"], parameters["size"], parameters.get("gap", 0.0)
    pictures = render(parameters["seed"], pid, camera, images, size, gap)
    for n, pixels in enumerate(pictures, 1):
        Image.fromarray(pixels).save(folder / f"{n:04d}.jpg", quality=90)


@dataclass(frozen=True)
class Camera:
    """What all images of one camera have in common. Lengths are fractions of the frame's height."""

    camid: int
    channels: int
    gain: np.ndarray
    gamma: float
    noise: float
    blur: float
    yaw: float
    scale: float
    wall: np.ndarray
    floor: np.ndarray
    horizon: float
    boxes: tuple[tuple[float, float, float, float, np.ndarray], ...]  # x, y, half, tall, tone
    slope: np.ndarray  # how much brighter it is to the right and downwards, per half a height

    @classmethod
    def draw(cls, seed: int, camid: int, gap: float = 0.0) -> "Camera":
        """The camera of this number in the world of this seed and gap."""
        rng = np.random.default_rng([seed, _CAMERA, camid])
        channels = 1 if camid in INFRARED_CAMERAS else 3
        light = np.random.default_rng([seed, _LIGHT, camid])
        cast = 1 + gap * GAP["cast"] * light.uniform(-1, 1, channels).astype(np.float32)
        turned = np.pi * (camid in SEEN_FROM_BEHIND)

        def tone(middle: float | np.ndarray) -> np.ndarray:
            return middle + rng.uniform(-0.2, 0.2) + rng.uniform(-0.06, 0.06, channels).astype(np.float32)

        def box() -> tuple[float, float, float, float, np.ndarray]:
            return (*rng.uniform([-0.35, 0.0, 0.03, 0.1], [0.35, 0.8, 0.15, 0.4]).tolist(), tone(wall))

        wall = tone(0.5)
        return cls(
            camid=camid,
            channels=channels,
            gain=rng.uniform(0.9, 1.15) * rng.uniform(0.92, 1.08, channels).astype(np.float32) * cast,
            gamma=rng.uniform(0.85, 1.2),
            noise=rng.uniform(0.005, 0.02),
            blur=rng.uniform(0.8, 1.5) / 64,
            yaw=turned + rng.uniform(-0.45, 0.45),
            scale=rng.uniform(0.94, 1.0),
            wall=wall,
            floor=tone(0.5),
            horizon=rng.uniform(0.6, 0.85),
            boxes=tuple(box() for _ in range(4)),
            slope=gap * GAP["slope"] * light.uniform(-1, 1, 2).astype(np.float32),
        )


# What changes from image to image: the lowest and the highest value of each.
SHOT = {
    "yaw": (-0.35, 0.35),
    "phase": (-np.pi, np.pi),
    "shift_x": (-0.03, 0.03),
    "shift_y": (-0.03, 0.03),
    "zoom": (0.94, 1.04),
    "light": (0.88, 1.12),
    "sway": (-0.1, 0.1),
    "occluded": (0.0, 1.0),
    "side": (-1.0, 1.0),
    "kind": (0.0, 1.0),
    "gray": (0.1, 0.8),
}


def appearance(seed: int, pid: int, channels: int, gap: float = 0.0) -> tuple[Person, Tones]:
    """A person's shape, and the tones, as one modality shows them: 3 or 1 channels.

    Without a gap both modalities show the same shape, and the tones of one tell nothing about the other's.
    """

    def rng(*stream: int) -> np.random.Generator:
        return np.random.default_rng([seed, *stream])

    person, tones = Person.draw(rng(_PERSON, pid)), draw_tones(rng(_TONES, pid, channels), channels)
    if gap == 0:
        return person, tones
    own = rng(_TYPE, pid)
    person = mixed(person, Person.draw(rng(_TYPE, 0, int(own.integers(TYPES)))), own, gap * GAP["alike"])
    if channels == 1:
        cloth = rng(_CLOTH, pid)
        person = mixed(person, Person.draw(cloth), cloth, gap * GAP["redrawn"], CLOTH)
        for name, colour in draw_tones(rng(_TONES, pid, 3), 3).items():
            tones[name] += gap * GAP["law"] * (reflectance(colour) - tones[name])
        tones["weave"] = cloth.uniform([0, 0.06, 0.0], [np.pi, 0.14, gap * GAP["weave"]]).astype(np.float32)
    return person, tones


def render(
    seed: int, pid: int, camera: Camera, images: int, size: tuple[int, int], gap: float = 0.0
) -> list[np.ndarray]:
    """The images of one person before one camera: a list of uint8 (H, W, 3) visible or (H, W) infrared."""
    person, tones = appearance(seed, pid, camera.channels, gap)
    rngs = [np.random.default_rng([seed, _IMAGE, pid, camera.camid, n]) for n in range(images)]
    drawn = np.stack([rng.uniform(*zip(*SHOT.values(), strict=True)) for rng in rngs], 1)
    shot = dict(zip(SHOT, drawn.astype(np.float32)[..., None, None], strict=True))

    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    x, y = (x - width / 2) / height, y / height
    pixels = np.zeros((images, height, width, camera.channels), np.float32)
    _backdrop(Canvas(pixels, x + shot["sway"], y, camera.blur), camera)
    stature = 0.96 * person.height * camera.scale * shot["zoom"]
    crown = 0.97 + shot["shift_y"] - stature
    figure = Canvas(pixels, (x - shot["shift_x"]) / stature, (y - crown) / stature, camera.blur / stature)
    draw_person(figure, person, tones, camera.yaw + shot["yaw"], shot["phase"])
    _occlude(Canvas(pixels, x, y, camera.blur), shot)

    light = shot["light"] * (1 + 2 * (camera.slope[0] * x + camera.slope[1] * (y - 0.5)))
    pixels = np.clip(pixels * camera.gain * light[..., None], 0, 1) ** camera.gamma
    pixels += camera.noise * np.stack([rng.standard_normal(pixels.shape[1:], np.float32) for rng in rngs])
    pixels = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return list(pixels if camera.channels == 3 else pixels[..., 0])


def _backdrop(canvas: Canvas, camera: Camera) -> None:
    canvas.paint(canvas.y - 2, camera.wall)
    canvas.paint(camera.horizon - canvas.y, camera.floor)
    for x, y, half, tall, tone in camera.boxes:
        canvas.paint(canvas.trapezoid(x, y, y + tall, half, half), tone)


def _occlude(canvas: Canvas, shot: dict[str, np.ndarray]) -> None:
    """A post beside the middle or a box at the foot of one image in ten."""
    post = np.abs(canvas.x - 0.15 * shot["side"]) - 0.035
    box = 0.85 + 0.05 * shot["side"] - canvas.y
    shape = np.where(shot["kind"] < 0.5, post, box)
    canvas.paint(np.where(shot["occluded"] < 0.1, shape, np.inf), shot["gray"][..., None])
