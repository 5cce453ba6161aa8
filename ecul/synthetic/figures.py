"""One walking person, painted as layers of signed distances: negative inside, in units of the stature.

Coordinates belong to the person: x points right from the middle of the body, y points down from the crown (0)
to the ground (1). Every edge, of a limb or of a stripe, is a signed distance, so one ramp makes it smooth or
blurred. Arrays are (images, height, width): one call draws all images that one camera takes of one person.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

HAIR = ("short", "bald", "long", "bun", "round", "hat")
LOWER = {"trousers": 1.0, "shorts": 0.42, "skirt": 0.40, "gown": 0.85}  # the share of the leg that is covered
BAGS = ("none", "backpack", "handbag", "sling")
TONES = ("skin", "hair", "upper", "upper2", "lower", "lower2", "shoes", "bag")
Person = dict[str, Any]  # by trait, what both modalities see; lengths are fractions of the stature
Tones = dict[str, np.ndarray]  # by name, (channels,) in [0, 1]; "weave" is a tilt, a period and a depth
Length = float | np.ndarray  # one for all images, or (images, 1, 1)
LUMA = np.array([0.299, 0.587, 0.114])
DYE = np.array([0.65, -0.85, 0.20])  # the chroma (red, green, blue) that reflects most infrared


def _wrap(t: np.ndarray, period: float) -> np.ndarray:
    """The offset of t from the nearest multiple of the period."""
    return t - period * np.round(t / period)


def _wave(t: np.ndarray, period: float) -> np.ndarray:
    """The signed distance of stripes: negative on the half period around each multiple."""
    return np.abs(_wrap(t, period)) - period / 4


def _checks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The signed distance of the squares where only one of two kinds of stripes is."""
    return np.maximum(np.minimum(a, b), -np.maximum(a, b))


# The signed distance of a cloth's second tone, from x and y (0 in its middle), a period and the half width.
# None: the cloth is plain.
PATTERNS: dict[str, Callable[..., np.ndarray | None]] = {
    "plain": lambda x, y, period, half: None,
    "rings": lambda x, y, period, half: _wave(y, period),
    "columns": lambda x, y, period, half: _wave(x, period),
    "checks": lambda x, y, period, half: _checks(_wave(x, 1.3 * period), _wave(y, 1.3 * period)),
    "dots": lambda x, y, period, half: np.hypot(_wrap(x, period), _wrap(y, period)) - 0.3 * period,
    "halves": lambda x, y, period, half: y,
    "diagonal": lambda x, y, period, half: _wave((x + y) / 2**0.5, period),
    "chevron": lambda x, y, period, half: _wave((np.abs(x) + y) / 2**0.5, period),
    "band": lambda x, y, period, half: np.abs(y) - 0.35 * period,
    "open": lambda x, y, period, half: np.abs(x) - 0.3 * half,
}
CLOTH = ("upper", "upper_period", "lower_pattern", "lower_period", "logo", "belt")  # the traits of the cloth


def draw_traits(rng: np.random.Generator) -> Person:
    """A random person."""

    def pick(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    build = rng.uniform(-1, 1)
    return {
        "height": rng.uniform(0.86, 1.0),
        "shoulders": 0.125 + 0.03 * build + rng.uniform(-0.012, 0.012),
        "hips": 0.105 + 0.025 * build + rng.uniform(-0.014, 0.014),
        "limb": 0.032 + 0.010 * build + rng.uniform(-0.003, 0.003),
        "head": rng.uniform(0.92, 1.15),
        "hair": pick(*HAIR),
        "hem": pick(0.44, 0.52, 0.62) + rng.uniform(-0.02, 0.02),
        "sleeve": pick(0.0, 0.45, 1.0),
        "upper": pick(*PATTERNS),
        "upper_period": pick(0.10, 0.16) * rng.uniform(0.95, 1.05),
        "lower": pick(*LOWER),
        "lower_width": rng.uniform(1.0, 1.5),
        "lower_pattern": pick(*tuple(PATTERNS)[:6]),
        "lower_period": pick(0.11, 0.17) * rng.uniform(0.95, 1.05),
        "boots": pick(0.0, 0.10, 0.19),
        "belt": rng.random() < 0.3,
        "logo": rng.random() < 0.3,
        "bag": pick(*BAGS),
        "bag_side": pick(-1, 1),
    }


def mixed(
    person: Person, other: Person, rng: np.random.Generator, share: float, names: Iterable[str] | None = None
) -> Person:
    """`person` with each of these traits, by default all, taken from `other` with probability `share`."""
    return person | {name: other[name] for name in names or person if rng.random() < share}


def reflectance(colour: np.ndarray) -> float:
    """How much infrared a dye of this colour reflects, 0.1 to 0.9. It depends on hue, not on brightness."""
    chroma = colour - colour.mean()
    return 0.5 + 0.4 * (chroma @ DYE) / (np.linalg.norm(chroma) * np.linalg.norm(DYE) + 1e-6)


def draw_tones(rng: np.random.Generator, channels: int) -> Tones:
    """The tones of one person in one modality: a dict of (channels,) float32 arrays in [0, 1].

    The two tones of a garment differ by at least 0.5 in brightness. Either one may be the brighter.
    """
    tones = {name: rng.uniform(0.12, 0.88) for name in ("shoes", "bag")}
    tones["skin"] = rng.uniform(0.5, 0.75)
    tones["hair"] = rng.uniform(0.08, 0.5)
    for name in ("upper", "lower"):
        dark = rng.uniform(0.08, 0.30)
        tones[name], tones[name + "2"] = rng.permutation([dark, dark + rng.uniform(0.5, 0.65)])
    return {name: _tint(rng, tones[name], channels, 0.08 if name == "skin" else 0.4) for name in TONES}


def _tint(rng: np.random.Generator, brightness: float, channels: int, saturation: float) -> np.ndarray:
    """A colour of the given brightness (luma), as far from gray as `saturation` and [0, 1] allow."""
    if channels == 1:
        return np.array([brightness], np.float32)
    chroma = rng.normal(size=3)
    chroma -= LUMA @ chroma  # luma 0
    chroma *= saturation / np.abs(chroma).max()
    room = np.where(chroma > 0, 1 - brightness, brightness) / np.abs(chroma)
    return (brightness + min(1.0, room.min()) * chroma).astype(np.float32)


class Canvas(NamedTuple):
    """Pixels (images, height, width, channels), the coordinates of shapes on them, and the blur of edges."""

    pixels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    blur: Length

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """(images, height, width, 1): how much of each pixel lies inside, 0 to 1."""
        return np.clip(0.5 - distance / self.blur, 0, 1)[..., None]

    def paint(
        self, distance: np.ndarray, tone: np.ndarray, tone2: Any = None, pattern: np.ndarray | None = None
    ) -> None:
        """Lay `tone` inside `distance <= 0`, `tone2` where also `pattern <= 0`; darken towards the rim."""
        if pattern is not None:
            tone = tone + self.cover(pattern) * (tone2 - tone)
        rim = np.clip(1 + distance / 0.03, 0, 1)[..., None]
        self.pixels[:] += self.cover(distance) * (tone * (1 - 0.55 * rim) - self.pixels)

    def capsule(self, ax: Length, ay: Length, bx: Length, by: Length, radius: Length) -> np.ndarray:
        """The distance of a line from (ax, ay) to (bx, by) that is `radius` thick and has round ends."""
        dx, dy = bx - ax, by - ay
        px, py = self.x - ax, self.y - ay
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
        return np.hypot(px - along * dx, py - along * dy) - radius

    def ellipse(self, cx: Length, cy: Length, rx: Length, ry: Length) -> np.ndarray:
        """The distance, near its edge, of an ellipse around (cx, cy)."""
        return (np.hypot((self.x - cx) / rx, (self.y - cy) / ry) - 1) * np.minimum(rx, ry)

    def trapezoid(
        self, cx: Length, top: Length, bottom: Length, half: Length, half_below: Length
    ) -> np.ndarray:
        """The distance of a trapezoid around x = cx with these half widths at its top and bottom."""
        down = np.clip((self.y - top) / (bottom - top), 0, 1)
        half = half + down * (half_below - half)
        return np.maximum(np.abs(self.x - cx) - half, np.maximum(top - self.y, self.y - bottom))


class Pose(NamedTuple):
    """How a person stands to the camera: (images, 1, 1) arrays."""

    front: np.ndarray  # 1 from the front, -1 from behind
    side: np.ndarray  # 1 walking to the right, -1 to the left
    broad: np.ndarray  # how wide the trunk looks; seen from above it is an ellipse
    stride: np.ndarray  # how far the right foot is ahead in the image


def draw_person(canvas: Canvas, person: Person, tones: Tones, yaw: np.ndarray, phase: np.ndarray) -> None:
    """Paint a person seen from `yaw` (0 = from the front) at a walking `phase`: (images, 1, 1) radians."""
    front, side = np.cos(yaw), np.sin(yaw)
    stride = np.sin(phase) * (0.2 + 0.8 * np.abs(side)) * np.where(side < 0, -1, 1)
    pose = Pose(front, side, np.sqrt(front**2 + (0.75 * side) ** 2), stride)
    if "weave" in tones:
        tilt, period, depth = tones["weave"]
        wave = np.sin((canvas.x * np.cos(tilt) + canvas.y * np.sin(tilt)) * (2 * np.pi / period))[..., None]
        tones = tones | {name: tones[name] + depth * wave for name in ("upper", "upper2", "lower", "lower2")}
    half = 0.5 * person["shoulders"] * np.abs(front) + 0.05 * np.abs(side)
    backpack = canvas.trapezoid(-0.11 * side, 0.20, 0.36, 0.9 * half, half) - 0.01
    if person["bag"] == "backpack":
        canvas.paint(backpack, tones["bag"])
    _draw_legs(canvas, person, tones, pose)
    middle = (canvas.x - 0.03 * side, canvas.y - 0.31)
    cloth = PATTERNS[person["upper"]](*middle, person["upper_period"], person["shoulders"])
    garment = (tones["upper"], tones["upper2"], cloth)
    _draw_trunk(canvas, person, tones, pose, garment)
    hands = _draw_arms(canvas, person, tones, pose, garment[: 1 if person["upper"] == "open" else 3])
    _draw_head(canvas, person, tones, pose)
    if person["bag"] == "backpack":
        canvas.paint(np.where(front < -0.2, backpack, np.inf), tones["bag"])
    if person["bag"] == "handbag":
        canvas.paint(canvas.trapezoid(hands[person["bag_side"]], 0.50, 0.65, 0.04, 0.065), tones["bag"])
    if person["bag"] == "sling":
        tilt = person["bag_side"] * np.where(front < 0, -1, 1) * pose.broad
        strap = canvas.capsule(-0.8 * person["shoulders"] * tilt, 0.18, 0.11 * tilt, 0.48, 0.014)
        pouch = canvas.trapezoid(0.12 * tilt, 0.45, 0.58, 0.065, 0.065)
        canvas.paint(np.minimum(strap, pouch), tones["bag"])


def _draw_legs(canvas: Canvas, person: Person, tones: Tones, pose: Pose) -> None:
    """Legs, shoes and the lower garment."""
    cover, limb, hips = LOWER[person["lower"]], person["limb"], person["hips"]
    skirt, wide = person["lower"] in ("skirt", "gown"), limb * person["lower_width"]
    middle = (canvas.x - 0.02 * pose.side, canvas.y - (0.5 + 0.23 * cover))
    cloth = PATTERNS[person["lower_pattern"]](*middle, person["lower_period"], hips)
    garment = (tones["lower"], tones["lower2"], cloth)
    for leg in (-1, 1):
        hip = leg * 0.5 * hips * pose.front
        foot = hip + 0.11 * leg * pose.stride
        lift = 0.02 * np.maximum(0, leg * pose.stride)
        knee = 0.5 * (hip + foot) + 0.02 * pose.side
        canvas.paint(canvas.capsule(hip, 0.50, knee, 0.73, limb * 1.15), tones["skin"])
        canvas.paint(canvas.capsule(knee, 0.73, foot, 0.95 - lift, limb * 0.85), tones["skin"])
        if not skirt:
            thigh = min(1.0, 2 * cover)
            end = (hip + thigh * (knee - hip), 0.50 + thigh * 0.23)
            canvas.paint(canvas.capsule(hip, 0.50, *end, wide * 1.15), *garment)
            if cover > 0.5:
                canvas.paint(canvas.capsule(knee, 0.73, foot, 0.93 - lift, wide), *garment)
        shoe = canvas.capsule(foot, 0.965 - lift, foot + 0.05 * pose.side, 0.975 - lift, 0.028)
        shoe = np.maximum(shoe, canvas.y - 1)
        if person["boots"]:
            top = foot + (knee - foot) * 0.6
            shoe = np.minimum(shoe, canvas.capsule(foot, 0.96 - lift, top, 0.96 - person["boots"], 0.038))
        canvas.paint(shoe, tones["shoes"])
    half = hips * pose.broad
    seam = 0.5 + 0.46 * cover if skirt else 0.53
    flare = 0.7 + 0.5 * person["lower_width"] if skirt else 1.0
    canvas.paint(canvas.trapezoid(0, 0.42, seam, half, half * flare), *garment)


def _draw_trunk(canvas: Canvas, person: Person, tones: Tones, pose: Pose, garment: tuple) -> None:
    """Neck, upper garment, belt and, on the chest, a logo."""
    canvas.paint(canvas.capsule(0, 0.12, 0, 0.18, 0.028), tones["skin"])
    top, bottom = person["shoulders"] * pose.broad, (person["hips"] + 0.01) * pose.broad
    trunk = canvas.trapezoid(0, 0.175, person["hem"], top - 0.015, bottom) - 0.012
    canvas.paint(trunk, *garment)
    if person["belt"]:
        canvas.paint(np.maximum(trunk, np.abs(canvas.y - 0.45) - 0.016), tones["bag"])
    if person["logo"]:
        logo = canvas.ellipse(0.05 * pose.side, 0.27, 0.05, 0.04)
        canvas.paint(np.where(pose.front > 0.2, logo, np.inf), tones["shoes"])


def _draw_arms(
    canvas: Canvas, person: Person, tones: Tones, pose: Pose, garment: tuple
) -> dict[int, np.ndarray]:
    """Arms and sleeves; returns the x of each hand."""
    hands, limb = {}, person["limb"]
    for arm in (-1, 1):
        shoulder = arm * (person["shoulders"] - 0.005) * pose.front
        hand = shoulder + 0.03 * arm * pose.front - 0.10 * arm * pose.stride
        elbow = 0.5 * (shoulder + hand) + 0.012 * arm * pose.front - 0.012 * pose.side
        canvas.paint(canvas.capsule(shoulder, 0.20, elbow, 0.34, limb * 0.75), tones["skin"])
        canvas.paint(canvas.capsule(elbow, 0.34, hand, 0.49, limb * 0.65), tones["skin"])
        if person["sleeve"] > 0:
            canvas.paint(canvas.capsule(shoulder, 0.20, elbow, 0.32, limb * 0.98), *garment)
        if person["sleeve"] > 0.5:
            canvas.paint(canvas.capsule(elbow, 0.33, hand, 0.45, limb * 0.88), *garment)
        hands[arm] = hand
    return hands


def _draw_head(canvas: Canvas, person: Person, tones: Tones, pose: Pose) -> None:
    """Face and hair; from behind the hair covers the face."""
    side, rx, ry = pose.side, 0.05 * person["head"], 0.066 * person["head"]
    hanging = canvas.trapezoid(-0.025 * side, 0.05, 0.25, rx + 0.012, rx + 0.03) - 0.01
    if person["hair"] == "long":
        canvas.paint(hanging, tones["hair"])
    canvas.paint(canvas.ellipse(0.01 * side, 0.075, rx, ry), tones["skin"])
    if person["hair"] == "bald":
        return
    if person["hair"] == "round":
        crown = canvas.ellipse(-0.02 * side, 0.06, rx + 0.045, ry + 0.025)
    else:
        crown = canvas.ellipse(-0.012 * side, 0.068, rx + 0.012, ry + 0.010)
    crown = np.maximum(crown, canvas.y - np.where(pose.front < 0, 0.11, 0.055))
    if person["hair"] == "bun":
        crown = np.minimum(crown, canvas.ellipse(-0.05 * side, -0.005, 0.035, 0.035))
    if person["hair"] == "hat":
        brim = canvas.trapezoid(0.03 * side, 0.04, 0.06, 0.10, 0.10)
        crown = np.minimum(np.maximum(crown, canvas.y - 0.05), brim)
    canvas.paint(crown, tones["hair"])
    if person["hair"] == "long":
        canvas.paint(np.where(pose.front < 0, hanging, np.inf), tones["hair"])
