"""How strong a perturbation is as the training goes on: progress in 0..1 to strength in 0..1.

A schedule is a config and a function in one: `Linear(start=0, end=1)(0.25)` is 0.25. The progress is
`Step.share`, so it counts steps and not epochs.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

_Unit = Annotated[float, Field(ge=0, le=1)]


class _Schedule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Constant(_Schedule):
    """The same strength from the first step to the last."""

    kind: Literal["constant"] = "constant"
    value: _Unit = 1.0

    def __call__(self, progress: float) -> float:
        return self.value


class Linear(_Schedule):
    """From `start` to `end` on a straight line."""

    kind: Literal["linear"] = "linear"
    start: _Unit = 0.0
    end: _Unit = 1.0

    def __call__(self, progress: float) -> float:
        return (1 - progress) * self.start + progress * self.end


class Cosine(_Schedule):
    """From `start` to `end` on half a cosine: flat at both ends, half way in the middle."""

    kind: Literal["cosine"] = "cosine"
    start: _Unit = 0.0
    end: _Unit = 1.0

    def __call__(self, progress: float) -> float:
        left = (1 + math.cos(math.pi * progress)) / 2
        return left * self.start + (1 - left) * self.end


class Warmup(_Schedule):
    """From 0 to 1 on a straight line over the first `share` of the training, then 1."""

    kind: Literal["warmup"] = "warmup"
    share: _Unit = 0.1

    def __call__(self, progress: float) -> float:
        return progress / self.share if progress < self.share else 1.0


Schedule: TypeAlias = Annotated[Constant | Linear | Cosine | Warmup, Field(discriminator="kind")]
