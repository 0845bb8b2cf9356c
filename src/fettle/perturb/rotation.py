"""Pictures turned by small angles, for parts that never lie quite straight."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rotated(
    pictures: Tensor, valid: Tensor, degrees: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each picture turned about its centre by an angle of its own, uniform within +-`degrees`; bilinear.

    What comes in at the corners is mirrored, since a constant there would be learnt as good.

    Args:
        pictures: (B, 3, H, W). valid: (B, 1, H, W) bool, turned along (nearest).
        degrees: 0 to 180. generator: on the CPU.
    """
    if degrees == 0:
        return pictures, valid
    height, width = pictures.shape[-2:]
    angle = (2 * torch.rand(len(pictures), generator=generator) - 1) * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(pictures))
    # The grid's units are half sides: a rectangle's x and y are not of one length.
    rows = [cos, -sin * height / width, zero, sin * width / height, cos, zero]
    matrix = torch.stack(rows, dim=1).reshape(-1, 2, 3).to(pictures)
    places = F.affine_grid(matrix, [len(pictures), 3, height, width], align_corners=False)
    turned = F.grid_sample(pictures, places, "bilinear", "reflection", align_corners=False)
    inside = F.grid_sample(valid.to(pictures.dtype), places, "nearest", "reflection", align_corners=False)
    return turned, inside > 0.5
