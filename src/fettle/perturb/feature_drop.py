"""F-Drop of CCT (Ouali et al., CVPR 2020, arXiv 2003.09005): the most active tokens are hidden.

CCT means to hide 10 % to 40 % of the positions. Its rule drops where the channel mean reaches gamma times
the picture's largest. That presumes features that are never negative, as after a ReLU. On linear bottleneck
outputs, about half of whose values are negative, it hides 1 to 3 tokens of 196; and where all means are
negative gamma times the largest lies above them all, so it hides none. Hence the other two rules.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fettle.errors import ConfigError
from fettle.perturb.perturbation import (
    Fill,
    Interval,
    MemberConfig,
    drawn_between,
    largest,
    share_of,
    without,
)


class FeatureDrop(MemberConfig):
    """Drops the most active tokens of each picture; how many is the rule's matter.

    - quantile: a share of the tokens, drawn a picture. Activity is the mean of |f| over channels.
    - ratio_abs: those that reach gamma times the picture's largest activity, mean |f|; gamma is drawn a
      picture. At most the upper end of `share`: on an even texture all tokens are alike and would go.
    - ratio_mean: CCT's own. Activity is the channel mean, one gamma is drawn a call. Refused where a feature
      is negative.

    Strength multiplies the number dropped. With a guide that number stays, and the tokens with the largest
    activity times guide go.

    Attributes:
        rule: see above.
        share: of the valid tokens; for "quantile" (drawn from it) and "ratio_abs" (its end is the cap).
        gamma: of the largest activity; for "ratio_abs" and "ratio_mean".
        fill: what a dropped token becomes: "zero" (CCT) or the picture's "mean" token.
    """

    kind: Literal["feature_drop"] = "feature_drop"
    rule: Literal["quantile", "ratio_abs", "ratio_mean"] = "quantile"
    share: Interval = (0.1, 0.4)
    gamma: Interval = (0.7, 0.9)
    fill: Fill = "zero"

    def disturb(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        generator: torch.Generator,
        strength: float,
        guide: Tensor | None,
        valid: Tensor,
    ) -> Tensor:
        """Raises ConfigError: negative features under the rule "ratio_mean"."""
        if self.rule == "ratio_mean":
            _refuse_negative(tokens, valid)
        activity = tokens.mean(dim=2) if self.rule == "ratio_mean" else tokens.abs().mean(dim=2)  # (B, N)
        num = self._number(activity, valid, strength, generator)
        droppable = valid
        if guide is not None:
            activity, droppable = activity * guide, valid & (guide > 0)
        return without(tokens, largest(activity, droppable, num), valid, self.fill)

    def _number(self, activity: Tensor, valid: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """(B,): tokens to drop of each picture."""
        if self.rule == "quantile":
            return share_of(strength * drawn_between(self.share, len(activity), generator), valid)
        gamma = drawn_between(self.gamma, 1 if self.rule == "ratio_mean" else len(activity), generator)
        num = reaching(activity, valid, gamma.to(activity)).sum(dim=1)
        if self.rule == "ratio_abs":
            cap = torch.full((len(activity),), self.share[1], dtype=torch.float64)
            num = num.minimum(share_of(cap, valid))
        return (strength * num.to(torch.float64)).round().to(torch.int64)


def reaching(activity: Tensor, valid: Tensor, gamma: Tensor) -> Tensor:
    """CCT's threshold: which valid tokens reach gamma times their picture's largest activity.

    Args:
        activity: (B, N). valid: (B, N) bool. gamma: (B,), or (1,) for all pictures.

    Returns:
        (B, N) bool. If all activities of a picture are negative, none does.
    """
    top = activity.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    return (activity >= gamma[:, None] * top) & valid


def _refuse_negative(tokens: Tensor, valid: Tensor) -> None:
    if bool(((tokens < 0) & valid[:, :, None]).any()):
        raise ConfigError(
            "Rule 'ratio_mean' of perturbation 'feature_drop' would do next to nothing here: this backbone's "
            "features have negative values.",
            "Use rule 'quantile' or 'ratio_abs'.",
        )
