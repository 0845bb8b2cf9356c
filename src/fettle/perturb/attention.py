"""Where to disturb: masks from attention, after AGPNet (Huang et al., arXiv 2408.07490).

A frozen backbone says where a picture holds something (the prior cue), a slow copy of the network that is
trained says where that one looks (the learned cue). Their normalised sum is a mask, and noise grows with it.
Any method that rebuilds features can use this: its own noise times `Guidance.strength`, or a pool of
perturbations with a guide (`pool.PoolConfig.guide`).

No gradient runs through anything here, and all is float32. Minima, maxima, means and sums are over the valid
tokens of one picture, never over the batch: what a picture gets does not hang on its batch mates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fettle.errors import DataError

Network = TypeVar("Network", bound=nn.Module)
NoiseKind: TypeAlias = Literal["none", "uniform", "shuffled", "inverted", "fixed", "attention"]
_LEAST_CONTRAST = 1e-3  # of the mean: below it differences are rounding, since features are kept as halves


class GuideConfig(BaseModel):
    """Which cues make the mask, and how strong noise is by it.

    Attributes:
        noise: "attention" is the paper's. The others are its controls, all with the same expected energy a
            picture: "uniform" everywhere alike, "shuffled" the same strengths in random places, "inverted"
            strong where the mask is weak, "fixed" one mask for all pictures. "none" is no noise.
        cues: "prior" (of the backbone), "learned" (of the momentum copy), or "both".
        prior_stat: cue of the backbone; None takes its best: "cls" or "received" attention of a ViT,
            "energy" of a convolutional network.
        prior_levels: the levels that it is taken from: all tapped ones, or the last.
        prior_clip: quantile that the prior is cut at, so that one token cannot flatten the rest; None: none.
        learned_layers: "all" layers of the momentum copy, or the "last".
        momentum: of that copy; 0: the cue comes from the network as it is.
        contrast_floor: least contrast that is stretched to 0..1, as a share of the cue's mean. With 0 every
            cue is stretched, and the sum again: the paper's way. On a texture, where a cue is nearly flat, a
            floor leaves it flat.
        alpha_start, alpha_end: strength of the mask at the first and the last step.
        alpha_schedule: from start to end on a line, back from end to start, or `alpha_constant` always.
        alpha_constant: None is the mean of start and end.
        ramp: share of the training after which the end is reached.
        beta: strength outside the mask.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    noise: NoiseKind = "attention"
    cues: Literal["prior", "learned", "both"] = "both"
    prior_stat: Literal["cls", "received", "energy", "energy_with_border"] | None = None
    prior_levels: Literal["all", "last"] = "all"
    prior_clip: float | None = Field(default=None, gt=0, lt=1)
    learned_layers: Literal["all", "last"] = "all"
    momentum: float = Field(default=0.999, ge=0, lt=1)
    contrast_floor: float = Field(default=1.0, ge=0, le=100)
    alpha_start: float = Field(default=0.0, ge=0, le=100)
    alpha_end: float = Field(default=1.0, ge=0, le=100)
    alpha_schedule: Literal["linear", "constant", "reversed"] = "linear"
    alpha_constant: float | None = Field(default=None, ge=0, le=100)
    ramp: float = Field(default=1.0, gt=0, le=1)
    beta: float = Field(default=0.2, ge=0, le=100)

    @property
    def takes_prior(self) -> bool:
        """Whether the backbone's cue is used."""
        return self.noise != "none" and self.cues != "learned"

    @property
    def takes_learned(self) -> bool:
        """Whether the network's own cue is used."""
        return self.noise != "none" and self.cues != "prior"

    def alpha(self, share: float) -> float:
        """Strength of the mask when `share` (0..1) of the training is done."""
        if self.alpha_schedule == "constant":
            mean = (self.alpha_start + self.alpha_end) / 2
            return mean if self.alpha_constant is None else self.alpha_constant
        ends = (self.alpha_start, self.alpha_end)
        start, end = ends if self.alpha_schedule == "linear" else ends[::-1]
        return linear(start, end, share, self.ramp)


class Guidance(NamedTuple):
    """What the cues say of a batch.

    Attributes:
        mask: (B, N) in 0..1. strength: (B, N), what unit noise is multiplied by.
        attention: (B, N), the unclipped sum of the cues, which picks the pixels to disturb.
        Invalid tokens are 0 in all three.
    """

    mask: Tensor
    strength: Tensor
    attention: Tensor


def linear(start: float, end: float, share: float, ramp: float = 1.0) -> float:
    """From `start` to `end`, reached when `ramp` of the training is done."""
    return start + (end - start) * min(1.0, share / ramp)


def momentum_at(updates: int, momentum: float) -> float:
    """Momentum after so many updates: (1 + t) / (10 + t) at first, so that the random start is forgotten."""
    return min(momentum, (1 + updates) / (10 + updates))


def frozen_copy(network: Network) -> Network:
    """A copy that is not trained."""
    copied = copy.deepcopy(network)
    copied.requires_grad_(False)
    return copied


@torch.no_grad()
def follow(slow: nn.Module, source: nn.Module, momentum: float) -> None:
    """slow <- momentum slow + (1 - momentum) source, parameter by parameter."""
    for own, other in zip(slow.parameters(), source.parameters(), strict=True):
        own.lerp_(other, 1 - momentum)


def normalise(cue: Tensor, valid: Tensor, contrast_floor: float) -> Tensor:
    """A cue to 0..1 a picture, about 0.5; a flat one stays at 0.5.

    With a floor of 0 this is min-max. With a floor c a range below c times the mean is not stretched fully.

    Args:
        cue: (B, N). valid: (B, N) bool.

    Returns:
        (B, N), 0 where not valid.

    Raises:
        DataError: a cue that is no number, a picture without a valid token, or a grid of one token.
    """
    if cue.shape[1] < 2:
        raise DataError("A grid of one token has no place to choose.", "Use larger pictures.")
    if not bool(valid.any(dim=1).all()):
        raise DataError("A picture has no valid token.", "Check the region of interest.")
    inside = cue.float().masked_fill(~valid, 0)
    if not bool(inside.isfinite().all()):
        raise DataError("An attention cue holds NaN or inf.", "Check the backbone's weights.")
    high = cue.float().masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    low = cue.float().masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    mean = inside.abs().sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True)
    least = (max(contrast_floor, _LEAST_CONTRAST) * mean).clamp_min(1e-12)
    stretched = 0.5 + (inside - (high + low) / 2) / torch.maximum(high - low, least)
    return stretched.clamp(0, 1) * valid


def combine(
    prior: Tensor | None, learned: Tensor | None, valid: Tensor, contrast_floor: float
) -> tuple[Tensor, Tensor]:
    """The sum of the normalised cues, and the mask.

    Args:
        prior: (B, K, N), maps with a scale each. learned: (B, N). One of them may be None.
        valid: (B, N) bool.

    Returns:
        attention (B, N), and mask (B, N) in 0..1. Without a floor the sum is stretched again; with one its
        mean is taken, since stretching would undo the floor.
    """
    cues = [] if prior is None else [joint_prior(prior, valid, contrast_floor)]
    cues += [] if learned is None else [normalise(learned, valid, contrast_floor)]
    return added(cues, valid, contrast_floor)


def added(cues: Sequence[Tensor], valid: Tensor, contrast_floor: float) -> tuple[Tensor, Tensor]:
    """The sum of normalised cues (B, N), and the mask; see `combine`."""
    attention = torch.stack(list(cues)).sum(dim=0)
    return attention, attention / len(cues) if contrast_floor else normalise(attention, valid, 0)


def joint_prior(prior: Tensor, valid: Tensor, contrast_floor: float) -> Tensor:
    """The prior's maps (B, K, N), each normalised, and their mean: (B, N) in 0..1."""
    maps = [normalise(one, valid, contrast_floor) for one in prior.unbind(dim=1)]
    mean = torch.stack(maps).mean(dim=0)
    return mean if contrast_floor else normalise(mean, valid, 0)


def strength(mask: Tensor, alpha: float, beta: float, valid: Tensor) -> Tensor:
    """w = alpha mask + beta on valid tokens, (B, N)."""
    return (alpha * mask + beta) * valid


def equal_energy(weights: Tensor, like: Tensor, unit: Tensor, valid: Tensor) -> Tensor:
    """`weights` (B, N) scaled a picture so that sum (w unit)^2 over valid tokens is that of `like` (B, N)."""
    wanted = (like * unit * valid).square().sum(dim=1, keepdim=True)
    own = (weights * unit * valid).square().sum(dim=1, keepdim=True)
    return weights * valid * (wanted / own.clamp_min(1e-24)).sqrt()


def shuffled_places(valid: Tensor, generator: torch.Generator) -> Tensor:
    """For each token the one that it takes its value from: (B, N) int64, valid tokens among themselves."""
    order = torch.rand(valid.shape, generator=generator).to(valid.device)
    own = (~valid).float().argsort(dim=1, stable=True)  # valid ones first, in their order
    drawn = order.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True)  # valid ones first, shuffled
    places = torch.arange(valid.shape[1], device=valid.device).expand_as(valid).clone()
    return torch.where(valid, places.scatter(1, own, drawn), places)


def binarise(attention: Tensor, ratio: float, valid: Tensor) -> Tensor:
    """The largest of a map: floor(ratio n + 0.5) of each picture's n valid pixels.

    Of equal ones the first, row by row.

    Args:
        attention: (B, H, W). valid: (B, H, W) bool.

    Returns:
        (B, H, W) bool.
    """
    chosen = torch.zeros_like(valid).flatten(1)
    values = attention.masked_fill(~valid, -torch.inf).flatten(1)
    for picture, number in enumerate(valid.flatten(1).sum(dim=1).tolist()):
        count = math.floor(ratio * number + 0.5)
        if count == 0:
            continue
        own = values[picture]
        least = own.kthvalue(len(own) - count + 1).values
        equal = own == least
        missing = count - (own > least).sum()
        chosen[picture] = (own > least) | (equal & (equal.cumsum(0) <= missing))
    return chosen.view_as(valid)


def picture_sigma(
    attention: Tensor, kind: NoiseKind, ratio: float, sigma: float, grid: tuple[int, int], valid: Tensor
) -> Tensor:
    """How strong noise is at each pixel, in units of 0..1 pictures.

    Args:
        attention: (B, N), tokens on `grid`, as the guide gave it (so shuffled or fixed already).
        ratio: share of the pixels. sigma: at these; "uniform" spreads the same energy over all.
        valid: (B, 1, H, W) bool.

    Returns:
        (B, 1, H, W).
    """
    inside = valid[:, 0]
    if kind == "uniform":
        number = inside.sum(dim=(1, 2))
        count = torch.floor(ratio * number.double() + 0.5)
        even = sigma * (count / number.clamp_min(1)).sqrt().to(attention)
        return even[:, None, None, None] * valid
    enlarged = F.interpolate(
        torch.unflatten(attention, 1, grid)[:, None],
        size=inside.shape[1:],
        mode="bilinear",
        align_corners=False,
    )[:, 0]
    chosen = binarise(-enlarged if kind == "inverted" else enlarged, ratio, inside)
    return sigma * chosen[:, None].to(attention)
