"""Defects drawn onto good pictures, with exact masks: what a refiner's settings are chosen on.

A scratch is a thin bent line, brighter or darker; a stain is a soft tinted spot; "foreign" is filled from
another place (`bench.pasted`). They lie where the picture holds something.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from fettle.bench.pasted import Pasted, paste_defect

KINDS = ("scratch", "stain", "foreign")

_FINE = 4  # times finer than the picture are outlines drawn
_WIDTH = (0.006, 0.016)  # of a scratch, of the shorter side
_LENGTH = (0.1, 0.4)
_SCRATCH = (25.0, 70.0)  # grey levels
_RADIUS = (0.04, 0.12)  # of a stain
_STAIN = (0.55, 0.85)  # factor of the light that it leaves
_TINT = 0.1
_SOFT = 0.004  # of the shorter side: standard deviation of an edge


def draw_defect(picture: NDArray[np.uint8], kind: str, rng: np.random.Generator) -> Pasted:
    """One defect of a kind of `KINDS`. The argument stays as it is.

    Args:
        picture: (H, W, 3).
    """
    if kind == "foreign":
        return paste_defect(picture, picture, rng)
    cover = _scratch(picture, rng) if kind == "scratch" else _stain(picture, rng)  # (H, W), 0..1
    light = picture.astype(np.float32)
    if kind == "scratch":
        brighter = 1 if rng.random() < 0.5 else -1
        if abs(float(light[cover > 0.5].mean()) - 127.5) > 80:  # away from the end that is near
            brighter = 1 if light[cover > 0.5].mean() < 127.5 else -1
        changed = light + brighter * rng.uniform(*_SCRATCH)
    else:
        changed = light * (rng.uniform(*_STAIN) + rng.uniform(-_TINT, _TINT, 3).astype(np.float32))
    mixed = light + cover[..., None] * (changed - light)
    drawn: NDArray[np.uint8] = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
    return Pasted(drawn, cover > 0.5)


def _scratch(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    side = min(picture.shape[:2])
    y, x = _place(picture, rng)
    length, angle = side * rng.uniform(*_LENGTH), rng.uniform(0, math.pi)
    ends = np.array([[-0.5, 0.0], [0.0, rng.uniform(-0.3, 0.3)], [0.5, 0.0]]) * length
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    first, bend, last = ends @ turn + np.array([x, y])
    t = np.linspace(0, 1, 40)[:, None]
    line = (1 - t) ** 2 * first + 2 * t * (1 - t) * bend + t**2 * last
    width = max(round(_FINE * side * rng.uniform(*_WIDTH)), _FINE)
    canvas = _canvas(picture)
    ImageDraw.Draw(canvas).line([tuple(p) for p in (line * _FINE).tolist()], fill=255, width=width)
    return _cover(canvas, picture, 0.0)


def _stain(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    side = min(picture.shape[:2])
    y, x = _place(picture, rng)
    angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    radius = side * rng.uniform(*_RADIUS)
    number = np.arange(1, 4)
    heights, phases = rng.uniform(-0.2, 0.2, 3) / number, rng.uniform(0, 2 * math.pi, 3)
    waves = (heights * np.cos(number * angles[:, None] + phases)).sum(axis=1)
    around = radius * (1 + waves)[:, None] * np.stack([np.cos(angles), 0.7 * np.sin(angles)], axis=1)
    canvas = _canvas(picture)
    points = ((around + np.array([x, y])) * _FINE).tolist()
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=255)
    return _cover(canvas, picture, side * _SOFT)


def _place(picture: NDArray[np.uint8], rng: np.random.Generator) -> tuple[int, int]:
    """A random pixel, likelier where the surroundings are not flat."""
    grey = picture.astype(np.float32).mean(axis=2)
    spread = ndimage.gaussian_filter(ndimage.gaussian_gradient_magnitude(grey, 1), 4).ravel() + 1e-3
    place = int(np.searchsorted(np.cumsum(spread), rng.random() * spread.sum()))
    y, x = divmod(min(place, spread.size - 1), picture.shape[1])
    return y, x


def _canvas(picture: NDArray[np.uint8]) -> Image.Image:
    return Image.new("L", (picture.shape[1] * _FINE, picture.shape[0] * _FINE))


def _cover(canvas: Image.Image, picture: NDArray[np.uint8], blur: float) -> NDArray[np.float32]:
    """Share of each pixel that is covered, (H, W)."""
    small = canvas.resize((picture.shape[1], picture.shape[0]), Image.Resampling.BOX)
    cover = np.asarray(small, np.float32) / 255
    blurred: NDArray[np.float32] = np.asarray(ndimage.gaussian_filter(cover, blur)).astype(np.float32)
    return blurred
