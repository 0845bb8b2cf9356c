"""From a map on the patch grid to a map on pixels: one function for every method."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.sampling import bilinear_matrix, gaussian_matrix


def valid_tokens(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) bool -> (B, h, w) bool: a token is valid if any of its pixels is."""
    height, width = valid.shape[-2:]
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.adaptive_max_pool2d(valid.float(), grid)[:, 0] > 0
    # The same windows as a product, which every exporter has.
    rows, columns = _windows(height, grid[0], valid.device), _windows(width, grid[1], valid.device)
    return rows @ valid[:, 0].float() @ columns.T > 0


def pixel_map(patch_map: Tensor, valid: Tensor, sigma: float) -> Tensor:
    """Bilinear to the framed size, then Gaussian blur; what is not valid neither scores nor spreads.

    Both steps are linear and separable, so they are two small matrix products. Invalid tokens are left out
    by normalised convolution; where all are valid this is the plain blur.

    Args:
        patch_map: (B, h, w).
        valid: (B, 1, H, W) bool, framed px.
        sigma: standard deviation of the blur, framed px; 0 for none.

    Returns:
        (B, H, W), 0 where not valid.
    """
    height, width = valid.shape[-2:]
    like = (patch_map.dtype, patch_map.device)
    rows = _spread(height, patch_map.shape[-2], sigma, *like)  # (H, h)
    columns = _spread(width, patch_map.shape[-1], sigma, *like)  # (W, w)
    tokens = valid_tokens(valid, (patch_map.shape[-2], patch_map.shape[-1])).to(patch_map.dtype)
    spread = rows @ (patch_map * tokens) @ columns.T
    weight = rows @ tokens @ columns.T
    return spread / weight.clamp_min(1e-6) * valid[:, 0]


@lru_cache(maxsize=32)
def _windows(num_in: int, num_out: int, device: torch.device) -> Tensor:
    """Which of `num_in` places each of `num_out` cells touches, (num_out, num_in) of 0 and 1."""
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        cell, place = torch.arange(num_out)[:, None], torch.arange(num_in)
        inside = (place + 1) * num_out > cell * num_in
        return (inside & (place * num_out < (cell + 1) * num_in)).float().to(device)


@lru_cache(maxsize=32)
def _spread(num_out: int, num_in: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bilinear resampling and blur as one matrix, (num_out, num_in)."""
    matrix = bilinear_matrix(num_out, num_in)
    if sigma > 0:
        matrix = gaussian_matrix(num_out, sigma) @ matrix
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        return torch.tensor(matrix, dtype=dtype, device=device)
