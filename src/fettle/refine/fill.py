"""What a region of a picture would look like if it were good.

An exemplar fill takes the region from the good picture, and the place in it, whose surroundings match best,
and carries the picture's own light over. A diffusion fill continues the surroundings into the region.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.errors import UsageError
from fettle.refine.search import best_window
from fettle.refine.turning import Surroundings, closer_place
from fettle.sampling import gaussian_matrix

if TYPE_CHECKING:
    from fettle.refine.references import References

_LIGHT_SIGMA = 3.0  # px, of the correction's blur


class Fill(NamedTuple):
    """A picture with its region filled.

    Attributes:
        pixels: (3, H, W) in 0..1; outside the region the picture itself.
        kind: "exemplar", or "diffusion" where no reference has room for the region and its ring.
        reference: number of the reference taken.
        place: (top, left): the region's pixel (y, x) was taken from (top + y, left + x) of the reference, or
            from nearby if it was taken between pixels or turned.
        turn: degrees, from x towards y, by which the reference shows the region's surroundings turned.
    """

    pixels: Tensor
    kind: Literal["exemplar", "diffusion"]
    reference: int | None = None
    place: tuple[int, int] | None = None
    turn: float = 0.0


@torch.no_grad()
def fill_roi(
    picture: Tensor,
    roi: Tensor,
    references: References | None,
    *,
    ring: int = 12,
    leave_out: int | Collection[int] | None = None,
    valid: Tensor | None = None,
    turn: bool = True,
) -> Fill:
    """Fill a region from the reference window whose surroundings differ least, or else by diffusion.

    What is compared is the ring around the region; what is moved over the references is the bounding box of
    region and ring, so that a whole picture finds its phase and pose as well as a crop does. Where a turn, or
    a shift of less than a pixel, fits the surroundings clearly better, the fill is taken from there.

    Args:
        picture: (3, H, W) in 0..1, a frame or a part of it.
        roi: (H, W) bool, the region.
        references: good pictures on the same device; None asks for diffusion.
        ring: px, how far the compared surroundings reach.
        leave_out: number or numbers of references that must not be used, such as the picture itself.
        valid: (H, W) bool, False where the picture shows nothing (padding); by default all is valid.
        turn: False takes windows of whole pixels, not turned.

    Raises:
        UsageError: the region is empty, or leaves no valid pixel around it.
    """
    shown = torch.ones_like(roi) if valid is None else valid
    surroundings = _within(roi, ring) & ~roi & shown
    if not (bool(roi.any()) and bool(surroundings.any())):
        raise UsageError(
            f"A region of {int(roi.sum())} of {roi.numel()} px cannot be filled.",
            "Give a region that leaves some of the picture around it.",
        )
    if references is not None:
        left_out = {leave_out} if isinstance(leave_out, int) else set(leave_out or ())
        scale = max(ring // 3, 1) if turn else None
        exemplar = _exemplar_fill(picture, roi, surroundings, references, left_out, scale)
        if exemplar is not None:
            return exemplar
    spread = pull_push(picture[None], (~roi & shown)[None, None])[0]
    return Fill(torch.where(roi, spread.clamp(0, 1), picture), "diffusion")


def _within(roi: Tensor, distance: float) -> Tensor:
    """(H, W) bool: pixels at most so far from the region (Euclidean)."""
    from scipy.ndimage import distance_transform_edt

    if not bool(roi.any()):
        return roi
    return torch.from_numpy(distance_transform_edt((~roi).cpu().numpy()) <= distance).to(roi.device)


def _exemplar_fill(
    picture: Tensor,
    roi: Tensor,
    surroundings: Tensor,
    references: References,
    left_out: set[int],
    scale: int | None,
) -> Fill | None:
    """None where no reference has room. `scale`: as in `closer_place`; None: no turns."""
    used = roi | surroundings
    corners = used.nonzero()
    (top, left), (bottom, right) = corners.amin(0).tolist(), (corners.amax(0) + 1).tolist()
    box = (slice(top, bottom), slice(left, right))
    own, ring = picture[:, *box], surroundings[box]  # (3, h, w), (h, w)
    window = best_window(own, ring, references, left_out)
    if window is None:
        return None
    number, y, x, turn = *window, 0.0
    taken = references.pixels[number, :, y : y + bottom - top, x : x + right - left].to(picture.dtype) / 255
    if scale is not None:
        around = Surroundings(own, ring, used[box])
        closer = closer_place(around, references, window, scale=scale, left_out=left_out)
        if closer is not None:
            number, (y, x), turn = closer.reference, closer.corner(*ring.shape), closer.turn
            taken = closer.shown_by(references, *ring.shape)
    light = _blurred(pull_push((own - taken)[None], ring[None, None])[0], _LIGHT_SIGMA)
    pixels = picture.clone()
    pixels[:, *box] = torch.where(roi[box], (taken + light).clamp(0, 1), own)
    return Fill(pixels, "exemplar", number, (y - top, x - left), turn)


def _blurred(values: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (C, H, W)."""
    rows, columns = (torch.tensor(gaussian_matrix(n, sigma)).to(values) for n in values.shape[1:])
    return rows @ values @ columns.T


def pull_push(values: Tensor, known: Tensor) -> Tensor:
    """Continue known values smoothly into unknown places; what is known is kept as it is.

    Means of known pixels are pooled by 2 until a side of 2 is left; cells that then still know nothing take
    the mean of all that is known. On the way back up a cell keeps its own mean where it has one, and is
    interpolated where not (the pull-push of Gortler et al., The Lumigraph, SIGGRAPH 1996).

    Args:
        values: (B, C, H, W). known: (B, 1, H, W) bool, at least one true in each picture.

    Raises:
        UsageError: nothing is known of a picture.
    """
    if not bool(known.flatten(1).any(dim=1).all()):
        raise UsageError("Nothing is known of a picture to be filled.", "Leave some pixels known.")
    height, width = values.shape[-2:]
    num_levels = max(0, math.ceil(math.log2(max(height, width))) - 1)
    step = 2**num_levels
    room = (0, -width % step, 0, -height % step)
    weights = [F.pad(known.to(values.dtype), room)]
    sums = [F.pad(torch.where(known, values, 0), room)]
    for _ in range(num_levels):
        weights.append(F.avg_pool2d(weights[-1], 2))
        sums.append(F.avg_pool2d(sums[-1], 2))
    overall = sums[-1].sum(dim=(2, 3), keepdim=True) / weights[-1].sum(dim=(2, 3), keepdim=True)
    filled = _kept(sums[-1], weights[-1], overall)
    for total, weight in zip(reversed(sums[:-1]), reversed(weights[:-1]), strict=True):
        coarse = F.interpolate(filled, scale_factor=2, mode="bilinear", align_corners=False)
        filled = _kept(total, weight, coarse)
    return filled[..., :height, :width]


def _kept(total: Tensor, weight: Tensor, otherwise: Tensor) -> Tensor:
    """A cell's mean of known pixels where it has any."""
    return torch.where(weight > 0, total / weight.clamp_min(1e-30), otherwise)
