"""Gaussian feature jitter (UniAD, arXiv 2206.03687): noise relative to each token's own size."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fettle.perturb.base import PerturbationConfig, amplitude, only_inside

UNIAD_RELATIVE_SIGMA = 20 / math.sqrt(272)
"""The paper's alpha = 20 at its 272 channels: 1.2127 times a token's root mean square."""


class Gaussian(PerturbationConfig):
    """f + alpha (||f|| / C) n, n ~ N(0, I), with alpha = relative_sigma sqrt(C) (fpfnet.md section 7.1).

    Attributes:
        relative_sigma: standard deviation of the noise over the token's root mean square.
        prob: probability of any noise, drawn once a call; 1 draws nothing for it.
    """

    kind: Literal["gaussian"] = "gaussian"
    relative_sigma: float = Field(default=UNIAD_RELATIVE_SIGMA, ge=0, le=100)
    prob: float = Field(default=1.0, ge=0, le=1)

    def __call__(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        generator: torch.Generator,
        *,
        strength: float = 1.0,
        guide: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """See `Perturbation`."""
        if strength == 0 or self.relative_sigma == 0:
            return tokens
        if self.prob < 1 and float(torch.rand((), generator=generator)) >= self.prob:
            return tokens
        root_mean_square = tokens.square().mean(dim=2, keepdim=True).sqrt()  # (B, N, 1)
        sigma = strength * self.relative_sigma * root_mean_square * amplitude(guide, valid)
        noise = torch.randn(tokens.shape, generator=generator).to(tokens)
        return only_inside(tokens + sigma * noise, tokens, valid)
