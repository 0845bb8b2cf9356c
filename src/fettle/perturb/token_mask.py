"""Token masking: random tokens, or a random block of them, are hidden."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import AfterValidator
from torch import Tensor

from fettle.perturb.base import (
    Fill,
    PerturbationConfig,
    all_inside,
    filled,
    guided_probabilities,
    uniform,
)


def _in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError("give two numbers, 0 <= low <= high <= 1")
    return bounds


Share: TypeAlias = Annotated[tuple[float, float], AfterValidator(_in_order)]
"""A range within 0..1 to draw from, uniformly."""


class TokenMask(PerturbationConfig):
    """Hide tokens whatever they hold (fpfnet.md section 7.4).

    Attributes:
        rule: "bernoulli" draws each token by itself, "exact" takes exactly the share, "block" one rectangle
            of about the share's area, of an aspect from 1:2 to 2:1; a guide does not move a block.
        share: range of the hidden share, drawn for each picture.
        fill: hidden tokens become zero, or the picture's mean token.
    """

    kind: Literal["token_mask"] = "token_mask"
    rule: Literal["bernoulli", "exact", "block"] = "bernoulli"
    share: Share = (0.1, 0.4)
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
        """See `Perturbation`."""
        if strength == 0:
            return tokens
        inside = all_inside(tokens, valid)
        share = strength * uniform((len(tokens),), *self.share, generator, tokens)
        if self.rule == "block":
            dropped = inside & _blocks(share.tolist(), grid, generator).to(inside.device)
        else:
            probabilities = guided_probabilities(share, guide, inside)
            chance = uniform(tuple(inside.shape), 0, 1, generator, tokens)
            if self.rule == "bernoulli":
                dropped = chance < probabilities
            else:  # the largest of chance^(1 / p): a draw without replacement, by weight
                keys = chance.log() / probabilities.clamp_min(torch.finfo(chance.dtype).tiny)
                rank = keys.masked_fill(~inside, float("-inf")).argsort(dim=1, descending=True, stable=True)
                dropped = inside & (rank.argsort(1) < (share * inside.sum(1)).round()[:, None])
        return filled(tokens, dropped, self.fill, valid)


def _blocks(shares: list[float], grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """One rectangle a picture, (B, N) bool."""
    rows, columns = grid
    mask = torch.zeros(len(shares), rows, columns, dtype=torch.bool)
    for number, share in enumerate(shares):
        aspect, top, left = torch.rand(3, generator=generator).tolist()
        stretch = math.sqrt(2 ** (2 * aspect - 1))
        height = min(max(round(math.sqrt(share) * rows * stretch), 1), rows)
        width = min(max(round(share * rows * columns / height), 1), columns)
        first_row = int(top * (rows - height + 1))
        first_column = int(left * (columns - width + 1))
        mask[number, first_row : first_row + height, first_column : first_column + width] = True
    return mask.flatten(1)
