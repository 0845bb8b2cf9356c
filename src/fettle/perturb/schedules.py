"""How a perturbation's strength goes with the training's progress, 0 at the first step to 1 at the last."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from fettle.perturb.base import PerturbationConfig

_Strength: TypeAlias = Annotated[float, Field(ge=0, le=10)]


class Constant(PerturbationConfig):
    """The same all along."""

    kind: Literal["constant"] = "constant"
    value: _Strength = 1.0

    def __call__(self, progress: float) -> float:
        return self.value


class Linear(PerturbationConfig):
    """From `start` to `end` in a straight line."""

    kind: Literal["linear"] = "linear"
    start: _Strength = 0.0
    end: _Strength = 1.0

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


class Cosine(PerturbationConfig):
    """From `start` to `end` along half a cosine: flat at both ends."""

    kind: Literal["cosine"] = "cosine"
    start: _Strength = 0.0
    end: _Strength = 1.0

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * progress)) / 2


class Warmup(PerturbationConfig):
    """From 0 to 1 over the first `share` of the steps, then 1."""

    kind: Literal["warmup"] = "warmup"
    share: float = Field(default=0.1, gt=0, le=1)

    def __call__(self, progress: float) -> float:
        return min(progress / self.share, 1.0)


Schedule: TypeAlias = Annotated[Constant | Linear | Cosine | Warmup, Field(discriminator="kind")]
"""Any of them, as a field of a configuration."""
