"""Defect regions: connected pixels above the pixel threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fettle.errors import UsageError
from fettle.inspection import Region


@dataclass(frozen=True)
class RegionRules:
    """Which regions count, and the picture's scale: the keyword arguments of `find_regions`."""

    min_area_px: int = 1
    min_length_px: float = 0.0
    mm_per_pixel: float | None = None
    max_regions: int = 100


def find_regions(
    anomaly_map: NDArray[np.float32],
    valid: NDArray[np.bool_],
    threshold: float,
    *,
    min_area_px: int = 1,
    min_length_px: float = 0.0,
    mm_per_pixel: float | None = None,
    max_regions: int = 100,
    marked: NDArray[np.bool_] | None = None,
) -> tuple[Region, ...]:
    """Connected regions (8 neighbours) of valid pixels above `threshold`, largest peak first.

    Args:
        anomaly_map: (H, W) in the picture's own pixels.
        valid: (H, W), False outside the region of interest.
        threshold: a pixel belongs to a region if its value is above it.
        min_area_px: smaller regions are left out.
        min_length_px: shorter regions (major axis) are left out.
        mm_per_pixel: scale of the picture, for area and length in millimetres.
        max_regions: at most so many are given, those of the largest peaks.
        marked: (H, W), the pixels that regions are made of, where something else than the threshold says so.

    Raises:
        UsageError: shapes that differ, a NaN in the map or threshold, or a scale that is not positive.
    """
    if anomaly_map.shape != valid.shape:
        raise UsageError(
            f"Map {anomaly_map.shape} and valid {valid.shape} differ.", "Give one size for both."
        )
    if np.isnan(threshold) or np.isnan(anomaly_map).any():
        raise UsageError("The map or its threshold holds NaN.", "Check the model's weights.")
    if mm_per_pixel is not None and not 0 < mm_per_pixel < np.inf:
        raise UsageError(f"A scale of {mm_per_pixel} mm a pixel is not positive.", "Measure it again.")
    above = ((anomaly_map > threshold) if marked is None else marked) & valid
    if not above.any():
        return ()

    from scipy import ndimage  # only where there is something to label

    labels, count = ndimage.label(above, structure=np.ones((3, 3), dtype=bool))
    own = labels[above] - 1  # the region of each pixel above
    areas = np.bincount(own, minlength=count)
    peaks = np.full(count, -np.inf)
    np.maximum.at(peaks, own, anomaly_map[above])
    boxes = ndimage.find_objects(labels)
    regions: list[Region] = []
    for place in np.argsort(-peaks, kind="stable"):
        if len(regions) == max_regions:
            break
        if areas[place] < min_area_px:
            continue
        rows, columns = boxes[place]
        length = _major_axis(labels[rows, columns] == place + 1)
        if length < min_length_px:
            continue
        area = int(areas[place])
        regions.append(
            Region(
                left=columns.start,
                top=rows.start,
                width=columns.stop - columns.start,
                height=rows.stop - rows.start,
                area_px=area,
                length_px=length,
                peak=float(peaks[place]),
                area_mm2=None if mm_per_pixel is None else area * mm_per_pixel**2,
                length_mm=None if mm_per_pixel is None else length * mm_per_pixel,
            )
        )
    return tuple(regions)


def _major_axis(inside: NDArray[np.bool_]) -> float:
    """Major axis of the ellipse with the second moments of these pixels, px; a pixel is a unit square."""
    y, x = np.nonzero(inside)
    xx, yy = x.var() + 1 / 12, y.var() + 1 / 12  # 1/12: variance within a pixel
    xy = np.mean((x - x.mean()) * (y - y.mean()))
    largest = (xx + yy) / 2 + np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    return float(4 * np.sqrt(largest))
