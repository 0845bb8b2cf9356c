"""Defects that any surface may have: scratch, dent, stain, crack, hole and foreign fibre.

Each function gives the surface as it would be if the defect were everywhere it could be, and the defect's
coverage. The renderer mixes light by that coverage, so the mask says exactly where the picture changed.
Strength 1 is plain to see; about 0.3 is just over the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fettle.datasets.parts.canvas import Canvas, Field, coverage, noise, ramp
from fettle.datasets.parts.scene import Look, Scene
from fettle.datasets.parts.shapes import curve, stroke
from fettle.datasets.parts.surface import Colour, Surface, srgb, tint

Apply = Callable[[Scene, Canvas, np.random.Generator, Look], tuple[Surface, Field]]

_FIBRES: tuple[Colour, ...] = (srgb("#1d1b1a"), srgb("#e8e6e0"), srgb("#3c5a9a"), srgb("#8a4a38"))


def _strength(rng: np.random.Generator, weakest: float) -> float:
    """Log-uniform, so that faint defects are as common as plain ones."""
    return math.exp(rng.uniform(math.log(weakest), 0.0))


def _spot(scene: Scene, canvas: Canvas, rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """A random place at least `margin` inside the body and the picture, or the deepest of those tried."""
    best, place = math.inf, (0.0, 0.0)
    for x, y in rng.uniform(-0.92 + margin, 0.92 - margin, (60, 2)).tolist():
        row, column = (min(int((c + 1) / canvas.px), canvas.size - 1) for c in (y, x))
        depth = float(scene.body[row, column])
        if depth < best:
            best, place = depth, (x, y)
        if depth < -margin:
            break
    return place


def _wander(
    start: tuple[float, float], angle: float, length: float, bend: float, num: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A smooth line (num, 2) centred on `start`, bent by up to `bend` of its length."""
    along, across = (
        np.array([math.cos(angle), math.sin(angle)]),
        np.array([-math.sin(angle), math.cos(angle)]),
    )
    steps = np.linspace(-0.5, 0.5, 4)
    sway = rng.uniform(-bend, bend, 4)
    return curve(np.array(start) + length * (steps[:, None] * along + sway[:, None] * across), num)


def _ellipse(canvas: Canvas, rng: np.random.Generator, centre: tuple[float, float], size: float) -> Field:
    """Relative radius (1 on the outline) of a slightly irregular ellipse."""
    x, y = canvas.x - centre[0], canvas.y - centre[1]
    turn, flat = rng.uniform(0, math.pi), rng.uniform(0.62, 1.0)
    p, q = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    uneven = 1 + 0.07 * noise(rng, canvas.size, 9, 9)
    relative: Field = np.sqrt(p * p + (q / flat) ** 2) * uneven / size
    return relative


def scratch(scene: Scene, canvas: Canvas, rng: np.random.Generator, look: Look) -> tuple[Surface, Field]:
    """A long thin groove with tapered ends."""
    strength = _strength(rng, 0.3)
    line = _wander(
        _spot(scene, canvas, rng, 0.1), rng.uniform(0, math.pi), rng.uniform(0.3, 0.85), 0.12, 18, rng
    )
    width = max(rng.uniform(0.006, 0.011), 0.7 * canvas.px)
    taper = np.sqrt(np.sin(np.linspace(0.06, 0.94, 18) * math.pi)) * width
    distance = stroke(canvas, line, taper)
    groove = -0.007 * strength * ramp(-distance / width + 0.4)
    surface = replace(
        scene.surface,
        albedo=scene.surface.albedo * (1 + look.scratch * strength),
        height=scene.surface.height + groove,
    )
    return surface, coverage(distance, canvas.px)


def dent(scene: Scene, canvas: Canvas, rng: np.random.Generator, look: Look) -> tuple[Surface, Field]:
    """A shallow hollow: no colour changes, only the slope."""
    size = rng.uniform(0.07, 0.15)
    radius = _ellipse(canvas, rng, _spot(scene, canvas, rng, size * 0.8), size)
    depth = look.dent * _strength(rng, 0.3) * (size / 0.1)
    hollow = np.maximum(1 - radius * radius, 0)
    surface = replace(scene.surface, height=scene.surface.height - depth * hollow * np.sqrt(hollow))
    return surface, coverage((radius - 1) * size, canvas.px)


def stain(scene: Scene, canvas: Canvas, rng: np.random.Generator, look: Look) -> tuple[Surface, Field]:
    """A translucent blotch with a ragged soft edge; it dulls the shine."""
    size = rng.uniform(0.08, 0.2)
    radius = _ellipse(canvas, rng, _spot(scene, canvas, rng, size * 0.6), size)
    ragged = radius - 1 + 0.16 * noise(rng, canvas.size, 14, 14) + 0.07 * noise(rng, canvas.size, 40, 40)
    opacity = 0.62 * _strength(rng, 0.28)
    colour = look.stains[int(rng.integers(len(look.stains)))]
    ring = np.exp(-((ragged * size / 0.02) ** 2))  # a drop dries darkest at its rim
    thick = opacity * (0.75 + 0.25 * ring + 0.15 * noise(rng, canvas.size, 20, 20))
    surface = tint(scene.surface, colour, np.clip(thick, 0, 1))
    gloss = surface.gloss * (1 - 0.6 * opacity)
    return replace(surface, gloss=gloss), coverage(ragged * size, max(2.5 * canvas.px, 0.016))


def crack(scene: Scene, canvas: Canvas, rng: np.random.Generator, look: Look) -> tuple[Surface, Field]:
    """A jagged dark line that thins towards its ends, often with a branch."""
    angle = rng.uniform(0, math.pi) if look.grain is None else look.grain + rng.normal(0, 0.12)
    strength, length = _strength(rng, 0.22), rng.uniform(0.25, 0.6)
    jag = 0.55 if look.grain is None else 0.25
    width = max(0.0075 * rng.uniform(0.8, 1.5), 0.65 * canvas.px)

    def walk(start: NDArray[np.float64], heading: float, reach: float, num: int) -> NDArray[np.float64]:
        turns = heading + rng.normal(0, jag, num)
        steps = np.stack([np.cos(turns), np.sin(turns)], axis=1) * (reach / num)
        return np.concatenate([start[None], start + np.cumsum(steps, axis=0)])

    start = np.array(_spot(scene, canvas, rng, 0.08))
    one, other = walk(start, angle, length / 2, 9), walk(start, angle + math.pi, length / 2, 9)
    trunk = np.concatenate([other[::-1], one[1:]])
    thin = width * (0.35 + 0.65 * np.sin(np.linspace(0, math.pi, len(trunk))))
    distance = stroke(canvas, trunk, thin)
    if rng.random() < 0.6:
        side = walk(trunk[6], angle + rng.choice([-0.9, 0.9]), length * 0.3, 6)
        stroke(canvas, side, width * np.linspace(0.7, 0.3, len(side)), onto=distance)
    surface = replace(
        scene.surface,
        albedo=scene.surface.albedo * (1 - 0.35 * strength),
        exposed=scene.surface.exposed * (1 - 0.5 * strength),
        gloss=scene.surface.gloss * (1 - strength),
        height=scene.surface.height - 0.012 * strength * ramp(-distance / width + 0.5),
    )
    return surface, coverage(distance, canvas.px)


def hole(scene: Scene, canvas: Canvas, rng: np.random.Generator, look: Look) -> tuple[Surface, Field]:
    """A small opening with an upset lip; what lies below is in the shade."""
    size = rng.uniform(0.022, 0.055)
    x, y = _spot(scene, canvas, rng, size + 0.03)
    uneven = 0.1 * size * noise(rng, canvas.size, 24, 24)
    distance = np.sqrt((canvas.x - x) ** 2 + (canvas.y - y) ** 2) - size + uneven
    dark = coverage(distance + 0.25 * size, canvas.px)
    lip = 0.02 * ramp(1 - np.abs(distance + 0.1 * size) / (0.35 * size))
    upset = replace(scene.surface, height=scene.surface.height + lip)
    surface = replace(
        tint(upset, look.under, dark),
        gloss=upset.gloss * (1 - dark),
        metal=upset.metal * (1 - dark),
        exposed=upset.exposed + (0.8 - upset.exposed) * dark,
    )
    return surface, coverage(distance, canvas.px)


def fibre(scene: Scene, canvas: Canvas, rng: np.random.Generator, look: Look) -> tuple[Surface, Field]:
    """A stray hair or thread on top, with its thin shadow beside it (the shadow belongs to the mask)."""
    length = rng.uniform(0.35, 0.8)
    line = _wander(_spot(scene, canvas, rng, 0.05), rng.uniform(0, math.pi), length, 0.45, 26, rng)
    width = max(rng.uniform(0.005, 0.0085), 0.55 * canvas.px)
    distance = stroke(canvas, line, width)
    shadow = stroke(canvas, line + np.array([0.009, 0.011]), width)
    colour = _FIBRES[int(rng.integers(len(_FIBRES)))]
    hair = coverage(distance, canvas.px) * (0.45 + 0.5 * _strength(rng, 0.3))
    surface = tint(scene.surface, colour, hair)
    surface = replace(
        surface,
        metal=surface.metal * (1 - hair),
        gloss=surface.gloss * (1 - hair),
        exposed=(surface.exposed * (1 - 0.25 * (1 - hair))),
    )
    return surface, coverage(np.minimum(distance, shadow), canvas.px)


SURFACE_DEFECTS: dict[str, Apply] = {
    "scratch": scratch,
    "dent": dent,
    "stain": stain,
    "crack": crack,
    "hole": hole,
    "fibre": fibre,
}
