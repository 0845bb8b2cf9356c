"""From a backbone's and a network's cues to guidance, step by step: what a method that is guided holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fettle.errors import ConfigError
from fettle.perturb.attention import (
    Guidance,
    GuideConfig,
    added,
    combine,
    equal_energy,
    follow,
    frozen_copy,
    joint_prior,
    momentum_at,
    normalise,
    shuffled_places,
    strength,
)
from fettle.protocols import Backbone, Step

_DECAY = 0.99  # of the running mean of the learned cue


class Looker(Protocol):
    """A network that can tell how much it looks at each token."""

    def looked_at(self, tokens: Tensor, valid: Tensor, grid: tuple[int, int], layers: str) -> Tensor:
        """(B, N, C), (B, N) bool -> (B, N), over "all" layers or the "last"."""
        ...


class AttentionGuide(nn.Module):
    """From a backbone's and a network's cues to masks and strengths, see `GuideConfig`.

    The host calls `watch` when its network is made, `features` for what a cache may keep, `keep_prior` on its
    walk over the good pictures, `learned` and the guide itself in a step, and `after_step` after it.

    Args:
        levels: of the backbone, that the host taps.

    Attributes:
        cue: name of the backbone's cue; None where it is not used.
        slow: the momentum copy; None where none is used.
    """

    mean_prior: Tensor
    mean_learned: Tensor

    def __init__(self, config: GuideConfig, backbone: Backbone, levels: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.cue = (config.prior_stat or backbone.cues[0]) if config.takes_prior else None
        self.cue_levels = tuple(levels if config.prior_levels == "all" else levels[-1:])
        self.slow: nn.Module | None = None
        self._num_priors = torch.zeros(0)  # pictures in which a token was valid, (N,)
        self._last: tuple[Tensor, Tensor] | None = None  # the step's learned cue, and which tokens are valid
        if config.noise == "fixed":
            self.register_buffer("mean_prior", torch.zeros(0))  # (N,)
            self.register_buffer("mean_learned", torch.zeros(0))  # (N,)

    @property
    def recipe(self) -> str:
        """What the prior is, for a feature cache's key."""
        return "" if self.cue is None else f", {self.cue} of {','.join(self.cue_levels)}"

    def watch(self, network: nn.Module, *, needed: bool = False) -> None:
        """Make the momentum copy of a new network, if the learned cue or the host (`needed`) wants one."""
        wanted = (self.config.takes_learned or needed) and self.config.momentum > 0
        self.slow = frozen_copy(network) if wanted else None

    def features(
        self, backbone: Backbone, pictures: Tensor, levels: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The backbone's features by level, and {"prior": (B, K, h, w)}, or nothing, from the same pass."""
        if self.cue is None:
            return backbone(pictures, levels), {}
        by_name, prior = backbone.features_and_cue(pictures, levels, self.cue, self.cue_levels)
        return by_name, {"prior": prior}

    def learned(self, network: Looker, tokens: Tensor, valid: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """The learned cue (B, N), from the momentum copy where there is one; None where it is not used."""
        if not self.config.takes_learned:
            return None
        looker = network if self.slow is None else cast(Looker, self.slow)
        return looker.looked_at(tokens, valid, grid, self.config.learned_layers)

    @torch.no_grad()
    def forward(
        self,
        prior: Tensor | None,
        learned: Tensor | None,
        share: float,
        valid: Tensor,
        generator: torch.Generator,
        unit: Tensor | None = None,
    ) -> Guidance:
        """Guidance for a step.

        Args:
            prior: (B, K, N); learned: (B, N); None for the one that is not used.
            share: of the training that is done, 0..1.
            valid: (B, N) bool.
            generator: on the CPU; "shuffled" draws from it.
            unit: (B, N), what each token's noise is multiplied by besides; None: alike for all.
        """
        config = self.config
        alpha, beta = config.alpha(share), config.beta
        prior = prior if config.takes_prior else None
        learned = learned if config.takes_learned else None
        self._last = None if learned is None else (learned, valid)
        prior = prior if prior is None else self.cut(prior, valid)
        attention, mask = combine(prior, learned, valid, config.contrast_floor)
        own = strength(mask, alpha, beta, valid)
        unit = torch.ones_like(own) if unit is None else unit
        if config.noise == "uniform":
            return Guidance(mask, equal_energy(torch.ones_like(own), own, unit, valid), attention)
        if config.noise == "inverted":
            return Guidance(mask, equal_energy(alpha + 2 * beta - own, own, unit, valid), attention)
        if config.noise == "shuffled":
            places = shuffled_places(valid, generator)
            mask, attention = (part.gather(1, places) for part in (mask, attention))
            own = equal_energy(own.gather(1, places), own, unit, valid)
        if config.noise == "fixed":
            attention, mask = self._fixed(learned, valid)
            own = equal_energy(strength(mask, alpha, beta, valid), own, unit, valid)
        return Guidance(mask, own, attention)

    def cut(self, prior: Tensor, valid: Tensor) -> Tensor:
        """The prior (B, K, N) without what lies above the quantile `prior_clip`."""
        if self.config.prior_clip is None:
            return prior
        inside = prior.float().masked_fill(~valid[:, None], torch.nan)
        return prior.minimum(inside.nanquantile(self.config.prior_clip, dim=2, keepdim=True))

    def _fixed(self, learned: Tensor | None, valid: Tensor) -> tuple[Tensor, Tensor]:
        """One attention and mask for every picture, from the means kept so far."""
        floor = self.config.contrast_floor
        cues = []
        if self.config.takes_prior:  # each prior was normalised already, and a floor acts once
            mean = self.mean_prior.expand(len(valid), -1)
            cues.append(mean * valid if floor else normalise(mean, valid, 0))
        if learned is not None:
            known = bool(self.mean_learned.any())
            mean = self.mean_learned if known else learned.mean(dim=0)
            cues.append(normalise(mean.expand(len(valid), -1), valid, floor))
        return added(cues, valid, floor)

    def begin(self, num_tokens: int) -> None:
        """Before the first step: no learned cue is known yet."""
        if self.config.noise == "fixed":
            self.mean_learned = self.mean_learned.new_zeros(num_tokens)

    @torch.no_grad()
    def keep_prior(self, prior: Tensor, valid: Tensor) -> None:
        """Before the first step, for "fixed": take priors (B, K, N) of training pictures into the mean."""
        if self.config.noise != "fixed" or not self.config.takes_prior:
            return
        total = joint_prior(self.cut(prior, valid), valid, self.config.contrast_floor).sum(dim=0)
        count = valid.sum(dim=0)
        if len(self._num_priors):
            total, count = total + self.mean_prior * self._num_priors, count + self._num_priors
        self._num_priors = count
        self.mean_prior = total / count.clamp_min(1)

    @torch.no_grad()
    def after_step(self, step: Step, network: nn.Module) -> None:
        """The momentum copy follows the network (equation 3); "fixed" takes in the step's learned cue."""
        if self.slow is not None:
            follow(self.slow, network, momentum_at(step.number, self.config.momentum))
        if self.config.noise != "fixed" or self._last is None:
            return
        if step.rank:
            raise ConfigError(
                "Noise 'fixed' keeps a running mean, which several processes do not share.",
                "Train in one process, or choose another noise.",
            )
        learned, valid = self._last
        mean = learned.sum(dim=0) / valid.sum(dim=0).clamp_min(1)
        if bool(self.mean_learned.any()):
            mean = torch.where(valid.any(dim=0), self.mean_learned.lerp(mean, 1 - _DECAY), self.mean_learned)
        self.mean_learned = mean
