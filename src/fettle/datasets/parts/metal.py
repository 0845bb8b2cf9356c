"""Metal parts: a brushed plate, a hex nut and a spur gear."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fettle.datasets.parts.canvas import (
    Canvas,
    Draw,
    Field,
    Pose,
    coverage,
    noise,
    ramp,
    texture_side,
)
from fettle.datasets.parts.scene import Look, Product, Scene
from fettle.datasets.parts.shapes import circle, glyph, hexagon, rounded_box, strokes
from fettle.datasets.parts.surface import Surface, backdrop, cast_shadow, lay, plain, srgb, tint

_RUST = (srgb("#7a4a2c"), srgb("#4d3a30"), srgb("#8a7560"))


_FRACTURE = 0.02  # width of the slanted face along a break, canvas units


def _lost(sound: Field, cut: Field, px: float) -> Field:
    """Coverage of what a part lacks beyond `cut` (positive there), with its fracture face and edge pixels."""
    return coverage(np.maximum(sound - px, -cut - _FRACTURE), px)


_PLATE_HOLES = ((-0.66, -0.5), (0.66, -0.5), (-0.66, 0.5), (0.66, 0.5))
_HOLE_RADIUS, _SINK_RADIUS = 0.085, 0.135
_ENGRAVED = "FTL-204"


def _engraving(canvas: Canvas, pose: Pose, draw: Draw, fault: str | None) -> tuple[Field, Field | None]:
    """Coverage of the printed code, and of the character that a misprint left out, moved or exchanged."""
    radius, width, height, pitch = 0.0135, 0.078, 0.15, 0.125
    corners = [
        ((i - len(_ENGRAVED) / 2) * pitch + (pitch - width) / 2, -height / 2) for i in range(len(_ENGRAVED))
    ]
    printed = [glyph(c, *corner, width, height) for c, corner in zip(_ENGRAVED, corners, strict=True)]
    before: list[NDArray[np.float64]] = []
    after: list[NDArray[np.float64]] = []
    if fault == "misprint":
        rng = draw("misprint")
        wrong, kind = int(rng.integers(len(_ENGRAVED))), rng.choice(["gone", "moved", "other"])
        character, (left, top), before = _ENGRAVED[wrong], corners[wrong], printed[wrong]
        if kind == "moved":
            up = rng.uniform(0.035, 0.06)
            left, top = left + rng.uniform(-0.02, 0.02), top + (up if rng.random() < 0.5 else -up)
        elif kind == "other":
            character = str(rng.choice([c for c in "EKA718" if c != character]))
        after = [] if kind == "gone" else glyph(character, left, top, width, height)
        printed[wrong] = after
    px = canvas.px
    ink = coverage(strokes(canvas, [pose.place(line) for lines in printed for line in lines], radius), px)
    if not before:
        return ink, None
    old = strokes(canvas, [pose.place(line) for line in before], radius)
    new = strokes(canvas, [pose.place(line) for line in after], radius)
    either, both = np.minimum(old, new), np.maximum(old, new)
    return ink, coverage(np.maximum(either, -both) - px, px)  # one px more: no ghost of an edge stays


def brushed_plate(canvas: Canvas, draw: Draw, fault: str | None) -> Scene:
    """A brushed steel plate: four countersunk holes, a slot, a printed code. Faults: missing, misprint."""
    pose = Pose.jittered(draw, 0.04, math.radians(3))
    u, v = pose.local(canvas)
    px, side = canvas.px, texture_side(canvas)
    rng = draw("brushing")
    streaks = noise(rng, side, side, 9) * 0.55 + noise(rng, side, side // 2, 28) * 0.5
    streaks += noise(rng, side, 40, 3) * 0.35
    brushed = pose.carry(streaks, canvas)
    outline = rounded_box(u, v, 0.86, 0.7, 0.09)
    slot = rounded_box(u, v - np.float32(0.34), 0.3, 0.055, 0.055)
    gone = int(draw("fault").integers(4)) if fault == "missing" else -1
    holes, sink, changed = slot, slot - 0.022, None
    for i, (cx, cy) in enumerate(_PLATE_HOLES):
        ring = circle(u, v, _SINK_RADIUS, (cx, cy))
        if i == gone:
            changed = coverage(ring - 2 * px, px)
            continue
        holes = np.minimum(holes, ring + (_SINK_RADIUS - _HOLE_RADIUS))
        sink = np.minimum(sink, ring)
    body = np.maximum(outline, -holes)
    # A broad reflection of the lamp lies across the brushing, where it would on real brushed steel.
    band = np.exp(-(((u + rng.uniform(-0.45, 0.15)) / 0.55) ** 2))
    steel = plain(canvas, srgb("#b9bcc0"), gloss=0.35, metal=0.9, shininess=25)
    tone = 0.86 + 0.24 * band + 0.085 * brushed * (0.6 + 0.6 * band)
    chamfer = 0.016 * ramp(-outline / 0.03) - 0.045 * ramp(1 - (sink + 0.05) / 0.05)
    steel = replace(steel, albedo=steel.albedo * tone, height=chamfer + 0.0006 * brushed)
    ink, misprinted = _engraving(canvas, pose, draw, fault)
    steel = tint(steel, srgb("#2d3238"), ink * 0.86)
    steel = replace(steel, gloss=steel.gloss * (1 - 0.7 * ink), metal=steel.metal * (1 - 0.7 * ink))
    mat = backdrop(canvas, draw, srgb("#33373c"), grain=0.07)
    shadow = cast_shadow(rounded_box(u - np.float32(0.03), v - np.float32(0.03), 0.86, 0.7, 0.09), 0.1, 0.6)
    deep = 1 - 0.75 * ramp(-holes / 0.012)  # no light reaches the bottom of a hole
    mat = replace(mat, exposed=shadow * deep)
    return Scene(lay(mat, steel, coverage(body, px)), body, changed if misprinted is None else misprinted)


def _turned(canvas: Canvas, draw: Draw, u: Field, v: Field, radius: Field, colour: str) -> Surface:
    """A lathe-turned face: fine rings, and the bow-tie highlight that rings give."""
    rng = draw("turning")
    rings = np.asarray(noise(rng, 256, 150, 1)[:, 0] * 0.7 + noise(rng, 256, 40, 1)[:, 0] * 0.6, np.float32)
    ring = rings[np.minimum((radius * 255).astype(np.int32), 255)]
    wear = noise(rng, canvas.size, 5, 5)
    # cos(2 (angle - a)) without trigonometry on pixels; it stays with the lamp, not with the part.
    turn = 2 * math.radians(-45 + rng.uniform(-14, 14))
    squared = np.maximum(u * u + v * v, 1e-4)
    bow = (math.cos(turn) * (u * u - v * v) + math.sin(turn) * 2 * u * v) / squared
    steel = plain(canvas, srgb(colour), gloss=0.4, metal=0.85, shininess=22)
    tone = 0.96 + 0.15 * bow * np.abs(bow) + 0.06 * ring + 0.03 * wear
    return replace(steel, albedo=steel.albedo * tone, height=0.0005 * ring)


def hex_nut(canvas: Canvas, draw: Draw, fault: str | None) -> Scene:
    """A chamfered hex nut with a threaded bore on a green belt. Fault: missing (a corner broken off)."""
    pose = Pose.jittered(draw, 0.06, math.radians(30))
    u, v = pose.local(canvas)
    px = canvas.px
    radius = np.sqrt(u * u + v * v)
    flats = np.maximum(hexagon(u, v, 0.66), radius - 0.755)
    outline, changed = flats, None
    if fault == "missing":
        rng = draw("fault")
        angle = math.radians(90 + 60 * int(rng.integers(6)) + rng.uniform(-9, 9))
        jagged = noise(rng, canvas.size, 26, 26) * 0.008 + noise(rng, canvas.size, 8, 8) * 0.016
        cut = u * math.cos(angle) + v * math.sin(angle) - rng.uniform(0.57, 0.66) + jagged
        outline = np.maximum(flats, cut)
        changed = _lost(flats, cut, px)
    bore, minor = 0.36, 0.285
    x, y = canvas.x - pose.shift_x, canvas.y - pose.shift_y
    steel = _turned(canvas, draw, x + 0 * y, y + 0 * x, radius, "#a9adb3")
    chamfer = (
        -0.16 * np.maximum(radius - 0.62, 0) + 0.03 * ramp(-flats / 0.045) + 0.02 * ramp(-outline / _FRACTURE)
    )
    countersink = -0.07 * ramp(1 - (radius - bore) / 0.055)
    steel = replace(steel, height=steel.height + chamfer + countersink)
    # The thread seen from above: a spiral of crests and grooves that darkens downwards.
    spiral = np.sin((radius - minor) * (2 * math.pi / 0.03) + np.arctan2(y, x))
    depth = ramp((radius - minor + 0.02) / (bore - minor + 0.02))
    facing = (x + y) / (
        np.maximum(radius, 0.05) * math.sqrt(2)
    )  # the wall towards the lamp is in its own shade
    shade = (0.22 + 0.38 * depth) * (1 + 0.55 * spiral) * (1 + 0.4 * facing)
    thread = coverage(radius - bore, px)
    steel = replace(
        steel,
        exposed=steel.exposed + (shade - steel.exposed) * thread,
        gloss=steel.gloss * (1 - 0.6 * thread),
    )
    belt = _belt(canvas, draw)
    light = cast_shadow(hexagon(u, v, 0.66), 0.09, 0.35) * cast_shadow(
        circle(x, y, 0.7, (0.07, 0.08)), 0.16, 0.5
    )
    light = light * (1 - 0.6 * ramp((minor - radius + 0.11 * facing) / 0.12))
    belt = replace(belt, exposed=light)
    body = np.maximum(outline, minor - radius)
    scene = lay(belt, steel, coverage(body, px))
    return Scene(scene, np.maximum(outline, bore - radius), changed)


def _belt(canvas: Canvas, draw: Draw) -> Surface:
    """A green conveyor belt with a faint diagonal lattice."""
    belt = backdrop(canvas, draw, srgb("#2f5d50"), grain=0.06)
    rng = draw("belt")
    shift = rng.uniform(0, 1)
    pitch = 2 * math.pi / 0.085
    lattice = np.sin((canvas.x + canvas.y + shift) * pitch) * np.sin((canvas.x - canvas.y - shift) * pitch)
    return replace(belt, height=belt.height + 0.0016 * lattice)


_TEETH = 20
_ROOT, _TIP = 0.62, 0.78


def _tooth(along: Field, across: Field) -> Field:
    """Distance to one tooth that points along +`along`: a trapezoid."""
    slope = math.radians(17)
    flank = across * math.cos(slope) + (along - 0.70) * math.sin(slope) - 0.056
    tooth: Field = np.maximum(flank, along - _TIP)
    return tooth


def spur_gear(canvas: Canvas, draw: Draw, fault: str | None) -> Scene:
    """A brass spur gear with a keyed hub and six lightening holes. Fault: missing (a tooth or half of it)."""
    pose = Pose.jittered(draw, 0.045, math.radians(9))
    u, v = pose.local(canvas)
    px = canvas.px
    radius = np.sqrt(u * u + v * v)
    angle = np.arctan2(v, u)
    sector = 2 * math.pi / _TEETH
    number = np.round(angle / sector)
    inner = angle - number * sector
    along, across = radius * np.cos(inner), np.abs(radius * np.sin(inner))
    tooth = _tooth(along, across)
    sound = np.minimum(radius - _ROOT, tooth)
    rim, changed = sound, None
    if fault == "missing":
        rng = draw("fault")
        broken = number % _TEETH == int(rng.integers(_TEETH))
        left = _ROOT + float(rng.choice([0.0, rng.uniform(0.03, 0.11)]))
        jagged = noise(rng, canvas.size, 30, 30) * 0.006
        cut = np.where(broken, along - left + jagged, np.float32(-9))
        rim = np.minimum(radius - _ROOT, np.maximum(tooth, cut))
        changed = _lost(tooth, cut, px)
    fold = np.mod(angle + math.pi / 6, math.pi / 3) - math.pi / 6
    lightening = circle(radius * np.cos(fold), radius * np.sin(fold), 0.088, (0.42, 0.0))
    keyed = np.minimum(radius - 0.15, np.maximum(np.abs(u) - 0.045, np.abs(v + 0.16) - 0.05))
    openings = np.minimum(lightening, keyed)
    body = np.maximum(rim, -openings)
    x, y = canvas.x - pose.shift_x, canvas.y - pose.shift_y
    brass = _turned(canvas, draw, x + 0 * y, y + 0 * x, radius, "#c9a455")
    # A raised hub, a thinner web, a raised rim.
    web = ramp((radius - 0.265) / 0.03) * ramp((0.555 - radius) / 0.03)
    relief = (
        0.016 * ramp(-sound / 0.03) + 0.01 * ramp(-rim / _FRACTURE) - 0.03 * web + 0.012 * ramp(keyed / 0.02)
    )
    relief = relief + 0.016 * ramp(lightening / 0.03)
    brass = replace(brass, height=brass.height + relief, exposed=brass.exposed * (1 - 0.13 * web))
    mat = backdrop(canvas, draw, srgb("#4a5868"), grain=0.075)
    light = cast_shadow(circle(x, y, 0.7, (0.045, 0.05)), 0.14, 0.55) * (1 - 0.5 * ramp(-openings / 0.02))
    mat = replace(mat, exposed=light)
    return Scene(lay(mat, brass, coverage(body, px)), body, changed)


BRUSHED_PLATE = Product(
    brushed_plate,
    ("missing", "misprint"),
    ("scratch", "dent", "stain", "crack", "hole", "fibre"),
    Look(scratch=0.5, stains=_RUST, under=srgb("#17191b"), dent=0.03),
)
HEX_NUT = Product(
    hex_nut,
    ("missing",),
    ("scratch", "dent", "stain", "crack", "fibre"),
    Look(scratch=0.45, stains=_RUST, under=srgb("#15201c"), dent=0.035),
)
SPUR_GEAR = Product(
    spur_gear,
    ("missing",),
    ("scratch", "dent", "stain", "crack", "hole", "fibre"),
    Look(
        scratch=0.4,
        stains=(srgb("#3f5a45"), srgb("#5a4a30"), srgb("#35302a")),
        under=srgb("#1b1f24"),
        dent=0.03,
    ),
)
