"""Fewer channels, chosen before anything is learnt: what makes a covariance at every position affordable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

ReductionKind: TypeAlias = Literal["draw", "orthogonal"]


class ChannelReduction(nn.Module):
    """From the channels of several levels to `kept`, at random; nothing is learnt.

    "draw" keeps channels as they are, one draw from all levels together (PaDiM, arXiv 2011.08785).
    "orthogonal" projects each level, which gets its share of `kept`, onto random orthonormal directions
    (after semi-orthogonal embedding, arXiv 2105.14737): no channel is lost wholly, so that the outcome
    hangs less on the seed.

    Args:
        sizes: channels of each level. kept: channels afterwards, at most their sum.
    """

    channels: Tensor  # draw: (kept,) int16, sorted, counted through all levels
    directions: Tensor  # orthogonal: the levels' matrices (C_l, d_l), flattened, one after the other

    def __init__(self, sizes: Sequence[int], kept: int, kind: ReductionKind) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.kept = kept
        self.kind = kind
        self._own: list[list[int]] = []  # of the last pass; see `_own_channels`
        self.register_buffer("channels", torch.empty(0, dtype=torch.int16))
        self.register_buffer("directions", torch.empty(0))

    @torch.no_grad()
    def choose(self, generator: torch.Generator) -> None:
        """Draw anew; a generator's state fixes the outcome."""
        if self.kind == "draw":
            order = torch.randperm(sum(self.sizes), generator=generator)
            self.channels = order[: self.kept].sort().values.to(torch.int16)
            return
        flat = []
        for size, share in zip(self.sizes, self._shares(), strict=True):
            square = torch.randn(size, size, generator=generator, dtype=torch.float64)
            flat.append(torch.linalg.qr(square).Q[:, :share].float().flatten())
        self.directions = torch.cat(flat)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """(B, C_l, h_l, w_l) each -> (B, d_l, h_l, w_l) each."""
        if self.kind == "draw":
            return [level[:, own] for level, own in zip(levels, self._own_channels(), strict=True)]
        shares = self._shares()
        parts = torch.split(self.directions, [c * d for c, d in zip(self.sizes, shares, strict=True)])
        return [
            torch.einsum("bchw,cd->bdhw", level, part.reshape(size, share))
            for level, part, size, share in zip(levels, parts, self.sizes, shares, strict=True)
        ]

    def _own_channels(self) -> list[Tensor]:
        """The drawn channels of each level, counted within it."""
        if not torch.compiler.is_exporting():  # a traced buffer has no values: those of the pass before it
            drawn = self.channels.tolist()
            bounds = pairwise([0, *accumulate(self.sizes)])
            self._own = [[i - first for i in drawn if first <= i < last] for first, last in bounds]
        return [torch.tensor(own, dtype=torch.int64, device=self.channels.device) for own in self._own]

    def _shares(self) -> list[int]:
        """How many of `kept` each level gets: by its channels, rounded so that the sum is right."""
        total = sum(self.sizes)
        ends = [round(self.kept * last / total) for last in accumulate(self.sizes)]
        return [last - first for first, last in pairwise([0, *ends])]
