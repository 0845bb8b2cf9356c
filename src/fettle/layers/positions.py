"""Positions of the tokens of a grid: learned, as UniAD has them (arXiv 2206.03687), or fixed waves."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

_LONGEST = 10_000.0  # times the shortest wave


@lru_cache(maxsize=32)
def wave_positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Fixed positions (H W, width), row by row: sines and cosines of y and of x, a half of the channels each.

    Args:
        grid: (H, W), tokens. width: channels, a multiple of 4.
    """
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        quarter = width // 4
        rates = _LONGEST ** (-torch.arange(quarter, device=device) / quarter)
        y, x = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
        angles = [place.flatten()[:, None] * rates for place in (y, x)]  # (H W, quarter) each
        return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


class LearnedPositions(nn.Module):
    """A learned row for each row and each column of the grid; token (y, x) is concat(column[x], row[y]).

    The column half comes first. Both start uniform in 0..1.

    Args:
        grid: (H, W), tokens. width: channels, even.
    """

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.rand(grid[0], width // 2))
        self.columns = nn.Parameter(torch.rand(grid[1], width // 2))

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W), tokens."""
        return len(self.rows), len(self.columns)

    def forward(self) -> Tensor:
        """(H W, width), row by row."""
        height, width = self.grid
        columns = self.columns[None].expand(height, -1, -1)
        rows = self.rows[:, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, width={2 * self.rows.shape[1]}"
