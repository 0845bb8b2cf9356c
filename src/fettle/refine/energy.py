"""The energy of a picture, or of a window of it: how much of it looks unlike good.

Sections named in comments are those of the refiner's specification.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fettle.layers.pixel_map import valid_tokens
from fettle.protocols import Crops, Method, Unbounded


class Box(NamedTuple):
    """A square or whole part of a frame, px."""

    top: int
    left: int
    height: int
    width: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns, to index the last two dimensions with."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def hinged(energy: Tensor, kappa: float | None) -> Tensor:
    """max(0, z - kappa); z itself without a hinge (section 3)."""
    return energy if kappa is None else (energy - kappa).clamp_min(0)


def patch_energies(
    method: Method, pictures: Tensor, valid: Tensor, origins: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """Settled patch energies z, (B, h, w), without a bound where the method has such; of parts of frames
    where their origins are given."""
    if isinstance(method, Unbounded):
        return method.unbounded_energy(pictures, valid, origins).float()
    if origins is None:
        return method.patch_energy(pictures, valid).float()
    assert isinstance(method, Crops)  # see `crop_step`
    return method.crop_energy(pictures, valid, origins).float()


def crop_step(method: Method) -> int | None:
    """What a crop's place must be a multiple of, px; None where the method takes whole frames only.

    A vision transformer's levels have one stride: it looks at everything at once, and is not cropped.
    """
    known = [method.backbone.spec.level(name) for name in method.levels]
    strides = {level.stride for level in known if level is not None}
    if not isinstance(method, Crops | Unbounded) or len(strides) < 2:
        return None
    return math.lcm(16, *strides)


def rim_weights(box: Box, frame: tuple[int, int], grid: tuple[int, int], rim: float) -> Tensor:
    """(h, w): 0 for patches whose centre lies within `rim` px of a side of the box that is not a side of
    the frame, where the network's padding stands in for the surroundings; else 1."""

    def along(start: int, length: int, total: int, count: int) -> Tensor:
        centre = (torch.arange(count) + 0.5) * length / count
        inside = torch.ones(count, dtype=torch.bool)
        if start > 0:
            inside &= centre >= rim
        if start + length < total:
            inside &= centre <= length - rim
        return inside.float()

    rows = along(box.top, box.height, frame[0], grid[0])
    columns = along(box.left, box.width, frame[1], grid[1])
    return rows[:, None] * columns


@dataclass(frozen=True)
class WindowEnergy:
    """E(N) of windows N of pictures: the sum of weighted, hinged patch energies.

    Attributes:
        valid: (B, 1, H, W) bool, of the windows.
        weight: (B, h, w): 0 on the rim of a crop and where no pixel is valid.
        origins: (top, left) of each window; None: windows are whole frames.
        kappa: hinge.
    """

    method: Method
    valid: Tensor
    weight: Tensor
    origins: tuple[tuple[int, int], ...] | None
    kappa: float | None

    @staticmethod
    def of(
        method: Method,
        valid: Tensor,
        boxes: Sequence[Box],
        frame: tuple[int, int],
        grid: tuple[int, int],
        *,
        cropped: bool,
        rim: float,
        kappa: float | None,
        near: Tensor | None = None,
    ) -> WindowEnergy:
        """Of windows of one size that lie at `boxes` in frames (H, W); `grid` is that of their patches.

        `near` (B, 1, h, w) bool, px of the windows: only patches that hold such a pixel count; None: all do.
        """
        rims = torch.stack([rim_weights(box, frame, grid, rim) for box in boxes]).to(valid.device)
        origins = tuple((box.top, box.left) for box in boxes) if cropped else None
        counted = valid_tokens(valid if near is None else valid & near, grid)
        return WindowEnergy(method, valid, rims * counted, origins, kappa)

    def patches(self, windows: Tensor) -> Tensor:
        """Settled patch energies z of windows (B, 3, H, W), (B, h, w)."""
        return patch_energies(self.method, windows, self.valid, self.origins)

    def excess(self, windows: Tensor) -> Tensor:
        """Weighted, hinged patch energies, (B, h, w): their sum is the window's energy."""
        return self.weight * hinged(self.patches(windows), self.kappa)

    def __call__(self, windows: Tensor) -> Tensor:
        """(B,)"""
        return self.excess(windows).flatten(1).sum(dim=1)

    def rows(self, numbers: Sequence[int]) -> WindowEnergy:
        """Of these windows, in this order; one may come several times."""
        place = list(numbers)
        origins = None if self.origins is None else tuple(self.origins[i] for i in place)
        return WindowEnergy(self.method, self.valid[place], self.weight[place], origins, self.kappa)


@torch.no_grad()
def in_parts(energy: WindowEnergy, windows: Tensor, size: int) -> Tensor:
    """Excess (n, h, w) of n versions (n, 3, H, W) of one window, at most `size` at once."""
    starts = range(0, len(windows), size)
    parts = [windows[start : start + size] for start in starts]
    return torch.cat([energy.rows([0] * len(part)).excess(part) for part in parts])
