"""The perturbation pool of FPFNet (Xu, Zang, Wu, arXiv 2604.19259): several perturbations, drawn at random.

The paper's abstract names the members: Gaussian noise, F-Noise, F-Drop. How they are drawn and combined is a
reading of it. A pool has no parameters and runs in training only; it acts on the clean features before a
method's first projection, and the method's target stays clean.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, model_validator
from torch import Tensor

from fettle.errors import nearest_name
from fettle.perturb.attention import GuideConfig
from fettle.perturb.feature_drop import FeatureDrop
from fettle.perturb.feature_noise import FeatureNoise
from fettle.perturb.gaussian import Gaussian
from fettle.perturb.perturbation import MemberConfig, check_call
from fettle.perturb.schedules import Constant, Schedule
from fettle.perturb.token_mask import TokenMask


class Nothing(MemberConfig):
    """Gives the tokens back: a member that gives "no perturbation" its weight."""

    kind: Literal["nothing"] = "nothing"

    def disturb(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        generator: torch.Generator,
        strength: float,
        guide: Tensor | None,
        valid: Tensor,
    ) -> Tensor:
        return tokens


AnyPerturbation: TypeAlias = Annotated[
    Gaussian | FeatureNoise | FeatureDrop | TokenMask | Nothing, Field(discriminator="kind")
]


class Member(BaseModel):
    """A perturbation of a pool.

    Attributes:
        perturbation: its own config.
        weight: how often it is chosen, relative to the other weights; in a chain its probability. 0 is never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    perturbation: AnyPerturbation
    weight: float = Field(default=1.0, ge=0, le=1e6)


class PoolConfig(BaseModel):
    """A pool: its config, and a `Perturbation` when called.

    Compositions:
    - one: one member, by weight.
    - chain: each member in this order, each with its weight as its probability.
    - base_plus_one: the first member always, then one of the rest by weight (`Nothing` may be among them).

    Draws, in this order: (1) apply or not, (2) the choice, (3) what the members that run draw, in order.
    A probability of 0 or 1 draws nothing, nor does a choice where only one member has a weight. So a pool of
    the jitter alone is the jitter, bit for bit. Where nothing runs, the same tensor object comes back.

    A name of `NAMED_POOLS` is taken in place of the fields.

    Attributes:
        members: empty is the identity.
        composition: see above.
        granularity: one draw of (1) and (2) for the "batch", or one for each "sample", which is a picture.
        prob: probability that the pool runs at all.
        schedule: strength by progress. The caller hands over `strength=pool.schedule(step.share)`.
        guide: where the members disturb; the method that has the pool computes it. None is everywhere alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    members: tuple[Member, ...] = ()
    composition: Literal["one", "chain", "base_plus_one"] = "one"
    granularity: Literal["batch", "sample"] = "batch"
    prob: float = Field(default=1.0, ge=0, le=1)
    schedule: Schedule = Constant()
    guide: GuideConfig | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _by_name(cls, value: object, handler: ValidatorFunctionWrapHandler) -> Self:
        if isinstance(value, str):
            if value not in NAMED_POOLS:
                raise ValueError(f"there is no pool '{value}'. {nearest_name(value, NAMED_POOLS)}")
            value = NAMED_POOLS[value]
        made: Self = handler(value)
        return made

    @model_validator(mode="after")
    def _guide_guides(self) -> Self:
        if self.guide is not None and self.guide.noise == "none":
            raise ValueError("a guide with noise 'none' guides nothing: leave the guide out")
        return self

    @model_validator(mode="after")
    def _probabilities_of_a_chain(self) -> Self:
        for number, member in enumerate(self.members):
            if self.composition == "chain" and member.weight > 1:
                raise ValueError(
                    f"in a chain a member's weight is its probability: {member.weight:g} of member {number} "
                    "is above 1"
                )
        return self

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
        """See `perturbation.Perturbation`. The members get the guide and the strength as they are."""
        check_call(tokens, grid, strength, guide, valid)
        if strength == 0:
            return tokens
        num_draws = len(tokens) if self.granularity == "sample" else 1
        for perturbation, runs in self._plan(num_draws, generator):
            tokens = _on_some(perturbation, runs, tokens, grid, generator, strength, guide, valid)
        return tokens

    def _plan(self, num: int, generator: torch.Generator) -> list[tuple[MemberConfig, Tensor]]:
        """Which members run, in order, and in which of the `num` draws: (num,) bool each."""
        weights = [member.weight for member in self.members]
        if not any(weights):
            return []
        applies = _happens(self.prob, num, generator)
        if self.composition == "chain":
            runs = [_happens(weight, num, generator) for weight in weights]
        elif self.composition == "one":
            runs = _choice(weights, num, generator)
        else:
            runs = [torch.full((num,), weights[0] > 0), *_choice(weights[1:], num, generator)]
        return [(member.perturbation, applies & run) for member, run in zip(self.members, runs, strict=True)]


def _happens(probability: float, num: int, generator: torch.Generator) -> Tensor:
    """(num,) bool; certain and impossible things draw nothing."""
    if probability in (0, 1):
        return torch.full((num,), probability == 1)
    return torch.rand(num, generator=generator, dtype=torch.float64) < probability


def _choice(weights: list[float], num: int, generator: torch.Generator) -> list[Tensor]:
    """For each weight whether it is the chosen one, (num,) bool; a choice of one draws nothing."""
    possible = [place for place, weight in enumerate(weights) if weight > 0]
    if len(possible) > 1:
        chances = torch.tensor(weights, dtype=torch.float64)
        chosen = torch.multinomial(chances, num, replacement=True, generator=generator)
    else:
        chosen = torch.full((num,), possible[0] if possible else -1)
    return [chosen == place for place in range(len(weights))]


def _on_some(
    perturbation: MemberConfig,
    runs: Tensor,
    tokens: Tensor,
    grid: tuple[int, int],
    generator: torch.Generator,
    strength: float,
    guide: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """Disturb the pictures for which `runs` says so: (B,) bool, or (1,) for all alike."""
    if not bool(runs.any()) or isinstance(perturbation, Nothing):
        return tokens
    if bool(runs.all()):
        return perturbation(tokens, grid, generator, strength=strength, guide=guide, valid=valid)
    rows = runs.nonzero()[:, 0].to(tokens.device)
    disturbed = perturbation(
        tokens[rows],
        grid,
        generator,
        strength=strength,
        guide=None if guide is None else guide[rows],
        valid=None if valid is None else valid[rows],
    )
    return tokens.index_copy(0, rows, disturbed)


_JITTER = Member(perturbation=Gaussian())
_OTHERS = (Member(perturbation=FeatureNoise()), Member(perturbation=FeatureDrop()))

NAMED_POOLS: dict[str, PoolConfig] = {
    "none": PoolConfig(),
    "gaussian": PoolConfig(members=(_JITTER,)),
    "fpfnet": PoolConfig(members=(_JITTER, *_OTHERS)),
    "base_plus_one": PoolConfig(
        members=(_JITTER, *_OTHERS, Member(perturbation=Nothing())), composition="base_plus_one"
    ),
}
"""UniAD's jitter; FPFNet's pool, a third each; the jitter always, and then F-Noise, F-Drop or nothing."""
