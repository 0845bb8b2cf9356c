"""A transformer that rebuilds the tokens of a grid, and can tell how much it looks at each."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fettle.errors import ConfigError
from fettle.layers.positions import wave_positions
from fettle.layers.vit_block import EPS, ViTBlock, draw_weights, seen_by_all


class TokenDecoder(nn.Module):
    """Tokens to tokens through a plain transformer with full attention; bound to a grid by learned positions.

    Args:
        channels: of the tokens. grid: (H, W), tokens; (0, 0) while it is not known yet.
        width, heads, depth: channels, heads and blocks inside.
        learned_positions: else fixed waves, which hold on any grid.
        out_norm: a layer norm before the output; it takes away each token's length.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        width: int,
        heads: int,
        depth: int,
        learned_positions: bool = True,
        out_norm: bool = False,
    ) -> None:
        super().__init__()
        self.project_in = nn.Linear(channels, width) if channels != width else nn.Identity()
        self.positions = nn.Parameter(torch.zeros(*grid, width)) if learned_positions else None
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS) if out_norm else nn.Identity()
        self.project_out = nn.Linear(width, channels)

    def forward(self, tokens: Tensor, valid: Tensor, grid: tuple[int, int]) -> Tensor:
        """Rebuild features: tokens (B, N, C) row by row, valid (B, N) bool -> (B, N, C)."""
        x = self._placed(tokens, grid)
        mask = seen_by_all(valid)
        for block in self.blocks:
            x = block(x, mask)
        rebuilt: Tensor = self.project_out(self.norm(x))
        return rebuilt

    @torch.no_grad()
    def looked_at(self, tokens: Tensor, valid: Tensor, grid: tuple[int, int], layers: str) -> Tensor:
        """How much each token is looked at by "all" blocks or the "last", (B, N) ."""
        with torch.autocast(tokens.device.type, enabled=False):
            x = self._placed(tokens.float(), grid)
            mask = seen_by_all(valid)
            received = []
            for number, block in enumerate(self.blocks, start=1):
                if layers == "all" or number == len(self.blocks):
                    received.append(cast(ViTBlock, block).received(x, valid))
                if number < len(self.blocks):
                    x = block(x, mask)
            return torch.stack(received).mean(dim=0)

    def _placed(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        x: Tensor = self.project_in(tokens)
        if self.positions is None:
            return x + wave_positions(grid, x.shape[-1], x.device)
        known = tuple(self.positions.shape[:2])
        if grid != known:
            raise ConfigError(
                f"The model was fitted on a grid of {list(known)}, not {list(grid)}.",
                "Use the model's frame.",
            )
        return x + self.positions.flatten(0, 1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew, on the CPU."""
        draw_weights(self, generator)
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02, generator=generator)
