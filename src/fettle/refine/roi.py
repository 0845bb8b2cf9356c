"""Where to refine: regions of raised energy, and the crop around them (sections 5.1 and 5.2)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fettle.refine.energy import Box

_EIGHT = np.ones((3, 3), dtype=bool)


class Roi(NamedTuple):
    """Regions of interest of one frame.

    Attributes:
        mask: (H, W) bool.
        labels: (H, W): 0 outside, 1 to `num_components` by connected component (8 neighbours).
    """

    mask: NDArray[np.bool_]
    labels: NDArray[np.int32]
    num_components: int


def find_roi(
    energy: NDArray[np.float32],
    valid: NDArray[np.bool_],
    *,
    high: float,
    low: float,
    rel: float,
    dilate: float,
) -> Roi:
    """Components above `low` that reach above `high`, cut at a share of their own peak, then widened.

    Args:
        energy: (H, W), settled patch energy brought to pixels without blur.
        valid: (H, W).
        rel: share of a component's peak below which its skirt is cut off.
        dilate: Euclidean, px.
    """
    above = (energy > low) & valid
    labels, count = ndimage.label(above, structure=_EIGHT)
    if not count:
        return of_mask(above)
    peaks = np.zeros(count + 1, dtype=np.float32)
    np.maximum.at(peaks, labels, np.where(above, energy, 0))
    bound = np.where(peaks > high, np.maximum(low, rel * peaks), np.inf)
    bound[0] = np.inf
    return of_mask(widened(energy > bound[labels], dilate) & valid)


def of_mask(mask: NDArray[np.bool_]) -> Roi:
    """A mask and its connected components."""
    labels, count = ndimage.label(mask, structure=_EIGHT, output=np.int32)
    return Roi(mask, labels, int(count))


def widened(mask: NDArray[np.bool_], by: float) -> NDArray[np.bool_]:
    """Every pixel within a Euclidean distance of the mask, px; an empty mask stays empty."""
    if by <= 0 or not mask.any():
        return mask
    near: NDArray[np.bool_] = ndimage.distance_transform_edt(~mask) <= by
    return near


def crop_box(mask: NDArray[np.bool_], *, margin: int, least: int, multiple: int, step: int) -> Box | None:
    """The smallest square window that holds the mask and its margin, as far as the frame reaches.

    Args:
        mask: (H, W), not empty.
        least, multiple: the side is at least the one and a multiple of the other, px.
        step: its place is a multiple of this, px.

    Returns:
        None where only the whole frame would do.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    spans = [
        (max(int(where[0]) - margin, 0), min(int(where[-1]) + 1 + margin, total))
        for where, total in ((rows, height), (columns, width))
    ]
    longest = max(end - start for start, end in spans)
    side = multiple * -(-max(least, longest) // multiple)
    while side < max(height, width) and side <= min(height, width):
        places = [
            _place(start, end, side, total, step)
            for (start, end), total in zip(spans, (height, width), strict=True)
        ]
        if None not in places:
            top, left = places
            assert top is not None and left is not None
            return Box(top, left, side, side)
        side += multiple
    return None


def _place(start: int, end: int, side: int, total: int, step: int) -> int | None:
    """The start, a multiple of `step`, of a window that covers start..end and is centred on it as nearly as
    may be; None where there is none."""
    first = max(-(-(end - side) // step), 0)
    last = min(start, total - side) // step
    if first > last:
        return None
    wanted = round(((start + end - side) / 2) / step)
    return step * min(max(wanted, first), last)
