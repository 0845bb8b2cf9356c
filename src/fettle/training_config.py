"""The settings of a training, and what follows from them alone."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fettle.protocols import Step

_STAGES = 25  # of the schedule "stages"
_RISING = 2  # of them

Schedule = Literal["constant", "step", "cosine", "stages"]
_Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(BaseModel):
    """Fields of a training; the Config of every trained method has them.

    Attributes:
        steps: batches to learn from. epochs: passes over the pictures instead; None takes `steps`.
        batch: pictures a step and process.
        lr, betas, weight_decay: of AdamW.
        decay: what weight decay acts on: "all" parameters, or the weights of "linear" layers alone.
        clip: largest total norm of the gradient; 0 is off.
        schedule: the learning rate after the warm-up: "constant", "step" (a tenth for the last fifth of the
            steps) or "cosine" (to 0). "stages" is CFLOW-AD's and has a warm-up of its own: 25 equal stages
            fall by a cosine to a thousandth, and over the first two it rises from a tenth.
        warmup: share of the steps over which the learning rate rises linearly from 1/n.
        ema: decay of an average of the weights, which is what is kept; 0 is off. The first updates decay
            faster, by (1 + t) / (10 + t), so that the random start is forgotten.
        early_stop: patience as a share of the steps: stop where held-out good pictures have not become better
            for so long, and keep the best weights; 0 is off, the last step counts.
        balance: how often a product's pictures come: by their number ("none"), its root, or all alike.
        stored: what trained weights are kept in. "fp16" rounds them as the training ends, before anything is
            calibrated: the model folder holds them in half the space and answers the same.
        precision: "auto" takes bfloat16 where a GPU has it, else float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=2000, ge=1, le=100_000_000)
    epochs: float | None = Field(default=None, gt=0, le=1_000_000)
    batch: int = Field(default=8, ge=1, le=4096)
    lr: float = Field(default=5e-4, gt=0, le=10)
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=1e-4, ge=0, le=10)
    decay: Literal["all", "linear"] = "all"
    clip: float = Field(default=0.1, ge=0)
    schedule: Schedule = "step"
    warmup: float = Field(default=0.05, ge=0, le=1)
    ema: float = Field(default=0.0, ge=0, lt=1)
    early_stop: float = Field(default=0.0, ge=0, le=1)
    balance: Literal["none", "sqrt", "equal"] = "none"
    stored: Literal["fp32", "fp16"] = "fp32"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    @staticmethod
    def few_shot(preset: str) -> dict[str, object]:
        """What a few-shot fit changes: steps replace epochs, and every picture is learnt from."""
        return {"steps": 1000 if preset == "paper" else 300, "epochs": None, "batch": 8, "early_stop": 0.0}


def planned_steps(config: TrainingConfig, num_views: int, processes: int = 1) -> int:
    """Steps of a training: `steps`, or what `epochs` passes over the views take."""
    if config.epochs is None:
        return config.steps
    return math.ceil(config.epochs * num_views / (config.batch * processes))


def learning_rate(config: TrainingConfig, step: Step) -> float:
    """Learning rate of a step: the schedule's times the warm-up's share."""
    if config.schedule == "stages":
        return _rate_in_stages(config.lr, step)
    rate = config.lr
    warmup = round(config.warmup * step.total)
    if config.schedule == "step" and 5 * step.number >= 4 * step.total:
        rate *= 0.1
    elif config.schedule == "cosine" and step.number >= warmup:
        rate *= 0.5 * (1 + math.cos(math.pi * (step.number - warmup) / max(step.total - warmup, 1)))
    return rate * (step.number + 1) / warmup if step.number < warmup else rate


def _rate_in_stages(highest: float, step: Step) -> float:
    """CFLOW-AD's published schedule."""
    floor = highest / 1000

    def of_stage(stage: int) -> float:
        return floor + (highest - floor) * (1 + math.cos(math.pi * stage / _STAGES)) / 2

    progress = _STAGES * step.number / step.total
    if progress < _RISING:
        return highest / 10 + (of_stage(_RISING) - highest / 10) * progress / _RISING
    return of_stage(int(progress))
