"""Sizes and spread of features over a stream of good pictures, in one walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class FeatureStatistics:
    """Sums over valid tokens, in double precision.

    Attributes:
        sums: of each channel and position, (C, h, w). counts: valid tokens at each position, (h, w).
        squares: of each channel, (C,).
        num_pictures: pictures taken in.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    num_pictures: int = 0

    def add(self, features: Tensor, valid: Tensor, num_pictures: int) -> None:
        """Take in features (B, C, h, w) with their valid tokens (B, h, w)."""
        inside = features.double() * valid[:, None]
        if not self.num_pictures:
            self.sums = inside.new_zeros(inside.shape[1:])
            self.counts = inside.new_zeros(inside.shape[2:])
            self.squares = inside.new_zeros(inside.shape[1])
        self.sums += inside.sum(dim=0)
        self.counts += valid.sum(dim=0)
        self.squares += inside.square().sum(dim=(0, 2, 3))
        self.num_pictures += num_pictures

    @property
    def grid(self) -> tuple[int, int]:
        return self.sums.shape[1], self.sums.shape[2]

    @property
    def num_tokens(self) -> int:
        """Valid ones of all pictures."""
        return int(self.counts.sum())

    @property
    def finite(self) -> bool:
        """Whether no feature was NaN or infinite."""
        return bool(torch.isfinite(self.squares).all())

    def level_scale(self, sizes: Sequence[int]) -> Tensor:
        """1 / RMS of each level, repeated for its channels: (C,). `sizes`: channels of each level."""
        levels = torch.split(self.squares / max(self.num_tokens, 1), list(sizes))
        return torch.cat([level.mean().clamp_min(1e-24).rsqrt().expand(len(level)) for level in levels])

    def spread(self, scale: Tensor) -> float:
        """Mean squared distance of features times `scale` (C,) from the mean of their channel and position.

        This is what a model that has learnt nothing but those means would be wrong by.
        """
        explained = (self.sums.square() / self.counts.clamp_min(1)).sum(dim=(1, 2))
        within = ((self.squares - explained) * scale.double().square()).sum()
        return max(float(within) / max(self.num_tokens * len(scale), 1), 1e-12)
