"""Guided filter: smooths a map and keeps the edges of a guiding picture.

He, Sun, Tang, Guided image filtering, TPAMI 2013, equations 4 to 8.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fettle.layers.pixel_map import pixel_map

_RADIUS = 8  # px at a side of 256
_EPS = 1e-3


def box_mean(values: Tensor, radius: int) -> Tensor:
    """Mean over squares of side 2 radius + 1; half-sample borders (d c b a | a b c d), as often as needed.

    Args:
        values: (B, H, W). radius: px, may be larger than the sides.
    """
    rows, columns = (_box_matrix(n, radius).to(values) for n in values.shape[1:])
    return rows @ values @ columns.T


@lru_cache(maxsize=32)
def _box_matrix(num: int, radius: int) -> Tensor:
    """(num, num), double precision."""
    matrix = np.zeros((num, num))
    rows = np.arange(num)
    for offset in range(-radius, radius + 1):
        column = (rows + offset) % (2 * num)  # the symmetric extension has period 2 num
        np.add.at(matrix, (rows, np.where(column < num, column, 2 * num - 1 - column)), 1 / (2 * radius + 1))
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        return torch.from_numpy(matrix)


def guided_filter(
    values: Tensor, guide: Tensor, radius: int, eps: float, valid: Tensor | None = None
) -> Tensor:
    """In each square the best linear function of the guide, q = a I + b, averaged over a pixel's squares.

    Args:
        values: (B, H, W). guide: (B, H, W).
        radius: px, of the squares.
        eps: in squared units of the guide; where its variance is below, the map is averaged.
        valid: (B, H, W) bool; what is not valid has no part in any mean, and is 0 in the answer.
    """
    inside = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    weight = inside.to(values.dtype)
    share = box_mean(weight, radius).clamp_min(1e-6)

    def mean(of: Tensor) -> Tensor:
        return box_mean(of * weight, radius) / share

    def centre(of: Tensor) -> Tensor:
        """(B, 1, 1): what is taken off first leaves variances with less rounding."""
        total = torch.where(inside, of, 0).sum(dim=(1, 2), keepdim=True)
        return total / weight.sum(dim=(1, 2), keepdim=True).clamp_min(1)

    offset = centre(values)
    p, i = torch.where(inside, values - offset, 0), torch.where(inside, guide - centre(guide), 0)
    mean_p, mean_i = mean(p), mean(i)
    a = (mean(i * p) - mean_i * mean_p) / ((mean(i * i) - mean_i**2).clamp_min(0) + eps)
    b = mean_p - a * mean_i
    return torch.where(inside, mean(a) * i + mean(b) + offset, 0)


def guided_map(z: Tensor, views: Tensor, valid: Tensor) -> Tensor:
    """A method's raw map up-sampled and filtered along the picture's edges, (B, H, W), 0 where not valid.

    Args:
        z: (B, h, w), `Method.patch_energy`. views: (B, 3, H, W) in 0..1. valid: (B, 1, H, W) bool.
    """
    radius = max(1, round(_RADIUS * min(views.shape[-2:]) / 256))
    return guided_filter(pixel_map(z, valid, 0), views.mean(dim=1), radius, _EPS, valid[:, 0])
