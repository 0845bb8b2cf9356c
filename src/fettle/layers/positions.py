"""Positions of the tokens of a grid: learned, as UniAD has them (arXiv 2206.03687), or fixed waves."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor, nn

_LONGEST = 10_000.0  # times the shortest wave


@lru_cache(maxsize=32)
def wave_positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Fixed positions (H W, width), row by row: a half of the channels tells x, the other y.

    Each half is all sines, then all cosines, from the shortest wave to the longest.

    Args:
        grid: (H, W), tokens. width: channels, a multiple of 4.
    """
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        quarter = width // 4
        count = partial(torch.arange, dtype=torch.float64, device="cpu")
        rates = _LONGEST ** (-count(quarter) / quarter)
        y, x = torch.meshgrid(*(count(side) for side in grid), indexing="ij")
        angles = [place.flatten()[:, None] * rates for place in (x, y)]  # (H W, quarter) each
        waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
        return torch.cat(waves, dim=1).to(device, torch.float32)


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
