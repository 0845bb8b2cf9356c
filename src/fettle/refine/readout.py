"""From a solved mask to pixels: the difference, its threshold, the choice between masks, the map (section 7).

One picture's window at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fettle.refine.energy import WindowEnergy, in_parts
from fettle.refine.grabcut import grabcut
from fettle.refine.guided import guided_filter
from fettle.refine.settings import F2PADConfig, Lengths
from fettle.refine.solver import Problem

_EIGHT = np.ones((3, 3), dtype=bool)
_LEAST_SHARE = 0.02  # of V: below it nothing is replaced
_LARGEST = 0.95  # quantile of V where it is not 0
_LEAST_SOFT = 1e-3  # of r inside the mask, so that r' is above a half there


class ReadOut(NamedTuple):
    """Masks of one window.

    Attributes:
        soft: r, (H, W) in 0..1; above a half it is the threshold mask.
        mask: M1, (H, W) bool, r > 0.5 inside P.
        difference: a = V ||D||, or ||A||, (H, W).
    """

    soft: Tensor
    mask: Tensor
    difference: Tensor


def read_out(
    picture: Tensor,
    roi: Tensor,
    difference: Tensor,
    unknown: Tensor,
    valid: Tensor,
    *,
    cut: float,
    config: F2PADConfig,
    lengths: Lengths,
) -> ReadOut:
    """Threshold what was removed (7.2).

    Args:
        picture: X (3, H, W). roi: P (H, W) bool. difference: D (3, H, W). valid: (H, W) bool.
        unknown: V (1, H, W), or A (3, H, W).
        cut: size of a difference at which a pixel is in the mask, a share of tau.
    """
    size = difference.norm(dim=0)
    removed = _opaque(unknown[0]) * size if len(unknown) == 1 else unknown.norm(dim=0)
    if config.read_out == "V":
        soft = _opaque(unknown[0]) if len(unknown) == 1 else (removed / size.clamp_min(1e-6)).clamp_max(1)
    else:
        amount = removed
        if config.read_out == "guided":
            guide = picture.mean(dim=0)[None]
            amount = guided_filter(removed[None], guide, lengths.guide_radius, config.guide_eps, valid[None])[
                0
            ].clamp_min(0)
        soft = amount / (amount + max(cut, 1e-6))
    soft = soft * roi
    return ReadOut(soft, soft > 0.5, removed)


def _opaque(share: Tensor) -> Tensor:
    """V scaled so that its largest values are 1: the hinge lets the solver stop at a mask that is transparent
    throughout, once patches are just normal enough."""
    seen = share[share > _LEAST_SHARE]
    if not len(seen):
        return share
    return (share / seen.quantile(_LARGEST)).clamp_max(1)


def snapped(picture: Tensor, roi: Tensor, seeds: Tensor, margin: int) -> Tensor | None:
    """M2, (H, W) bool: the mask by colour models (7.3).

    Args:
        picture: (3, H, W). roi: (H, W) bool. seeds: (H, W) bool, what is probably defective.
        margin: px around the regions that the colour models learn from.

    Returns:
        None where the seeds do not serve.
    """
    rows, columns = (roi.any(dim=dim).nonzero() for dim in (1, 0))
    top, left = (max(int(where[0]) - margin, 0) for where in (rows, columns))
    window = (slice(top, int(rows[-1]) + 1 + margin), slice(left, int(columns[-1]) + 1 + margin))
    inside = roi[window].cpu().numpy()
    pixels = (picture[:, *window] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    found = grabcut(pixels, ~inside, seeds[window].cpu().numpy() & inside)
    if found is None:
        return None
    mask = torch.zeros_like(roi)
    mask[window] = torch.from_numpy(found).to(roi.device)
    return mask & roi


def choose_mask(
    candidates: Sequence[Tensor], problem: Problem, energy: WindowEnergy, weight: float, batch: int
) -> int:
    """Which hard mask M has the least share of energy left + weight |M| / |P| (7.4); of equals the first.

    Args:
        candidates: (H, W) bool each. problem, energy: of one window. batch: windows to compute at once.
    """
    masks = torch.stack(list(candidates)).float()[:, None]  # (n, 1, H, W)
    left = in_parts(energy, problem.picture - masks * problem.difference, batch)
    area = masks.flatten(1).sum(dim=1) / problem.roi.sum()
    return int((problem.share(left.flatten(1).sum(dim=1)) + weight * area).argmin())


def cleaned(mask: NDArray[np.bool_], roi: NDArray[np.bool_], lengths: Lengths) -> NDArray[np.bool_]:
    """Small holes filled inside the region, small components dropped unless none would be left (7.5)."""
    holes, count = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)  # 4 neighbours
    small = np.bincount(holes.ravel(), minlength=count + 1) < lengths.hole_area
    small[0] = False
    filled = mask | (small[holes] & roi)
    parts, count = ndimage.label(filled, structure=_EIGHT)
    large = np.bincount(parts.ravel(), minlength=count + 1) >= lengths.speck_area
    large[0] = False
    kept: NDArray[np.bool_] = large[parts]
    return kept if kept.any() else filled


def refined_share(soft: Tensor, mask: Tensor, roi: Tensor) -> Tensor:
    """r' = half the mask and half r inside the regions, 0 elsewhere: above a half exactly in the mask (7.6).

    Args:
        soft, mask, roi: (H, W).
    """
    inside = torch.where(mask, soft.clamp_min(_LEAST_SOFT), soft)
    return (0.5 * mask + 0.5 * inside) * roi


def refined_map(base: Tensor, share: Tensor, inside: Tensor, *, peak: float, hold: float) -> Tensor:
    """2 peak S of section 7.6: the base map up to `peak`, plus `peak` times r' in the mask, where r' is above
    a half. In the rest of the regions that passed the base map is held down to `hold`: the mask has decided.

    Args:
        base: (H, W); the answer has its unit. share: r'. inside: the regions that passed.
    """
    mask = share > 0.5
    held = torch.where(inside & ~mask, base.clamp_max(min(hold, peak)), base.clamp_max(peak))
    return held + peak * share * mask
