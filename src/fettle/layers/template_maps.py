"""What was not rebuilt, and what a template took from where: pure functions of TFA-Net's maps."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

_NO_LENGTH = 1e-6  # a shorter vector has no direction
_RARE = 0.99
_DIRECTIONS_WEIGHT = 5.0  # that of the published loss


Fusion: TypeAlias = Literal["product", "sum", "calibrated_sum", "distance", "direction"]
"""How the two maps become one: their product, 5 to 1, in units of rare good places, or one of the two."""


class Difference(NamedTuple):
    """Between fused features and what was rebuilt of them, (B, h, w) each."""

    distance: Tensor
    direction: Tensor


def difference(fused: Tensor, rebuilt: Tensor) -> Difference:
    """Mean square and 1 - cosine over the channels at each position (section 8); float32."""
    fused, rebuilt = (part if part.dtype == torch.float64 else part.float() for part in (fused, rebuilt))
    distance = (fused - rebuilt).square().mean(dim=1)
    direction = (1 - F.cosine_similarity(fused, rebuilt, dim=1, eps=1e-8)).clamp(0, 2)
    empty = fused.square().sum(dim=1) < _NO_LENGTH**2
    return Difference(distance, direction.masked_fill(empty, 0.0))


def joined(found: Difference, fusion: Fusion, units: Tensor) -> Tensor:
    """One map of two (section 8). `units` (2,) of distance and direction are for "calibrated_sum"."""
    distance, direction = found
    match fusion:
        case "product":
            return direction * distance
        case "sum":
            return _DIRECTIONS_WEIGHT * direction + distance
        case "calibrated_sum":
            return distance / units[0] + direction / units[1]
        case "distance":
            return distance
        case "direction":
            return direction


def units_of(found: Difference, valid: Tensor, number: int) -> Tensor | None:
    """The 99 % quantile of both maps of one picture over its valid places, (2,); None without any.

    Args:
        valid: (B, H, W) bool, on a grid that the maps' is a multiple of. number: of the picture.
    """
    height, width = (found.distance.shape[axis] // valid.shape[axis] for axis in (1, 2))
    inside = valid[number].repeat_interleave(height, 0).repeat_interleave(width, 1)
    if not bool(inside.any()):
        return None
    return torch.stack([part[number][inside].float().quantile(_RARE) for part in found])


def adoption_maps(attention: Tensor, seen: Tensor, template: Tensor, has_cls: bool) -> dict[str, Tensor]:
    """Maps of attention from template tokens (rows) to input tokens (columns), 0..1 (section 11).

    Args:
        attention: (B, N, n), a mean over blocks and heads. seen: (B, n) bool. template: (B, N) bool.

    Returns:
        "adoption" (half of it: 0.5 is as under uniform attention, cut at 1), "taken" and "adoption_peak"
        (divided by its picture's largest), (B, n) or (B, N).
    """
    asking = template.sum(dim=1, keepdim=True).clamp_min(1)
    keys = seen.sum(dim=1, keepdim=True) + asking + has_cls
    rows = attention * template[:, :, None]
    adoption = rows.sum(dim=1) * keys / asking
    peak = rows.amax(dim=1)
    return {
        "adoption": (adoption / 2).clamp(0, 1),
        "taken": rows.sum(dim=2),
        "adoption_peak": peak / peak.amax(dim=1, keepdim=True).clamp_min(1e-12),
    }
