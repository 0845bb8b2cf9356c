"""Token masking: some tokens of each picture are hidden, whatever they hold."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.perturb.perturbation import (
    Fill,
    Interval,
    MemberConfig,
    drawn_between,
    largest,
    share_of,
    without,
)

_LONGEST = 3.0  # a block's longer side over its shorter


class TokenMask(MemberConfig):
    """Hides about a share of each picture's valid tokens; the share is drawn a picture.

    - bernoulli: each token by itself with that probability. With a guide w the probabilities are
      min(1, c w_j), where c leaves the expected number as it is.
    - exact: exactly round(share * N) tokens. With a guide they are drawn one after another, each time with
      probabilities in proportion to it.
    - block: one rectangle of about that share of the grid, its height over its width between 1/3 and 3. Where
      it lies is drawn in proportion to the number (with a guide: the weights) of valid tokens that it covers.

    Strength multiplies the share.

    Attributes:
        choice: see above.
        share: of the tokens.
        fill: what a hidden token becomes: "zero" or the picture's "mean" token.
    """

    kind: Literal["token_mask"] = "token_mask"
    choice: Literal["bernoulli", "exact", "block"] = "exact"
    share: Interval = (0.1, 0.4)
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
        share = strength * drawn_between(self.share, len(tokens), generator)  # (B,), on the CPU
        inside = valid.cpu()
        weights = inside.double() if guide is None else inside * guide.detach().cpu().double()  # (B, N)
        if self.choice == "block":
            hidden = blocks(share, weights, grid, generator)
        else:
            u = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
            if self.choice == "bernoulli":
                hidden = u < probabilities(share * inside.sum(dim=1), weights)
            else:
                # A race of exponential clocks, times negated: the first is drawn in proportion to the rates.
                hidden = largest(torch.log1p(-u) / weights, weights > 0, share_of(share, inside))
        return without(tokens, hidden.to(tokens.device), valid, self.fill)


def keep_indices(valid: Tensor, ratio: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which tokens stay where the others leave the sequence, drawn for each picture without replacement.

    Of n valid tokens max(1, floor(n (1 - ratio))) stay. Where pictures keep different numbers, the shorter
    rows are filled up with tokens that do not count.

    Args:
        valid: (B, N) bool. ratio: (B,), share that is dropped, 0 <= ratio < 1.

    Returns:
        Indices (B, n), and (B, n) bool: whether each counts.
    """
    inside = valid.cpu()
    number = inside.sum(dim=1)
    kept = torch.floor(number * (1 - ratio.double()) + 1e-9).long().clamp_min(1).minimum(number)  # (B,)
    u = torch.rand(inside.shape, generator=generator, dtype=torch.float64)
    order = u.masked_fill(~inside, 2.0).argsort(dim=1)[:, : max(int(kept.max()), 1)]
    counts = torch.arange(order.shape[1]) < kept[:, None]
    return order.to(valid.device), counts.to(valid.device)


def probabilities(expected: Tensor, weights: Tensor) -> Tensor:
    """min(1, c w_j), with c such that they sum to what is expected, or all 1 where that is too much.

    Args:
        expected: (B,), number of tokens. weights: (B, N), 0 or more.

    Returns:
        (B, N); 0 where the weight is 0.
    """
    ordered = weights.sort(dim=1, descending=True).values
    certain = torch.arange(ordered.shape[1], device=weights.device)  # if the k largest have probability 1 ...
    rest = ordered.flip(1).cumsum(dim=1).flip(1)
    factors = (expected[:, None] - certain) / rest  # ... the others share what is left over
    fits = (factors * ordered <= 1) & (ordered > 0)
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    factor = factors.gather(1, first)
    everyone = (weights > 0).to(weights)
    return torch.where(fits.any(dim=1, keepdim=True), (factor * weights).clamp_max(1), everyone)


def blocks(share: Tensor, weights: Tensor, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(B, N) bool: one rectangle a picture of about its share (B,) of the grid.

    `weights` (B, N) say where it may lie: a place's probability is in proportion to the sum that it covers.
    Tokens of weight 0 are left out of it.
    """
    ratios = _LONGEST ** (2 * torch.rand(len(share), generator=generator, dtype=torch.float64) - 1)
    places = torch.rand(len(share), generator=generator, dtype=torch.float64)
    hidden = torch.zeros(len(share), *grid, dtype=torch.bool)
    for picture, covered in enumerate(weights.reshape(-1, *grid)):
        area = float(share[picture]) * grid[0] * grid[1]
        if area < 0.5 or not bool(covered.any()):
            continue
        high, wide = _sides(area, float(ratios[picture]), grid)
        sums = F.avg_pool2d(covered[None, None], (high, wide), stride=1)[0, 0]  # one for each top left corner
        bounds = sums.flatten().cumsum(0)
        corner = int(torch.searchsorted(bounds, places[picture] * bounds[-1], right=True))
        top, left = divmod(min(corner, len(bounds) - 1), sums.shape[1])
        hidden[picture, top : top + high, left : left + wide] = True
    return hidden.flatten(1) & (weights > 0)


def _sides(area: float, ratio: float, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width, tokens, of about that area and height / width, as far as the grid lets them."""
    high = min(max(round(math.sqrt(area * ratio)), 1), grid[0])
    wide = min(max(round(area / high), 1), grid[1])
    return min(max(round(area / wide), 1), grid[0]), wide
