"""The place of a feature as a vector: the condition of CFLOW-AD's flows (arXiv 2107.12571)."""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.layers.positions import wave_positions


def position_code(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Codes (H, W, width): the waves of `wave_positions`, sine beside cosine; the first half tells x.

    A code depends on its row and column alone, so that a part of a grid has the codes of its places.

    Args:
        grid: (H, W), cells. width: channels, a multiple of 4. Every code's norm is sqrt(width / 2).
    """
    waves = wave_positions(grid, width, device).view(-1, 2, 2, width // 4)  # x or y, sine or cosine
    return waves.transpose(2, 3).reshape(*grid, width)
