"""AUPRO, the area under the per-region-overlap curve, and the weights that carry the regions.

Bergmann, Batzner, Fauser, Sattlegger, Steger, "The MVTec Anomaly Detection Dataset", IJCV 129, 2021.
Every region counts the same. So each defect pixel carries the weight 1 / (size of its region), as an
integer, and the mean overlap at a threshold is the share of the weight at or above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fettle.errors import UsageError
from fettle.metrics.ranking import DefectPoints

REGION_WEIGHT = 1 << 44
"""The weight of a region, shared evenly by its pixels (rounded down)."""

MAX_REGIONS = 1 << 19
"""With fewer regions than this, sums of weights stay below 2^63."""

_BLOCK = 1 << 16  # points a step, to keep temporaries small


@dataclass(frozen=True)
class MaskRegions:
    """The regions of one mask inside the region of interest.

    Attributes:
        weights: (defect pixels,) int64, in row-major order of the pixels `mask & valid`.
        num_regions: regions with at least one pixel inside.
    """

    weights: NDArray[np.int64]
    num_regions: int


def mask_regions(mask: NDArray[np.bool_], valid: NDArray[np.bool_] | None = None) -> MaskRegions:
    """Label a mask (H, W) with 8-connectivity, then cut it by `valid` (H, W).

    Labelling comes first: a region that the cut divides stays one region.
    """
    from scipy import ndimage

    box = bounding_box(mask)
    if box is None:
        return MaskRegions(np.empty(0, np.int64), 0)
    labels, _ = ndimage.label(mask[box], structure=np.ones((3, 3), bool))
    inside = mask[box] if valid is None else mask[box] & valid[box]
    region = labels[inside]  # row-major, and the box keeps that order
    size = np.bincount(region)
    weight = REGION_WEIGHT // np.maximum(size, 1)
    return MaskRegions(weight[region].astype(np.int64), int(np.count_nonzero(size)))


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """The smallest box (rows, columns) that holds all of a mask (H, W); None when it is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return slice(top, bottom), slice(int(columns[0]), int(columns[-1]) + 1)


def aupro_of(points: DefectPoints, weight: NDArray[np.int64], limit: float) -> float:
    """The area under PRO over FPR from 0 to `limit`, divided by `limit`.

    PRO is constant except at defect scores, where it rises in a straight line over the good pixels
    that tie with them. So the area is a sum of flats and ramps, each cut at `limit`.

    Args:
        points: of all defect pixels, highest score first.
        weight: (points,) region weight at each point.
        limit: the largest FPR, in (0, 1].

    Raises:
        UsageError: `limit` is not in (0, 1].
    """
    if not 0 < limit <= 1:
        raise UsageError(f"The FPR limit is {limit}.", "Give a limit above 0 and not above 1.")
    end = limit * points.num_good  # FPR counted in good pixels
    total = int(weight.sum())
    area, reached, passed = 0.0, 0, 0  # so far: area, weight at or above, good pixels at or above
    for first in range(0, weight.size, _BLOCK):
        block = slice(first, first + _BLOCK)
        start, stop = points.above[block], points.at_or_above[block]
        flat_from = np.concatenate([[passed], stop[:-1]])
        after = reached + np.cumsum(weight[block])
        before = np.concatenate([[reached], after[:-1]]) / total
        width = np.clip(end - start, 0, stop - start)
        slope = (after / total - before) / np.maximum(stop - start, 1)
        area += float(np.sum(before * (np.minimum(start, end) - np.minimum(flat_from, end))))
        area += float(np.sum(width * (before + slope * width / 2)))
        reached, passed = int(after[-1]), int(stop[-1])
    area += end - min(passed, end)  # PRO is 1 below the lowest defect score
    return float(min(1.0, area / end))
