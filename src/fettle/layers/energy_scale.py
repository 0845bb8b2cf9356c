"""The scale of a patch energy: about 0 for a typical good patch, about 1 for a rare one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEAST_SPREAD = 1e-6


class EnergyScale(nn.Module):
    """z = (e - m) / (q - m), m the median and q the 99 % quantile of held-out good patches' energies."""

    median: Tensor
    rare: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("median", torch.tensor(0.0))
        self.register_buffer("rare", torch.tensor(1.0))

    def settle(self, energies: Tensor) -> None:
        """Set m and q from raw energies (n,) of good pictures that were not learnt from."""
        values = energies.double().sort().values
        self.median = values[(len(values) - 1) // 2].float()
        rare = values[min(int(0.99 * len(values)), len(values) - 1)].float()
        resolution = 4 * torch.finfo(torch.float32).eps * self.median.abs()  # below it, adding is lost
        self.rare = torch.maximum(rare, self.median + resolution.clamp_min(2 * _LEAST_SPREAD))

    def forward(self, energy: Tensor) -> Tensor:
        return (energy - self.median) / (self.rare - self.median)
