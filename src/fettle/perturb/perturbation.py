"""What a perturbation of features is, and what all of them share.

A perturbation gets clean tokens and gives disturbed ones. The clean ones stay as they are: they are what a
method learns to rebuild. Every draw is made on the CPU by the generator handed in and moved to the tokens'
device afterwards, so that a seed means the same draws on every device. How many draws a member makes depends
on its config and the shapes alone.

`guide` (B, N) says where to disturb: a weight of each token, 0 or more, as a rule in 0..1.
- A member that adds noise multiplies the noise of token j by guide_j. A guide of ones changes nothing.
- A member that drops tokens drops as many as without a guide, rather where the guide is large. It looks at
  the guide's proportions only: twice the guide is the same guide.
- A token of weight 0 comes back untouched from every member.
Where noise goes with a token's own size, a guide keeps its expected energy if the sum of (guide_j size_j)^2
over the valid tokens is that of size_j^2 (`attention.equal_energy`); such a guide may exceed 1 in places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal, Protocol, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

Fill: TypeAlias = Literal["zero", "mean"]
_Unit = Annotated[float, Field(ge=0, le=1)]


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the first number is the smaller one, not {pair[0]:g} before {pair[1]:g}")
    return pair


Interval: TypeAlias = Annotated[tuple[_Unit, _Unit], AfterValidator(_ordered)]
"""(smallest, largest), both in 0..1: what is drawn lies evenly between them."""


class Perturbation(Protocol):
    """A seeded disturbance of tokens."""

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
        """Disturb tokens; never in place.

        Args:
            tokens: (B, N, C) float32, row by row.
            grid: (H, W), tokens; N = H * W.
            generator: a CPU generator, the only source of randomness.
            strength: share of the full size, 0..1. At 0 the same tensor object comes back and nothing is
                drawn.
            guide: (B, N), where to disturb, see the module's text; None is everywhere alike.
            valid: (B, N) bool; invalid tokens come back untouched and count for nothing. None is all.

        Returns:
            (B, N, C).
        """
        ...


class MemberConfig(BaseModel, ABC):
    """A perturbation that is its own frozen config. A member says how it disturbs; the rest is here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        check_call(tokens, grid, strength, guide, valid)
        if strength == 0:
            return tokens
        inside = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if valid is None else valid
        guide = None if guide is None else guide.to(tokens)
        disturbed = self.disturb(tokens, grid, generator, strength, guide, inside)
        return torch.where(inside[:, :, None], disturbed, tokens)

    @abstractmethod
    def disturb(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        generator: torch.Generator,
        strength: float,
        guide: Tensor | None,
        valid: Tensor,
    ) -> Tensor:
        """(B, N, C) at a strength above 0. Invalid tokens are put back afterwards."""
        ...


def check_call(
    tokens: Tensor,
    grid: tuple[int, int],
    strength: float,
    guide: Tensor | None,
    valid: Tensor | None,
) -> None:
    """Refuse a call whose parts do not fit together, by ValueError: it is the caller's slip."""
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"tokens {tuple(tokens.shape)} are not (B, N, C) on a grid of {list(grid)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is a share in 0..1, not {strength:g}")
    for name, part in (("guide", guide), ("valid", valid)):
        if part is not None and part.shape != tokens.shape[:2]:
            raise ValueError(f"{name} {tuple(part.shape)} is not (B, N) of tokens {tuple(tokens.shape)}")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid is bool, not {valid.dtype}")
    if guide is not None and not bool(((guide >= 0) & guide.isfinite()).all()):
        raise ValueError("a guide holds finite weights of 0 or more")


def amplitude(strength: float, guide: Tensor | None) -> Tensor | float:
    """What a member's noise is multiplied by: a number, or (B, N, 1) with a guide."""
    return strength if guide is None else strength * guide[:, :, None]


def drawn_between(interval: tuple[float, float], num: int, generator: torch.Generator) -> Tensor:
    """(num,) float64 on the CPU, evenly in the interval."""
    low, high = interval
    return low + (high - low) * torch.rand(num, generator=generator, dtype=torch.float64)


def share_of(share: Tensor, valid: Tensor) -> Tensor:
    """(B,) int64: round(share * N) of each picture's N valid tokens; a half goes to the even number."""
    num_valid = valid.sum(dim=1)
    return (share.to(num_valid.device) * num_valid).round().to(torch.int64)


def largest(keys: Tensor, among: Tensor, num: Tensor) -> Tensor:
    """(B, N) bool: the `num` (B,) largest keys (B, N) among the allowed tokens (B, N); ties by index."""
    order = keys.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(keys.shape[1], device=keys.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places)
    return (rank < num[:, None]) & among


def without(tokens: Tensor, dropped: Tensor, valid: Tensor, fill: Fill) -> Tensor:
    """Tokens (B, N, C) without those dropped (B, N): 0 in all channels, or the mean of the valid tokens.

    Nothing is rescaled.
    """
    if fill == "zero":
        return tokens.masked_fill(dropped[:, :, None], 0)
    total = tokens.masked_fill(~valid[:, :, None], 0).sum(dim=1, keepdim=True)
    mean = total / valid.sum(dim=1)[:, None, None].clamp_min(1)  # (B, 1, C)
    return torch.where(dropped[:, :, None], mean, tokens)
