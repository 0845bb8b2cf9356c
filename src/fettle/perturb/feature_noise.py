"""F-Noise of CCT (Ouali et al., CVPR 2020, arXiv 2003.09005): noise in proportion to each value."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fettle.perturb.perturbation import MemberConfig, amplitude


class FeatureNoise(MemberConfig):
    """f (1 + u) with u ~ Uniform(-range, range), drawn anew for every channel and position.

    Zeros and signs stay, as long as range times guide is below 1. The change is range / sqrt(3) of a token's
    size: 0.17 by default, a seventh of `Gaussian`'s.

    Attributes:
        range: largest relative change of a value, below 1.
        shared: whether the pictures of a batch get the same factors, as in CCT's code.
    """

    kind: Literal["feature_noise"] = "feature_noise"
    range: float = Field(default=0.3, gt=0, lt=1)
    shared: bool = False

    def disturb(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        generator: torch.Generator,
        strength: float,
        guide: Tensor | None,
        valid: Tensor,
    ) -> Tensor:
        shape = (1 if self.shared else len(tokens), *tokens.shape[1:])
        u = self.range * (2 * torch.rand(shape, generator=generator) - 1)
        return tokens * (1 + amplitude(strength, guide) * u.to(tokens))
