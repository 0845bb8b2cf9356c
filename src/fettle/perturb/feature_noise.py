"""F-Noise (Ouali et al., CVPR 2020, arXiv 2003.09005): every value times a factor near 1."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fettle.perturb.base import PerturbationConfig, amplitude, only_inside, uniform


class FeatureNoise(PerturbationConfig):
    """f (1 + u), u ~ Uniform(-range, range) for every channel and position (fpfnet.md section 7.2).

    Attributes:
        range: below 1, so that signs and zeros stay.
        shared: one u for all pictures of the batch, as in the authors' code; else each has its own.
    """

    kind: Literal["feature_noise"] = "feature_noise"
    range: float = Field(default=0.3, ge=0, lt=1)
    shared: bool = False

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
        if strength == 0 or self.range == 0:
            return tokens
        batch, count, channels = tokens.shape
        shape = (1 if self.shared else batch, count, channels)
        factor = (
            strength * amplitude(guide, valid) * uniform(shape, -self.range, self.range, generator, tokens)
        )
        return only_inside(tokens + tokens * factor, tokens, valid)
