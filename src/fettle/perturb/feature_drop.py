"""F-Drop (Ouali et al., CVPR 2020, arXiv 2003.09005): the most active positions are hidden."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fettle.errors import ConfigError
from fettle.perturb.base import (
    Fill,
    PerturbationConfig,
    all_inside,
    filled,
    guided_probabilities,
    uniform,
)
from fettle.perturb.token_mask import Share

_MOST = 0.4  # of a picture's tokens: even textures have all activities alike


class FeatureDrop(PerturbationConfig):
    """Drop the most active tokens, by one of three rules (fpfnet.md section 7.3).

    Attributes:
        rule: "quantile" drops a share of each picture's tokens, those of the largest mean |f|, on any
            backbone. "ratio_abs" drops where mean |f| reaches gamma times the picture's largest, 40 % at
            most. "ratio_mean" is the authors' code, on the plain channel mean, one gamma a batch; it needs
            features that are not negative.
        share: range of the dropped share (quantile).
        gamma: range of the threshold's share of the maximum (ratio rules).
        fill: dropped tokens become zero, or the picture's mean token.

    With a guide, tokens are dropped at random with probabilities proportional to it, for the same share.
    """

    kind: Literal["feature_drop"] = "feature_drop"
    rule: Literal["quantile", "ratio_abs", "ratio_mean"] = "quantile"
    share: Share = (0.1, 0.4)
    gamma: Share = (0.7, 0.9)
    fill: Fill = "zero"

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
        """See `Perturbation`.

        Raises:
            ConfigError: rule "ratio_mean" on features that are negative somewhere.
        """
        if strength == 0:
            return tokens
        inside = all_inside(tokens, valid)
        dropped = self._by_share(tokens, inside, strength, generator)
        if guide is not None:
            shares = dropped.sum(1) / inside.sum(1).clamp_min(1)
            probabilities = guided_probabilities(shares.to(tokens), guide, inside)
            dropped = uniform(tuple(inside.shape), 0, 1, generator, tokens) < probabilities
        return filled(tokens, dropped, self.fill, valid)

    def _by_share(
        self, tokens: Tensor, inside: Tensor, strength: float, generator: torch.Generator
    ) -> Tensor:
        """What is dropped without a guide, (B, N) bool."""
        batch = len(tokens)
        if self.rule == "quantile":
            share = strength * uniform((batch,), *self.share, generator, tokens)
            return _most_active(_activity(tokens), inside, share)
        if self.rule == "ratio_mean":
            if bool((tokens < 0).any()):
                raise ConfigError(
                    "F-Drop's rule 'ratio_mean' needs features that are not negative, and these are.",
                    "Use the rule 'quantile'.",
                )
            gamma = uniform((1,), *self.gamma, generator, tokens)
            activity = tokens.mean(dim=2)
        else:
            gamma = uniform((batch,), *self.gamma, generator, tokens)
            activity = _activity(tokens)
        threshold = 1 - strength * (1 - gamma)  # at strength 0 nothing but the maximum itself would go
        largest = activity.masked_fill(~inside, float("-inf")).amax(dim=1, keepdim=True)
        reached = inside & (activity >= threshold[:, None] * largest)
        if self.rule == "ratio_mean":
            return reached
        return reached & _most_active(activity, inside, activity.new_full((batch,), _MOST))


def _activity(tokens: Tensor) -> Tensor:
    """Mean |f| over channels, (B, N)."""
    return tokens.abs().mean(dim=2)


def _most_active(activity: Tensor, inside: Tensor, share: Tensor) -> Tensor:
    """The round(share x n) most active of each picture's n inside tokens; ties by token index."""
    order = activity.masked_fill(~inside, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return inside & (rank < (share * inside.sum(1)).round()[:, None])
