"""Signed distances (negative inside, canvas units) and strokes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fettle.datasets.parts.canvas import Canvas, Field

_FAR = 10.0


def circle(u: Field, v: Field, radius: float, centre: tuple[float, float] = (0.0, 0.0)) -> Field:
    return np.sqrt((u - centre[0]) ** 2 + (v - centre[1]) ** 2) - radius


def rounded_box(u: Field, v: Field, half_width: float, half_height: float, corner: float) -> Field:
    across = np.abs(u) - (half_width - corner)
    down = np.abs(v) - (half_height - corner)
    outside: Field = np.sqrt(np.maximum(across, 0) ** 2 + np.maximum(down, 0) ** 2)
    return outside + np.minimum(np.maximum(across, down), 0) - corner


def hexagon(u: Field, v: Field, apothem: float) -> Field:
    """Regular hexagon with flats left and right; exact at the flats, a lower bound beyond the corners."""
    half, root = 0.5, math.sqrt(3) / 2
    slanted = np.abs(u) * half + np.abs(v) * root
    return np.maximum(np.abs(u), slanted) - apothem


def stroke(
    canvas: Canvas,
    points: NDArray[np.float64],
    radii: NDArray[np.float64] | float,
    *,
    onto: Field | None = None,
    reach: float = 0.03,
) -> Field:
    """Distance to a line of varying thickness.

    Args:
        points: (N, 2) corners (x, y) of the line, canvas units.
        radii: half thickness at each corner, (N,) or one number.
        onto: distance to lines drawn before; this one is joined to them in place.
        reach: how far from the line's edge the distance must be right; farther pixels say "far".
    """
    distance = canvas.full(_FAR) if onto is None else onto
    if isinstance(radii, float):
        radii = np.full(len(points), radii)
    x, y = canvas.x[0], canvas.y[:, 0]
    for i in range(len(points) - 1):
        (ax, ay), (bx, by) = points[i].tolist(), points[i + 1].tolist()
        start, end = float(radii[i]), float(radii[i + 1])
        pad = max(start, end) + reach
        left, right = np.searchsorted(x, (min(ax, bx) - pad, max(ax, bx) + pad))
        top, bottom = np.searchsorted(y, (min(ay, by) - pad, max(ay, by) + pad))
        if left == right or top == bottom:
            continue
        px, py = x[None, left:right] - ax, y[top:bottom, None] - ay
        dx, dy = bx - ax, by - ay
        along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
        gap = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2) - (start + (end - start) * along)
        window = distance[top:bottom, left:right]
        np.minimum(window, gap, out=window)
    return distance


def strokes(canvas: Canvas, lines: Sequence[NDArray[np.float64]], radius: float) -> Field:
    """Distance to several lines of one half thickness."""
    distance = canvas.full(_FAR)
    for line in lines:
        stroke(canvas, line, radius, onto=distance)
    return distance


def curve(controls: NDArray[np.float64], num: int) -> NDArray[np.float64]:
    """A Bezier curve as (num, 2) points, from its control points (N, 2)."""
    t = np.linspace(0, 1, num)[:, None]
    degree = len(controls) - 1
    basis = [math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)]
    points: NDArray[np.float64] = np.concatenate(basis, axis=1) @ controls
    return points


# Strokes of the printed characters in a box 1 wide and 1 high, y downwards.
_GLYPHS: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "A": (((0, 1), (0.5, 0), (1, 1)), ((0.2, 0.65), (0.8, 0.65))),
    "E": (((1, 0), (0, 0), (0, 1), (1, 1)), ((0, 0.5), (0.8, 0.5))),
    "F": (((0, 1), (0, 0), (1, 0)), ((0, 0.5), (0.8, 0.5))),
    "K": (((0, 0), (0, 1)), ((1, 0), (0, 0.55), (1, 1))),
    "L": (((0, 0), (0, 1), (1, 1)),),
    "M": (((0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)),),
    "T": (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),
    "-": (((0.15, 0.5), (0.85, 0.5)),),
    "0": (
        ((0.25, 0), (0.75, 0), (1, 0.25), (1, 0.75), (0.75, 1), (0.25, 1), (0, 0.75), (0, 0.25), (0.25, 0)),
    ),
    "1": (((0.2, 0.2), (0.5, 0), (0.5, 1)),),
    "2": (((0, 0.2), (0.25, 0), (0.75, 0), (1, 0.2), (1, 0.4), (0, 1), (1, 1)),),
    "4": (((0.7, 1), (0.7, 0), (0, 0.7), (1, 0.7)),),
    "7": (((0, 0), (1, 0), (0.35, 1)),),
    "8": (
        ((0.25, 0), (0.75, 0), (1, 0.22), (0.75, 0.46), (0.25, 0.46), (0, 0.22), (0.25, 0)),
        ((0.25, 0.46), (0.75, 0.46), (1, 0.73), (0.75, 1), (0.25, 1), (0, 0.73), (0.25, 0.46)),
    ),
}


def glyph(character: str, left: float, top: float, width: float, height: float) -> list[NDArray[np.float64]]:
    """The lines of one printed character in the box given."""
    scale, corner = np.array([width, height]), np.array([left, top])
    return [np.array(line) * scale + corner for line in _GLYPHS[character]]
