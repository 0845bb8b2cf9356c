"""Mirrored and turned pictures, for products that come in any orientation."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fettle.errors import ConfigError

Turns: TypeAlias = Literal["none", "flip", "turn"]


def turned(pictures: Tensor, valid: Tensor, kind: Turns, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each picture mirrored at random along both axes, and with "turn" along the diagonal, too.

    Args:
        pictures: (B, 3, H, W). valid: (B, 1, H, W) bool, turned along.
        generator: on the CPU.

    Raises:
        ConfigError: "turn" of pictures that are not square.
    """
    if kind == "none":
        return pictures, valid
    if kind == "turn" and pictures.shape[-1] != pictures.shape[-2]:
        raise ConfigError("Only squares can be turned by a quarter.", "Use --frame square, or augment=flip.")
    both = torch.cat([pictures, valid.to(pictures.dtype)], dim=1)
    flips = torch.rand(len(pictures), 3, generator=generator) < 0.5
    views = []
    for one, (vertical, horizontal, diagonal) in zip(both, flips.tolist(), strict=True):
        view = one.flip(-2) if vertical else one
        view = view.flip(-1) if horizontal else view
        views.append(view.transpose(-2, -1) if diagonal and kind == "turn" else view)
    together = torch.stack(views)
    return together[:, :3], together[:, 3:] > 0.5
