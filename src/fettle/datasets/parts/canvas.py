"""Where a part is drawn: coordinates, pose, named random streams, noise and anti-aliased coverage.

Lengths are in canvas units: the picture spans -1..1 on both axes, x to the right and y downwards, so that a
part looks the same at every size. One pixel is `canvas.px` = 2 / size wide.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Field = NDArray[np.floating]
"""One value a pixel, (H, W); float32 when it runs (NumPy's stubs lose that in `np.sqrt` and the like)."""

_TEXTURE_REACH = 1.2  # a texture covers -1.2..1.2, so that a turned and shifted part never leaves it


@dataclass(frozen=True)
class Canvas:
    """A square picture of `size` px."""

    size: int

    @property
    def px(self) -> float:
        """Width of one pixel, canvas units."""
        return 2.0 / self.size

    @property
    def x(self) -> Field:
        """(1, W): centres of the columns, -1..1."""
        return _axis(self.size)[None, :]

    @property
    def y(self) -> Field:
        """(H, 1): centres of the rows, -1..1."""
        return _axis(self.size)[:, None]

    def full(self, value: float) -> Field:
        return np.full((self.size, self.size), value, np.float32)


@lru_cache(maxsize=16)
def _axis(size: int) -> Field:
    axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    axis.setflags(write=False)
    return axis


@dataclass(frozen=True)
class Draw:
    """The random streams of one picture. A stream depends on its name, never on what was drawn before."""

    key: str

    def __call__(self, purpose: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.key}/{purpose}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))


@dataclass(frozen=True)
class Pose:
    """How a part lies: shift (canvas units) and angle (radians, clockwise on the picture)."""

    shift_x: float
    shift_y: float
    angle: float

    @classmethod
    def jittered(cls, draw: Draw, shift: float, angle: float) -> Pose:
        """A pose with shift up to `shift` (canvas units) and angle up to `angle` (radians) either way."""
        rng = draw("pose")
        return cls(rng.uniform(-shift, shift), rng.uniform(-shift, shift), rng.uniform(-angle, angle))

    def local(self, canvas: Canvas) -> tuple[Field, Field]:
        """The part's own coordinates (u, v) of each pixel, (H, W) each."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y = canvas.x - self.shift_x, canvas.y - self.shift_y
        return cos * x + sin * y, cos * y - sin * x

    def place(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (N, 2) of the part on the canvas."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        u, v = points[:, 0], points[:, 1]
        return np.stack([cos * u - sin * v + self.shift_x, sin * u + cos * v + self.shift_y], axis=1)

    def carry(self, texture: Field, canvas: Canvas) -> Field:
        """A texture drawn in the part's own frame (`texture_side` px), as it lies on the canvas."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        step = texture.shape[0] / (2 * _TEXTURE_REACH)  # texture px a canvas unit
        matrix = np.array([[cos, -sin], [sin, cos]]) * canvas.px * step  # (row, column) from (row, column)
        first = canvas.px / 2 - 1  # centre of the first pixel
        x, y = first - self.shift_x, first - self.shift_y
        corner = np.array([cos * y - sin * x, cos * x + sin * y])
        offset = (corner + _TEXTURE_REACH) * step - 0.5
        out = canvas.full(0)
        ndimage.affine_transform(
            texture, matrix, offset, output=out, output_shape=out.shape, order=1, mode="nearest"
        )
        return out


def texture_side(canvas: Canvas) -> int:
    """Side of a texture for `Pose.carry`, px."""
    return math.ceil(canvas.size * _TEXTURE_REACH)


def ramp(value: Field) -> Field:
    """Smooth step: 0 below 0, 1 above 1, 3 t^2 - 2 t^3 between."""
    t = np.minimum(np.maximum(value, 0), 1)
    smooth = t * -2
    smooth += 3
    smooth *= t
    smooth *= t
    return smooth


def coverage(distance: Field, px: float) -> Field:
    """Share of each pixel inside a shape, from its signed distance (negative inside), both canvas units."""
    return ramp(0.5 - distance / (1.5 * px))


def union(first: Field, second: Field) -> Field:
    """Coverage of either of two shapes."""
    return np.maximum(first, second)


@lru_cache(maxsize=256)
def _spline_matrix(num_out: int, cells: int) -> Field:
    """(num_out, cells + 3): uniform cubic B-spline interpolation of a random lattice."""
    position = (np.arange(num_out) + 0.5) * cells / num_out
    lower = np.minimum(position.astype(int), cells - 1)
    t = position - lower
    weights = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    matrix = np.zeros((num_out, cells + 3), np.float32)
    for tap, weight in enumerate(weights):
        matrix[np.arange(num_out), lower + tap] = weight / 6
    matrix /= math.sqrt(float((matrix.astype(np.float64) ** 2).sum(axis=1).mean()))  # unit variance
    matrix.setflags(write=False)
    return matrix


def noise(rng: np.random.Generator, side: int, rows: int, columns: int) -> Field:
    """Smooth noise (side, side), mean 0 and variance 1, with `rows` x `columns` cells over the field.

    An axis with `side` cells or more is left white.
    """
    num = [min(cells, side) for cells in (rows, columns)]
    grid: Field = rng.standard_normal([n if n == side else n + 3 for n in num], dtype=np.float32)
    if num[0] < side:
        grid = _spline_matrix(side, num[0]) @ grid
    if num[1] < side:
        grid = grid @ _spline_matrix(side, num[1]).T
    return grid
