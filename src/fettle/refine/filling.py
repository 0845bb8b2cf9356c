"""Which fill a window gets, by the configuration and what the model keeps (section 5.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.refine.energy import Box
from fettle.refine.fill import fill_roi
from fettle.refine.references import References
from fettle.refine.settings import F2PADConfig


def usable_references(references: References | None, config: F2PADConfig) -> References | None:
    """The first `refs` of those that a model keeps; None: fill by diffusion."""
    if references is None or config.fill == "diffusion" or not config.refs:
        return None
    if len(references.pixels) <= config.refs:
        return references
    return References(references.pixels[: config.refs], references.valid[: config.refs])


@torch.no_grad()
def fill_window(
    picture: Tensor,
    roi: Tensor,
    valid: Tensor,
    references: References | None,
    box: Box,
    frame: tuple[int, int],
    *,
    kind: str,
    ring: int,
    turn: bool = True,
) -> tuple[Tensor, str]:
    """The picture with its regions as they would look if good (3, H, W), and how that was made.

    Args:
        picture: (3, H, W), the window at `box` of a frame (H, W). roi, valid: (H, W) bool, of the window.
        kind: "exemplar", "diffusion" or "mean".
        ring: px. turn: as in `fill_roi`.

    Raises:
        UsageError: nothing around the regions, and no references.
    """
    if references is not None and references.size == frame:
        if kind == "mean":
            return torch.where(roi, _mean(references)[:, *box.window], picture), "mean"
        if not bool((valid & ~roi).any()):  # no surroundings to match by
            nearest = _nearest(picture, valid, references, box)
            return torch.where(roi, nearest, picture), "exemplar"
    fill = fill_roi(picture, roi, references, ring=ring, valid=valid, turn=turn)
    return fill.pixels, fill.kind


def _mean(references: References) -> Tensor:
    """Mean of the references, (3, H, W)."""
    pixels, valid = references.pixels.float() / 255, references.valid
    return (pixels * valid).sum(dim=0) / valid.sum(dim=0).clamp_min(1)


def _nearest(picture: Tensor, valid: Tensor, references: References, box: Box) -> Tensor:
    """The reference of least squared difference at the same place, (3, H, W)."""
    there = references.pixels[..., *box.window].float() / 255
    return there[int(((there - picture) * valid).square().flatten(1).sum(dim=1).argmin())]
