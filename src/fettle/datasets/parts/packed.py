"""Plastic and packaging: a printed bottle cap and a blister of pills."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fettle.datasets.parts.canvas import Canvas, Draw, Field, Pose, coverage, noise, ramp, union
from fettle.datasets.parts.scene import Look, Product, Scene
from fettle.datasets.parts.shapes import circle, curve, glyph, rounded_box, strokes
from fettle.datasets.parts.surface import Surface, backdrop, cast_shadow, lay, plain, srgb, tint

_BADGE = "FETTLE"


def _leaf() -> list[NDArray[np.float64]]:
    """The printed emblem: two curved strokes and a stem."""
    left = curve(np.array([[0.0, -0.23], [-0.26, -0.1], [-0.16, 0.13], [0.0, 0.17]]), 10)
    right = curve(np.array([[0.0, -0.23], [0.26, -0.1], [0.16, 0.13], [0.0, 0.17]]), 10)
    return [left, right, np.array([[0.0, -0.1], [0.0, 0.23]])]


def _print(canvas: Canvas, pose: Pose, draw: Draw, fault: str | None) -> tuple[Field, Field | None]:
    """Coverage of the cap's print, and of what a misprint changed in it."""
    px, (width, height, pitch) = canvas.px, (0.066, 0.105, 0.108)
    lefts = [(i - len(_BADGE) / 2) * pitch + (pitch - width) / 2 for i in range(len(_BADGE))]
    letters = [glyph(c, left, 0.29, width, height) for c, left in zip(_BADGE, lefts, strict=True)]
    emblem = strokes(canvas, [pose.place(line) for line in _leaf()], 0.019)
    ink, changed = coverage(emblem, px), None
    if fault == "misprint":
        rng = draw("misprint")
        kind, turn = rng.choice(["letter", "emblem", "double"]), rng.uniform(0, 2 * math.pi)
        if kind == "letter":  # one letter is left out; one px more, so that no ghost of its edge stays
            gone = letters.pop(int(rng.integers(len(letters))))
            changed = coverage(strokes(canvas, [pose.place(line) for line in gone], 0.0125) - px, px)
        elif kind == "emblem":  # the pad lifted: a band of the emblem carries no ink
            u, v = pose.local(canvas)
            band = np.abs(u * math.cos(turn) + v * math.sin(turn) - rng.uniform(-0.08, 0.08))
            lost = coverage(band - rng.uniform(0.03, 0.06), px)
            ink, changed = ink * (1 - lost), coverage(emblem - px, px) * lost
        else:  # the emblem was printed twice, the second time beside the first
            step = rng.uniform(0.03, 0.06) * np.array([math.cos(turn), math.sin(turn)])
            second = strokes(canvas, [pose.place(line + step) for line in _leaf()], 0.019)
            ink = union(ink, coverage(second, px) * 0.8)
            changed = coverage(np.maximum(second - px, -emblem), px)
    badge = strokes(canvas, [pose.place(line) for lines in letters for line in lines], 0.0125)
    return union(ink, coverage(badge, px)), changed


def bottle_cap(canvas: Canvas, draw: Draw, fault: str | None) -> Scene:
    """A ribbed red screw cap with a white print. Faults: misprint, missing (a bite out of the rim)."""
    pose = Pose.jittered(draw, 0.05, math.radians(8))
    u, v = pose.local(canvas)
    px = canvas.px
    radius = np.sqrt(u * u + v * v)
    angle = np.arctan2(v, u)
    ribs = np.cos(angle * 72)
    sound = radius - (0.80 + 0.009 * ribs)
    outline, changed = sound, None
    if fault == "missing":
        rng = draw("fault")
        at, bite = rng.uniform(0, 2 * math.pi), rng.uniform(0.06, 0.12)
        jagged = noise(rng, canvas.size, 22, 22) * 0.008 + noise(rng, canvas.size, 9, 9) * 0.012
        centre = (0.82 * math.cos(at), 0.82 * math.sin(at))
        bitten = circle(u, v, bite, centre) + jagged
        outline = np.maximum(sound, -bitten)
        changed = coverage(np.maximum(sound, bitten) - px, px)
    rng = draw("plastic")
    speckle = noise(rng, canvas.size, 100, 100)
    flow = noise(rng, canvas.size, 3, 3)
    plastic = plain(canvas, srgb("#b3262b"), gloss=0.55, shininess=38)
    wall = ramp((radius - 0.68) / 0.05)
    step = 0.02 * ramp((0.60 - radius) / 0.035)  # a raised face with a rounded shoulder
    shoulder = np.maximum(radius - 0.66, 0)
    dome = -0.10 * radius * radius - 0.75 * shoulder * np.sqrt(shoulder)
    height = dome + step + 0.0065 * wall * ribs + 0.00022 * speckle
    plastic = replace(
        plastic,
        albedo=plastic.albedo * (1 + 0.025 * flow + 0.02 * speckle),
        height=height,
        exposed=1 - wall * (0.22 - 0.16 * ribs),
    )
    ink, misprinted = _print(canvas, pose, draw, fault)
    plastic = tint(plastic, srgb("#efe9df"), ink * 0.93)
    table = backdrop(canvas, draw, srgb("#a9abaa"), grain=0.028)
    x, y = canvas.x - pose.shift_x, canvas.y - pose.shift_y
    light = cast_shadow(circle(x, y, 0.77, (0.085, 0.095)), 0.2, 0.5) * cast_shadow(radius - 0.79, 0.06, 0.35)
    table = replace(table, exposed=light)
    scene = lay(table, plastic, coverage(outline, px))
    return Scene(scene, outline + 0.03, changed if misprinted is None else misprinted)


_PITCH_U, _PITCH_V = 0.57, 0.6
_PILL, _DOME = 0.175, 0.245


def _nearest_cell(u: Field, v: Field) -> tuple[Field, Field, NDArray[np.int32]]:
    """Coordinates about the nearest pocket, and its number (row by row)."""
    column = np.clip(np.round(u / _PITCH_U), -1, 1)
    row = np.clip(np.round(v / _PITCH_V), -1, 1)
    return u - column * _PITCH_U, v - row * _PITCH_V, ((row + 1) * 3 + column + 1).astype(np.int32)


@dataclass(frozen=True)
class _Pills:
    """Distances to the pills as made and as left, to their shadows and to their scores."""

    made: Field
    left: Field
    shadow: Field
    score: Field
    number: NDArray[np.int32]
    changed: Field | None


def _pills(canvas: Canvas, draw: Draw, u: Field, v: Field, fault: str | None) -> _Pills:
    """Nine pills, each lying and turned in its own way, with the fault in one of them."""
    rng, px, far = draw("pills"), canvas.px, np.float32(9)
    du, dv, number = _nearest_cell(u, v)
    lie = rng.uniform(-0.022, 0.022, (9, 2)).astype(np.float32)
    turns = (rng.normal(0, 0.22, 9) + 0.6).astype(np.float32)
    pu, pv = du - lie[number, 0], dv - lie[number, 1]
    cos, sin = np.cos(turns)[number], np.sin(turns)[number]
    made = left = np.sqrt(pu * pu + pv * pv) - _PILL
    shadow = np.sqrt((pu - 0.018) ** 2 + (pv - 0.022) ** 2) - _PILL
    score, changed = np.abs(pu * sin - pv * cos) - np.float32(0.010), None
    rng = draw("fault")
    here = number == int(rng.integers(9))
    if fault == "missing":
        left, shadow = np.where(here, far, made), np.where(here, far, shadow)
        changed = coverage(np.where(here, made - np.float32(0.065), far), px)
    elif fault == "broken":
        turn = rng.uniform(0, 2 * math.pi)
        jagged = noise(rng, canvas.size, 34, 34) * 0.007
        cut = pu * math.cos(turn) + pv * math.sin(turn) - rng.uniform(-0.03, 0.09) + jagged
        left, shadow = (
            np.where(here, np.maximum(made, cut), made),
            np.where(here, np.maximum(shadow, cut), shadow),
        )
        changed = coverage(np.where(here, np.maximum(made, -cut) - np.float32(0.03), far), px)
    elif fault == "misprint":  # no score at all, or one square to where it belongs
        across = np.abs(pu * cos + pv * sin) - np.float32(0.010) if rng.random() < 0.5 else far
        wrong = np.where(here, across, score)
        touched = np.maximum(np.minimum(score, wrong) - np.float32(0.022), made)
        changed, score = coverage(np.where(here, touched, far), px), wrong
    return _Pills(made, left, shadow, score, number, changed)


def pill_blister(canvas: Canvas, draw: Draw, fault: str | None) -> Scene:
    """Nine scored pills under clear domes on knurled foil.

    Faults: missing (an empty pocket), misprint (no score, or one across), broken (half a pill).
    """
    pose = Pose.jittered(draw, 0.035, math.radians(3))
    u, v = pose.local(canvas)
    px = canvas.px
    pills = _pills(canvas, draw, u, v, fault)
    rng = draw("powder")
    shades = rng.normal(1, 0.018, 9).astype(np.float32)
    powder = noise(rng, canvas.size, 115, 115)
    tablet = plain(canvas, srgb("#e6dcc6"), gloss=0.06, shininess=16)
    outward = np.square(np.clip(1 + pills.made / _PILL, 0, 1))
    bulge = 0.05 * (1 - outward * outward) - 0.018 * ramp(-pills.score / 0.02 + 0.5)
    tablet = replace(
        tablet,
        albedo=tablet.albedo * (shades[pills.number] + 0.022 * powder),
        height=bulge + 0.0007 * powder,
        exposed=1 - 0.3 * ramp(-pills.score / 0.012 + 0.3),
    )
    du, dv, _ = _nearest_cell(u, v)
    dome = np.sqrt(du * du + dv * dv) - _DOME
    facing = -(du + dv) / (np.maximum(dome + _DOME, 0.02) * math.sqrt(2))  # 1 on the lamp's side
    foil = _foil(canvas, draw, u, v, dome, facing)
    foil = replace(foil, exposed=foil.exposed * cast_shadow(pills.shadow, 0.05, 0.6))
    packed = lay(foil, tablet, coverage(pills.left, px))
    # The clear dome: a bright arc on the lamp's side and a thin dark rim; it lets the rest through.
    arc = np.exp(-(((dome + 0.034) / 0.012) ** 2)) * ramp(facing * 1.6 - 0.5)
    rim = np.exp(-(((dome + 0.006) / 0.010) ** 2))
    albedo = packed.albedo * (1 - 0.05 * coverage(dome, px) - 0.28 * rim) + 0.85 * arc * (1 - rim)
    return Scene(replace(packed, albedo=albedo), rounded_box(u, v, 0.9, 0.93, 0.1), pills.changed)


def _foil(canvas: Canvas, draw: Draw, u: Field, v: Field, dome: Field, facing: Field) -> Surface:
    """Aluminium foil with a diamond knurl between the pockets; wrinkled and half in shade within."""
    rng = draw("foil")
    pitch = 2 * math.pi / 0.062
    knurl = np.sin((u + v) * pitch) * np.sin((u - v) * pitch)
    wrinkle = noise(rng, canvas.size, 14, 14)
    foil = plain(canvas, srgb("#b4b8bf"), gloss=0.3, metal=0.75, shininess=20)
    flat = ramp(-dome / 0.02)
    relief = 0.0032 * knurl * (1 - flat) + (0.0014 + 0.006 * flat) * wrinkle
    lip = 0.014 * ramp(1 - np.abs(dome) / 0.03)
    tone = 1 + 0.03 * noise(rng, canvas.size, 4, 4)
    walled = flat * (0.24 + 0.3 * ramp(1 + dome / 0.16) * facing)  # the pocket's wall shades its own side
    return replace(foil, albedo=foil.albedo * tone, height=relief + lip, exposed=1 - walled)


BOTTLE_CAP = Product(
    bottle_cap,
    ("misprint", "missing"),
    ("scratch", "dent", "stain", "crack", "hole", "fibre"),
    Look(
        scratch=0.35,
        stains=(srgb("#3c1414"), srgb("#6b4030"), srgb("#2f2326")),
        under=srgb("#1a0a0a"),
        dent=0.035,
    ),
)
PILL_BLISTER = Product(
    pill_blister,
    ("missing", "misprint", "broken"),
    ("scratch", "dent", "stain", "crack", "hole", "fibre"),
    Look(
        scratch=-0.3,
        stains=(srgb("#8a6a34"), srgb("#4b4a44"), srgb("#7a5a6a")),
        under=srgb("#101214"),
        dent=0.03,
    ),
)
