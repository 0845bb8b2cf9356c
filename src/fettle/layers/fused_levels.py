"""Levels of a backbone side by side on one fine grid."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.layers.token_grid import Align, aligned_to

_STEM = 2  # stride of a ResNet's first level before its max-pool
_LONGEST = 32  # positions along the longer side, where no stride is given


class FusedLevels:
    """Side by side, (B, C, h, w), in the order of the levels.

    Args:
        strides: of each level, in picture px.
        align: how levels come to the grid.
        stride: picture px a position; None takes the finest level's, doubled until no side has more than 32.
        pool_stem: a level of stride 2 goes through a ResNet's max-pool first.
    """

    def __init__(self, strides: Mapping[str, int], align: Align, stride: int | None, pool_stem: bool) -> None:
        self._strides, self._align, self._stride, self._pool_stem = strides, align, stride, pool_stem

    def __call__(self, by_name: Mapping[str, Tensor], sides: tuple[int, int]) -> Tensor:
        """From levels (B, C, h, w) by name, of pictures with these sides, (H, W) px."""
        stride = self.stride(sides)
        grid = (sides[0] // stride, sides[1] // stride)
        levels = [self._stage(by_name[name], own) for name, own in self._strides.items()]
        return torch.cat([aligned_to(level, grid, self._align) for level in levels], dim=1)

    def stride(self, sides: tuple[int, int]) -> int:
        """Picture px a position."""
        if self._stride is not None:
            return self._stride
        stride = min(2 * own if self._pools(own) else own for own in self._strides.values())
        while max(sides) > _LONGEST * stride:
            stride *= 2
        return stride

    def recipe(self) -> str:
        """In words: what the result depends on besides the levels themselves."""
        stem = ", pooled stem" if self._pool_stem else ""
        return f"fused {','.join(self._strides)}, {self._align} at {self._stride}{stem}"

    def _stage(self, level: Tensor, stride: int) -> Tensor:
        return F.max_pool2d(level, 3, stride=2, padding=1) if self._pools(stride) else level

    def _pools(self, stride: int) -> bool:
        return self._pool_stem and stride == _STEM
