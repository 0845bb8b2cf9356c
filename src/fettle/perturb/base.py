"""What every perturbation is, and the few pieces that several of them share.

A perturbation takes clean tokens and gives disturbed ones; the clean tensor stays as it is, since it is the
target. All numbers are drawn on the CPU from the generator handed in, then moved: a seed means the same on
every device. At strength 0 the same tensor comes back and nothing is drawn. Whether a method is in training
is the method's affair.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

Fill: TypeAlias = Literal["zero", "mean"]


class Perturbation(Protocol):
    """One disturbance of tokens."""

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
        """Disturb tokens.

        Args:
            tokens: clean features, (B, N, C) float32, row-major on the grid. Never changed in place.
            grid: (h, w), N = h w.
            generator: of the CPU; every number comes from it.
            strength: multiplies the size of the disturbance: the noise, or the share that is dropped.
            guide: where to disturb, (B, N), 0 or more; None: everywhere alike. Noise is multiplied by it at
                equal energy, shares are distributed by it at an equal expected number (agpnet.md section 13).
            valid: (B, N) bool; other tokens come back untouched.

        Returns:
            (B, N, C); the same object where nothing is done.
        """
        ...


class PerturbationConfig(BaseModel):
    """Base of the members' fields: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def uniform(
    shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, like: Tensor
) -> Tensor:
    """Uniform numbers in [low, high), drawn on the CPU, on the device and in the type of `like`."""
    return (low + (high - low) * torch.rand(shape, generator=generator)).to(like)


def amplitude(guide: Tensor | None, valid: Tensor | None) -> Tensor | float:
    """What noise is multiplied by, (B, N, 1): the guide at a mean square of 1 over valid tokens."""
    if guide is None:
        return 1.0
    weights = torch.ones_like(guide) if valid is None else valid.to(guide)
    mean_square = (guide.square() * weights).sum(1) / weights.sum(1).clamp_min(1)
    scale = mean_square.sqrt().clamp_min(torch.finfo(guide.dtype).tiny)
    return (guide / scale[:, None])[..., None]


def guided_probabilities(share: Tensor, guide: Tensor | None, inside: Tensor) -> Tensor:
    """Each token's probability of being dropped, (B, N), for shares (B,) of the tokens `inside` (B, N).

    p_j = min(1, p g_j / mean g). What the minimum cuts off goes to the others, so that the expected number
    stays the same while tokens with a positive guide are left.
    """
    weights = inside.to(share) if guide is None else guide.to(share) * inside
    wanted = share * inside.sum(1)
    probabilities = torch.zeros_like(weights)
    for _ in range(weights.shape[1]):  # each round fills at least one token to 1, or ends
        free = (probabilities < 1) & (weights > 0)
        missing = wanted - (probabilities * ~free).sum(1)
        total = (weights * free).sum(1).clamp_min(torch.finfo(weights.dtype).tiny)
        raised = weights * (missing / total)[:, None]
        probabilities = torch.where(free, raised.clamp(0, 1), probabilities)
        if not bool((free & (raised > 1)).any()):
            break
    return probabilities


def filled(tokens: Tensor, dropped: Tensor, fill: Fill, valid: Tensor | None) -> Tensor:
    """Tokens with the dropped ones (B, N) at zero, or at the mean of the picture's valid tokens."""
    if fill == "zero":
        return tokens.masked_fill(dropped[..., None], 0.0)
    weights = tokens.new_ones(tokens.shape[:2]) if valid is None else valid.to(tokens)
    mean = (tokens * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)
    return torch.where(dropped[..., None], mean[:, None], tokens)


def all_inside(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """The tokens that may be disturbed, (B, N) bool."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid


def only_inside(disturbed: Tensor, tokens: Tensor, valid: Tensor | None) -> Tensor:
    """The disturbed tokens where they are valid, the clean ones elsewhere."""
    return disturbed if valid is None else torch.where(valid[..., None], disturbed, tokens)
