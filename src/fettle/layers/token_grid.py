"""Levels of a backbone onto one grid of tokens, and an error map from that grid to a picture score."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.layers.pixel_map import pixel_map, valid_tokens

Align: TypeAlias = Literal["corners", "mean"]
"""How grids of different sizes lie on each other: "corners" is bilinear with the corner cells' centres
aligned, "mean" averages whole cells going down and is bilinear with half-pixel centres going up."""


MapScore: TypeAlias = Literal["max", "top1%", "mean", "std"]
"""A map's largest value, the mean of its largest hundredth, its mean, or its (population) deviation."""


def valid_on_grid(features: Tensor, valid: Tensor) -> Tensor:
    """Which tokens of features (..., h, w) hold a valid pixel: (B, 1, H, W) bool -> (B, h, w) bool."""
    return valid_tokens(valid, (features.shape[-2], features.shape[-1]))


def aligned_to(level: Tensor, grid: tuple[int, int], align: Align) -> Tensor:
    """A level (B, C, h, w) on the grid, (B, C, *grid); see `Align`."""
    if level.shape[-2:] == grid:
        return level
    if align == "corners":
        return F.interpolate(level, size=grid, mode="bilinear", align_corners=True)
    if level.shape[-2] > grid[0]:
        return F.adaptive_avg_pool2d(level, grid)
    return F.interpolate(level, size=grid, mode="bilinear", align_corners=False)


def enlarged(error: Tensor, valid: Tensor, align: Align) -> Tensor:
    """(B, h, w) -> (B, H, W), bilinear, 0 where not valid; what is not valid does not spread."""
    if align == "mean":
        return pixel_map(error, valid, sigma=0)
    tokens = valid_on_grid(error, valid).to(error.dtype)
    both = torch.stack([error * tokens, tokens], dim=1)  # (B, 2, h, w)
    both = F.interpolate(both, size=valid.shape[-2:], mode="bilinear", align_corners=True)
    return both[:, 0] / both[:, 1].clamp_min(1e-6) * valid[:, 0]


def pooled_maximum(anomaly_map: Tensor, valid: Tensor, side: tuple[int, int]) -> Tensor:
    """The largest mean of a window, stride 1 and no border added: (B, H, W) -> (B,).

    A mean is over the window's valid pixels, but never over less than half of it: a window that lies mostly
    on what is not valid cannot win by a few pixels.
    """
    side = (min(side[0], anomaly_map.shape[-2]), min(side[1], anomaly_map.shape[-1]))
    mean, share = (_window_means(one, side) for one in (anomaly_map[:, None], valid.to(anomaly_map.dtype)))
    return (mean / share.clamp_min(0.5)).flatten(1).amax(dim=1)


def _window_means(values: Tensor, side: tuple[int, int]) -> Tensor:
    """Mean of every window: rows, then columns, as engines would add up all of a window for each place."""
    return F.avg_pool2d(F.avg_pool2d(values, (side[0], 1), stride=1), (1, side[1]), stride=1)


def score_of_map(anomaly_map: Tensor, valid: Tensor, kind: MapScore) -> Tensor:
    """The score (B,) of a map (B, H, W) over its valid pixels (B, H, W)."""
    values = anomaly_map.masked_fill(~valid, 0).flatten(1)
    if kind == "max":
        return values.amax(dim=1)
    number = valid.flatten(1).sum(dim=1)
    if kind == "mean":
        return values.sum(dim=1) / number.clamp_min(1)
    if kind == "std":
        middle = values.sum(dim=1, keepdim=True) / number.clamp_min(1)[:, None]
        away = (values - middle).square().masked_fill(~valid.flatten(1), 0)
        return (away.sum(dim=1) / number.clamp_min(1)).sqrt()
    count = torch.ceil(number / 100).long().clamp_min(1)
    ordered = values.sort(dim=1, descending=True).values.cumsum(dim=1)
    return ordered.gather(1, count[:, None] - 1)[:, 0] / count
