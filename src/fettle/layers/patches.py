"""A grid of features as tokens of k x k cells, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(features: Tensor, patch: int) -> Tensor:
    """(B, C, H k, W k) -> (B, H W, k k C), row by row; within a token by cell row, cell column, channel.

    A convolution of stride k lays the same numbers out by channel first: its weights do not fit this order.
    """
    cells = torch.unflatten(features, 3, (-1, patch))
    cells = torch.unflatten(cells, 2, (-1, patch))  # (B, C, H, k, W, k)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, H W, k k C) on a grid of (H, W) tokens -> (B, C, H k, W k)."""
    cells = torch.unflatten(tokens, 2, (patch, patch, -1))
    cells = torch.unflatten(cells, 1, grid)  # (B, H, W, k, k, C)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
