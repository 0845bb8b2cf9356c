"""Levels of a backbone side by side on one fine grid."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.errors import ConfigError
from fettle.layers.token_grid import Align, aligned_to

_STEM = 2  # stride of a ResNet's first level before its max-pool
_ROUNDING = 1e-6
_LONGEST = 32  # positions along the longer side, where no stride is given


class FusedLevels:
    """Side by side, (B, C, h, w), in the order of the levels.

    Args:
        strides: of each level, in picture px.
        align: how levels come to the grid.
        stride: picture px a position; None takes the finest level's grid, made smaller until no side is
            longer than 32.
        multiple: sides of such a grid are multiples of it.
        pool_stem: a level of stride 2 goes through a ResNet's max-pool first.
    """

    def __init__(
        self, strides: Mapping[str, int], align: Align, stride: int | None, multiple: int, pool_stem: bool
    ) -> None:
        self._strides, self._align, self._pool_stem = strides, align, pool_stem
        self._stride, self._multiple = stride, multiple

    def __call__(self, by_name: Mapping[str, Tensor], sides: tuple[int, int]) -> Tensor:
        """From levels (B, C, h, w) by name, of pictures with these sides, (H, W) px."""
        grid = self.grid(sides)
        levels = [self._stage(by_name[name], own) for name, own in self._strides.items()]
        return torch.cat([aligned_to(level, grid, self._align) for level in levels], dim=1)

    def grid(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the grid for pictures with these sides, px.

        Raises:
            ConfigError: the stride asked for makes no grid of whole patches.
        """
        if self._stride is not None:
            height, width = (side // self._stride for side in sides)
            if not height or not width or height % self._multiple or width % self._multiple:
                raise ConfigError(
                    f"A grid of {height} x {width} positions has no whole patches of {self._multiple}.",
                    "Use --set patch=1, or another size or grid_stride.",
                )
            return height, width
        finest = min(2 * own if self._pools(own) else own for own in self._strides.values())
        finest_sides = [side / finest for side in sides]
        shrink = max(max(finest_sides) / _LONGEST, 1)
        whole = [int(side / shrink / self._multiple + _ROUNDING) for side in finest_sides]
        height, width = (max(number, 1) * self._multiple for number in whole)
        return height, width

    def recipe(self) -> str:
        """In words: what the result depends on besides the levels themselves."""
        stem = ", pooled stem" if self._pool_stem else ""
        grid = f"at {self._stride}" if self._stride else f"in multiples of {self._multiple}"
        return f"fused {','.join(self._strides)}, {self._align} {grid}{stem}"

    def _stage(self, level: Tensor, stride: int) -> Tensor:
        return F.max_pool2d(level, 3, stride=2, padding=1) if self._pools(stride) else level

    def _pools(self, stride: int) -> bool:
        return self._pool_stem and stride == _STEM
