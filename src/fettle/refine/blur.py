"""The lightest of refinements: a method's raw map with less blur."""

from __future__ import annotations

from torch import Tensor

from fettle.layers.pixel_map import pixel_map


def light_blur(z: Tensor, valid: Tensor, sigma: float = 1.0) -> Tensor:
    """Bilinear to the framed size, then a Gaussian blur of `sigma` framed px; (B, H, W), 0 where not valid.

    Args:
        z: (B, h, w), `Method.patch_energy`. valid: (B, 1, H, W) bool.
    """
    return pixel_map(z, valid, sigma)
