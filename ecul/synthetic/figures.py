"""One walking person as layers of signed distances: negative inside, in units of the person's stature.

Coordinates belong to the person: x to the right of the body's middle, y down from the crown (0) to the ground
(1). Every edge, of a limb or of a stripe, is a signed distance, so that one ramp makes it smooth or blurred.
Arrays are (images, height, width): one call draws every image that one camera takes of one person.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

PATTERNS = ("plain", "rings", "columns", "checks", "dots", "halves", "diagonal", "chevron", "band", "open")
LOWER_PATTERNS = ("plain", "rings", "columns", "checks", "dots", "halves")
HAIR = ("short", "bald", "long", "bun", "round", "hat")
LOWER = {"trousers": 1.0, "shorts": 0.42, "skirt": 0.40, "gown": 0.85}  # how much of the leg each one covers
BAGS = ("none", "backpack", "handbag", "sling")
TONES = ("skin", "hair", "upper", "upper2", "lower", "lower2", "shoes", "bag")
Tones = dict[str, np.ndarray]  # by name, (channels,) in [0, 1]; "weave" is a tilt, a period and a depth
Length = float | np.ndarray  # one for all images, or (images, 1, 1)
LUMA = np.array([0.299, 0.587, 0.114])
DYE = np.array([0.65, -0.85, 0.20])  # the direction of chroma, red, green, blue, that reflects infrared most


@dataclass(frozen=True)
class Person:
    """Everything about an identity that both modalities see. Lengths are fractions of the stature."""

    height: float
    shoulders: float
    hips: float
    limb: float
    head: float
    hair: str
    hem: float
    sleeve: float
    upper: str
    upper_period: float
    lower: str
    lower_width: float
    lower_pattern: str
    lower_period: float
    boots: float
    belt: bool
    logo: bool
    bag: str
    bag_side: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Person":
        """Somebody at random."""

        def pick(options: Sequence[Any]) -> Any:
            return options[int(rng.integers(len(options)))]

        build = rng.uniform(-1, 1)
        return cls(
            height=rng.uniform(0.86, 1.0),
            shoulders=0.125 + 0.03 * build + rng.uniform(-0.012, 0.012),
            hips=0.105 + 0.025 * build + rng.uniform(-0.014, 0.014),
            limb=0.032 + 0.010 * build + rng.uniform(-0.003, 0.003),
            head=rng.uniform(0.92, 1.15),
            hair=pick(HAIR),
            hem=pick([0.44, 0.52, 0.62]) + rng.uniform(-0.02, 0.02),
            sleeve=pick([0.0, 0.45, 1.0]),
            upper=pick(PATTERNS),
            upper_period=pick([0.10, 0.16]) * rng.uniform(0.95, 1.05),
            lower=pick(tuple(LOWER)),
            lower_width=rng.uniform(1.0, 1.5),
            lower_pattern=pick(LOWER_PATTERNS),
            lower_period=pick([0.11, 0.17]) * rng.uniform(0.95, 1.05),
            boots=pick([0.0, 0.10, 0.19]),
            belt=rng.random() < 0.3,
            logo=rng.random() < 0.3,
            bag=pick(BAGS),
            bag_side=pick([-1, 1]),
        )


TRAITS = tuple(field.name for field in fields(Person))
CLOTH = ("upper", "upper_period", "lower_pattern", "lower_period", "logo", "belt")


def mixed(
    person: Person, other: Person, rng: np.random.Generator, share: float, names: Iterable[str] = TRAITS
) -> Person:
    """`person` with each of these traits taken from `other` with probability `share`."""
    taken = [name for name in names if rng.random() < share]
    return replace(person, **{name: getattr(other, name) for name in taken})


def reflectance(colour: np.ndarray) -> float:
    """What a dye of this colour reflects in infrared, 0.1 to 0.9: its hue tells, not its brightness."""
    chroma = colour - colour.mean()
    return 0.5 + 0.4 * (chroma @ DYE) / (np.linalg.norm(chroma) * np.linalg.norm(DYE) + 1e-6)


def draw_tones(rng: np.random.Generator, channels: int) -> Tones:
    """The tones of one person in one modality: a dict of (channels,) float32 arrays in [0, 1].

    The two tones of a garment always differ by at least 0.5 in brightness; which one is the brighter is free.
    """
    tones = {name: rng.uniform(0.12, 0.88) for name in ("shoes", "bag")}
    tones["skin"] = rng.uniform(0.5, 0.75)
    tones["hair"] = rng.uniform(0.08, 0.5)
    for name in ("upper", "lower"):
        dark = rng.uniform(0.08, 0.30)
        tones[name], tones[name + "2"] = rng.permutation([dark, dark + rng.uniform(0.5, 0.65)])
    tints = {name: _tint(rng, tones[name], channels, 0.08 if name == "skin" else 0.4) for name in TONES}
    return {name: tint.astype(np.float32) for name, tint in tints.items()}


def _tint(rng: np.random.Generator, brightness: float, channels: int, saturation: float) -> np.ndarray:
    """A colour of the given brightness (luma), as far from gray as `saturation` and [0, 1] allow."""
    if channels == 1:
        return np.array([brightness])
    chroma = rng.normal(size=3)
    chroma -= LUMA @ chroma  # luma 0
    chroma *= saturation / np.abs(chroma).max()
    room = np.where(chroma > 0, 1 - brightness, brightness) / np.abs(chroma)
    return brightness + min(1.0, room.min()) * chroma


class Canvas:
    """Pixels (images, height, width, channels) and the coordinates in which shapes are painted on them."""

    def __init__(self, pixels: np.ndarray, x: np.ndarray, y: np.ndarray, blur: Length):
        self.pixels, self.x, self.y, self.blur = pixels, x, y, blur

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """(images, height, width, 1): how much of each pixel lies inside, 0 to 1."""
        return np.clip(0.5 - distance / self.blur, 0, 1)[..., None]

    def paint(
        self,
        distance: np.ndarray,
        tone: np.ndarray,
        tone2: np.ndarray | None = None,
        pattern: np.ndarray | None = None,
        shade: float = 0.55,
    ) -> None:
        """Lay `tone` inside `distance <= 0`, `tone2` where also `pattern <= 0`; darken towards the rim."""
        if tone2 is not None and pattern is not None:
            tone = tone + self.cover(pattern) * (tone2 - tone)
        rim = np.clip(1 + distance / 0.03, 0, 1)[..., None]
        self.pixels += self.cover(distance) * (tone * (1 - shade * rim) - self.pixels)

    def capsule(self, ax: Length, ay: Length, bx: Length, by: Length, radius: Length) -> np.ndarray:
        """The distance of a line from (ax, ay) to (bx, by), thick by the radius, with round ends."""
        dx, dy = bx - ax, by - ay
        px, py = self.x - ax, self.y - ay
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
        return np.hypot(px - along * dx, py - along * dy) - radius

    def ellipse(self, cx: Length, cy: Length, rx: Length, ry: Length) -> np.ndarray:
        """The distance, near its edge, of an ellipse around (cx, cy)."""
        return (np.hypot((self.x - cx) / rx, (self.y - cy) / ry) - 1) * np.minimum(rx, ry)

    def trapezoid(
        self, cx: Length, top: Length, bottom: Length, half_top: Length, half_bottom: Length
    ) -> np.ndarray:
        """The distance of a trapezoid around x = cx, of these half widths at its top and bottom."""
        down = np.clip((self.y - top) / (bottom - top), 0, 1)
        half = half_top + down * (half_bottom - half_top)
        return np.maximum(np.abs(self.x - cx) - half, np.maximum(top - self.y, self.y - bottom))

    def pattern(self, kind: str, period: float, cx: Length, cy: Length, width: float) -> np.ndarray | None:
        """The signed distance of a cloth pattern whose middle is (cx, cy); None for plain cloth."""
        x, y = self.x - cx, self.y - cy
        if kind == "rings":
            return _wave(y, period)
        if kind == "columns":
            return _wave(x, period)
        if kind == "checks":
            a, b = _wave(x, 1.3 * period), _wave(y, 1.3 * period)
            return np.maximum(np.minimum(a, b), -np.maximum(a, b))
        if kind == "dots":
            return np.hypot(_wrap(x, period), _wrap(y, period)) - 0.3 * period
        if kind == "diagonal":
            return _wave((x + y) / 2**0.5, period)
        if kind == "chevron":
            return _wave((np.abs(x) + y) / 2**0.5, period)
        if kind == "halves":
            return y
        if kind == "band":
            return np.abs(y) - 0.35 * period
        if kind == "open":
            return np.abs(x) - 0.3 * width
        return None


def _woven(canvas: Canvas, tones: Tones) -> Tones:
    """The tones with a weave, a wave of brightness of some tilt, period and depth, on both garments."""
    tilt, period, depth = tones["weave"]
    wave = np.sin((canvas.x * np.cos(tilt) + canvas.y * np.sin(tilt)) * (2 * np.pi / period))[..., None]
    return tones | {name: tones[name] + depth * wave for name in ("upper", "upper2", "lower", "lower2")}


def _wrap(t: np.ndarray, period: float) -> np.ndarray:
    """The offset of t from the nearest multiple of the period."""
    return t - period * np.round(t / period)


def _wave(t: np.ndarray, period: float) -> np.ndarray:
    """The signed distance of stripes: negative on the half period around each multiple."""
    return np.abs(_wrap(t, period)) - period / 4


class Pose(NamedTuple):
    """How a person stands to the camera: (images, 1, 1) arrays."""

    front: np.ndarray  # 1 from the front, -1 from behind
    side: np.ndarray  # 1 walking to the right, -1 to the left
    broad: np.ndarray  # how wide the trunk, an ellipse from above, looks
    stride: np.ndarray  # how far the right foot is ahead, as seen

    @classmethod
    def at(cls, yaw: np.ndarray, phase: np.ndarray) -> "Pose":
        """The pose seen from `yaw` at a walking `phase`, in radians."""
        front, side = np.cos(yaw), np.sin(yaw)
        stride = np.sin(phase) * (0.2 + 0.8 * np.abs(side)) * np.where(side < 0, -1, 1)
        return cls(front, side, np.sqrt(front**2 + (0.75 * side) ** 2), stride)


def draw_person(canvas: Canvas, person: Person, tones: Tones, yaw: np.ndarray, phase: np.ndarray) -> None:
    """Paint a person, seen from `yaw` (0 = from the front) at a walking `phase`: (images, 1, 1) radians."""
    pose = Pose.at(yaw, phase)
    if "weave" in tones:
        tones = _woven(canvas, tones)
    if person.bag == "backpack":
        canvas.paint(_backpack(canvas, person, pose), tones["bag"])
    _draw_legs(canvas, person, tones, pose)
    _draw_trunk(canvas, person, tones, pose)
    hands = _draw_arms(canvas, person, tones, pose)
    _draw_head(canvas, person, tones, pose)
    if person.bag == "backpack":
        canvas.paint(_where(pose.front < -0.2, _backpack(canvas, person, pose)), tones["bag"])
    if person.bag == "handbag":
        hand = hands[person.bag_side]
        canvas.paint(canvas.trapezoid(hand, 0.50, 0.65, 0.04, 0.065), tones["bag"])
    if person.bag == "sling":
        tilt = person.bag_side * np.where(pose.front < 0, -1, 1) * pose.broad
        strap = canvas.capsule(-0.8 * person.shoulders * tilt, 0.18, 0.11 * tilt, 0.48, 0.014)
        pouch = canvas.trapezoid(0.12 * tilt, 0.45, 0.58, 0.065, 0.065)
        canvas.paint(np.minimum(strap, pouch), tones["bag"])


def _where(seen: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The shape in the images where it is seen, nothing in the others."""
    return np.where(seen, distance, np.inf)


def _draw_legs(canvas: Canvas, person: Person, tones: Tones, pose: Pose) -> None:
    """Legs, shoes and the lower garment."""
    cover = LOWER[person.lower]
    skirt = person.lower in ("skirt", "gown")
    middle = 0.5 + 0.23 * cover
    cloth = canvas.pattern(person.lower_pattern, person.lower_period, 0.02 * pose.side, middle, person.hips)
    garment = (tones["lower"], tones["lower2"], cloth)
    for leg in (-1, 1):
        hip = leg * 0.5 * person.hips * pose.front
        foot = hip + 0.11 * leg * pose.stride
        lift = 0.02 * np.maximum(0, leg * pose.stride)
        knee = 0.5 * (hip + foot) + 0.02 * pose.side
        canvas.paint(canvas.capsule(hip, 0.50, knee, 0.73, person.limb * 1.15), tones["skin"])
        canvas.paint(canvas.capsule(knee, 0.73, foot, 0.95 - lift, person.limb * 0.85), tones["skin"])
        if not skirt:
            thigh = min(1.0, 2 * cover)
            wide = person.limb * person.lower_width
            end_x, end_y = hip + thigh * (knee - hip), 0.50 + thigh * 0.23
            canvas.paint(canvas.capsule(hip, 0.50, end_x, end_y, wide * 1.15), *garment)
            if cover > 0.5:
                canvas.paint(canvas.capsule(knee, 0.73, foot, 0.93 - lift, wide), *garment)
        shoe = canvas.capsule(foot, 0.965 - lift, foot + 0.05 * pose.side, 0.975 - lift, 0.028)
        shoe = np.maximum(shoe, canvas.y - 1)
        if person.boots:
            shin = canvas.capsule(foot, 0.96 - lift, foot + (knee - foot) * 0.6, 0.96 - person.boots, 0.038)
            shoe = np.minimum(shoe, shin)
        canvas.paint(shoe, tones["shoes"])
    half = person.hips * pose.broad
    seam = 0.5 + 0.46 * cover if skirt else 0.53
    flare = 0.7 + 0.5 * person.lower_width if skirt else 1.0
    canvas.paint(canvas.trapezoid(0, 0.42, seam, half, half * flare), *garment)


def _draw_trunk(canvas: Canvas, person: Person, tones: Tones, pose: Pose) -> None:
    """Neck, upper garment, belt and, on the chest, a logo."""
    canvas.paint(canvas.capsule(0, 0.12, 0, 0.18, 0.028), tones["skin"])
    cloth = canvas.pattern(person.upper, person.upper_period, 0.03 * pose.side, 0.31, person.shoulders)
    top, bottom = person.shoulders * pose.broad, (person.hips + 0.01) * pose.broad
    trunk = canvas.trapezoid(0, 0.175, person.hem, top - 0.015, bottom) - 0.012
    canvas.paint(trunk, tones["upper"], tones["upper2"], cloth)
    if person.belt:
        canvas.paint(np.maximum(trunk, np.abs(canvas.y - 0.45) - 0.016), tones["bag"])
    if person.logo:
        logo = canvas.ellipse(0.05 * pose.side, 0.27, 0.05, 0.04)
        canvas.paint(_where(pose.front > 0.2, logo), tones["shoes"])


def _draw_arms(canvas: Canvas, person: Person, tones: Tones, pose: Pose) -> dict[int, np.ndarray]:
    """Arms and sleeves; returns where each hand is."""
    kind = "plain" if person.upper == "open" else person.upper
    cloth = canvas.pattern(kind, person.upper_period, 0.03 * pose.side, 0.31, person.shoulders)
    garment = (tones["upper"], tones["upper2"], cloth)
    hands = {}
    for arm in (-1, 1):
        shoulder = arm * (person.shoulders - 0.005) * pose.front
        hand = shoulder + 0.03 * arm * pose.front - 0.10 * arm * pose.stride
        elbow = 0.5 * (shoulder + hand) + 0.012 * arm * pose.front - 0.012 * pose.side
        canvas.paint(canvas.capsule(shoulder, 0.20, elbow, 0.34, person.limb * 0.75), tones["skin"])
        canvas.paint(canvas.capsule(elbow, 0.34, hand, 0.49, person.limb * 0.65), tones["skin"])
        if person.sleeve > 0:
            canvas.paint(canvas.capsule(shoulder, 0.20, elbow, 0.32, person.limb * 0.98), *garment)
        if person.sleeve > 0.5:
            canvas.paint(canvas.capsule(elbow, 0.33, hand, 0.45, person.limb * 0.88), *garment)
        hands[arm] = hand
    return hands


def _draw_head(canvas: Canvas, person: Person, tones: Tones, pose: Pose) -> None:
    """Face and hair; from behind the hair covers the face."""
    side, rx, ry = pose.side, 0.05 * person.head, 0.066 * person.head
    hanging = canvas.trapezoid(-0.025 * side, 0.05, 0.25, rx + 0.012, rx + 0.03) - 0.01
    if person.hair == "long":
        canvas.paint(hanging, tones["hair"])
    canvas.paint(canvas.ellipse(0.01 * side, 0.075, rx, ry), tones["skin"])
    if person.hair == "bald":
        return
    if person.hair == "round":
        crown = canvas.ellipse(-0.02 * side, 0.06, rx + 0.045, ry + 0.025)
    else:
        crown = canvas.ellipse(-0.012 * side, 0.068, rx + 0.012, ry + 0.010)
    crown = np.maximum(crown, canvas.y - np.where(pose.front < 0, 0.11, 0.055))
    if person.hair == "bun":
        crown = np.minimum(crown, canvas.ellipse(-0.05 * side, -0.005, 0.035, 0.035))
    if person.hair == "hat":
        brim = canvas.trapezoid(0.03 * side, 0.04, 0.06, 0.10, 0.10)
        crown = np.minimum(np.maximum(crown, canvas.y - 0.05), brim)
    canvas.paint(crown, tones["hair"])
    if person.hair == "long":
        canvas.paint(_where(pose.front < 0, hanging), tones["hair"])


def _backpack(canvas: Canvas, person: Person, pose: Pose) -> np.ndarray:
    """A box on the back, painted behind the body and, from behind, over it too."""
    half = 0.5 * person.shoulders * np.abs(pose.front) + 0.05 * np.abs(pose.side)
    return canvas.trapezoid(-0.11 * pose.side, 0.20, 0.36, 0.9 * half, half) - 0.01
