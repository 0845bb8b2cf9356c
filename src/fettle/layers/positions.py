"""Learned positions of the tokens of a grid, as UniAD has them (arXiv 2206.03687)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
