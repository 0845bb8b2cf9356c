"""Feature jitter of UniAD (You et al., NeurIPS 2022, arXiv 2206.03687, section 3.3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fettle.perturb.perturbation import MemberConfig, amplitude

RELATIVE_SIGMA = 20 / math.sqrt(272)  # the paper's alpha of 20, at the paper's 272 channels


class Gaussian(MemberConfig):
    """f + sigma n with n ~ N(0, I): one sigma a token, in proportion to that token's own size.

    The paper writes sigma = alpha ||f|| / C. With ||f|| = sqrt(C) RMS(f) this is alpha / sqrt(C) times the
    token's RMS over channels, so one alpha is another strength at another C. The field is that ratio. The
    paper's yes or no of each batch is the pool's `prob`.

    Attributes:
        relative_sigma: sigma / RMS of the token; alpha / sqrt(C).
    """

    kind: Literal["gaussian"] = "gaussian"
    relative_sigma: float = Field(default=RELATIVE_SIGMA, gt=0, le=100)

    def disturb(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        generator: torch.Generator,
        strength: float,
        guide: Tensor | None,
        valid: Tensor,
    ) -> Tensor:
        noise = torch.randn(tokens.shape, generator=generator).to(tokens)
        rms: Tensor = torch.linalg.vector_norm(tokens, dim=2, keepdim=True) / math.sqrt(tokens.shape[2])
        return tokens + amplitude(strength, guide) * self.relative_sigma * rms * noise  # rms (B, N, 1)
