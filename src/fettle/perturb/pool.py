"""The perturbation pool of FPFNet (arXiv 2604.19259): one of several perturbations at a time, or several.

Of the paper only the abstract was at hand; weights, granularity and composition are ours (fpfnet.md
section 8). A pool is a field of a method's configuration, so that every trained method can have one.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fettle.perturb.base import Perturbation, PerturbationConfig
from fettle.perturb.feature_drop import FeatureDrop
from fettle.perturb.feature_noise import FeatureNoise
from fettle.perturb.gaussian import Gaussian
from fettle.perturb.schedules import Constant, Schedule
from fettle.perturb.token_mask import TokenMask

AnyPerturbation: TypeAlias = Annotated[
    Gaussian | FeatureNoise | FeatureDrop | TokenMask, Field(discriminator="kind")
]


class Member(PerturbationConfig):
    """One perturbation of a pool.

    Attributes:
        perturbation: what it does.
        weight: how often it is chosen beside the others ("one", "base_plus_one"); 0 is never.
        prob: its own probability in a "chain".
    """

    perturbation: AnyPerturbation
    weight: float = Field(default=1.0, ge=0, le=1e6)
    prob: float = Field(default=1.0, ge=0, le=1)


class PoolConfig(PerturbationConfig):
    """A pool; itself a perturbation. A name of `NAMED_POOLS` stands for its fields.

    Attributes:
        members: empty is the identity.
        composition: "one" member, chosen by weight; a "chain" of all, each with its own probability;
            "base_plus_one": the first always, then one of the others or nothing, by weight.
        nothing: weight of nothing in "base_plus_one".
        granularity: one draw a "batch", or an own draw for every picture ("sample").
        prob: probability of doing anything, at the same granularity; 1 draws nothing for it.
        schedule: the strength over the training.

    Draws come in this order: anything or not, the choice, the member's own. Where there is but one member
    with a weight, no number is drawn for the choice: a pool of the jitter alone is the jitter, bit for bit.
    """

    members: tuple[Member, ...] = ()
    composition: Literal["one", "chain", "base_plus_one"] = "one"
    nothing: float = Field(default=1.0, ge=0, le=1e6)
    granularity: Literal["batch", "sample"] = "batch"
    prob: float = Field(default=1.0, ge=0, le=1)
    schedule: Schedule = Constant()

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in NAMED_POOLS:
            raise ValueError(f"there is no pool of this name; there are {', '.join(NAMED_POOLS)}")
        return NAMED_POOLS[value].model_dump()

    @model_validator(mode="after")
    def _has_a_base(self) -> Self:
        if self.composition == "base_plus_one" and not self.members:
            raise ValueError("base_plus_one needs a first member")
        return self

    def strength_at(self, progress: float) -> float:
        """The strength at a share of the training, 0 to 1."""
        return self.schedule(progress)

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
        if strength == 0 or not self.members:
            return tokens
        if self.granularity == "batch":
            return self._apply(tokens, grid, generator, strength, guide, valid)
        pictures = [
            self._apply(
                tokens[i : i + 1],
                grid,
                generator,
                strength,
                None if guide is None else guide[i : i + 1],
                None if valid is None else valid[i : i + 1],
            )
            for i in range(len(tokens))
        ]
        return torch.cat(pictures)

    def _apply(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        generator: torch.Generator,
        strength: float,
        guide: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor:
        if not _happens(self.prob, generator):
            return tokens
        for perturbation in self._chosen(generator):
            tokens = perturbation(tokens, grid, generator, strength=strength, guide=guide, valid=valid)
        return tokens

    def _chosen(self, generator: torch.Generator) -> list[Perturbation]:
        """The members of this draw, in their order."""
        if self.composition == "chain":
            return [m.perturbation for m in self.members if _happens(m.prob, generator)]
        if self.composition == "one":
            number = _choice([m.weight for m in self.members], generator)
            return [] if number is None else [self.members[number].perturbation]
        base, *others = self.members
        number = _choice([*(m.weight for m in others), self.nothing], generator)
        plus = [] if number is None or number == len(others) else [others[number].perturbation]
        return [base.perturbation, *plus]


def _happens(prob: float, generator: torch.Generator) -> bool:
    return prob == 1 or float(torch.rand((), generator=generator)) < prob


def _choice(weights: list[float], generator: torch.Generator) -> int | None:
    """An index by weight; None where all are 0. A single positive weight draws nothing."""
    positive = [i for i, weight in enumerate(weights) if weight > 0]
    if len(positive) < 2:
        return positive[0] if positive else None
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator))


_JITTER = Member(perturbation=Gaussian())
_CCT = (Member(perturbation=FeatureNoise()), Member(perturbation=FeatureDrop()))

NAMED_POOLS: dict[str, PoolConfig] = {
    "none": PoolConfig(),
    "gaussian": PoolConfig(members=(_JITTER,)),
    "fpfnet": PoolConfig(members=(_JITTER, *_CCT)),
    "base_plus_one": PoolConfig(members=(_JITTER, *_CCT), composition="base_plus_one"),
}
"""No perturbation; UniAD's jitter; FPFNet's three, one at a time; the jitter always, and perhaps another."""
