"""Connected regions above a threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fettle.calibration import find_regions
from fettle.errors import UsageError

VALID = np.ones((40, 60), bool)


def _blank() -> np.ndarray:
    return np.zeros((40, 60), np.float32)


def test_nothing_above_gives_nothing() -> None:
    level = np.full((40, 60), 0.5, np.float32)
    assert find_regions(level, VALID, 0.5) == ()  # strictly above


def test_box_area_and_peak() -> None:
    values = _blank()
    values[10:14, 20:29] = 1
    values[12, 25] = 3
    (region,) = find_regions(values, VALID, 0.5, mm_per_pixel=0.5)
    assert (region.left, region.top, region.width, region.height) == (20, 10, 9, 4)
    assert (region.area_px, region.peak, region.area_mm2) == (36, 3.0, 9.0)
    # A rectangle's variance along its long side is length^2 / 12.
    assert region.length_px == pytest.approx(4 * 9 / math.sqrt(12))
    assert region.length_mm == pytest.approx(region.length_px / 2)


def test_length_follows_a_slanted_line() -> None:
    values = _blank()
    for step in range(30):
        values[step + 2, step + 5] = 1
    (region,) = find_regions(values, VALID, 0.5)  # diagonal neighbours are connected
    assert region.area_px == 30
    # Variance along the diagonal: 2 (30^2 - 1) / 12 between pixels and 1 / 12 within.
    assert region.length_px == pytest.approx(4 * math.sqrt((2 * (30**2 - 1) + 1) / 12))


def test_largest_peak_first_and_small_ones_left_out() -> None:
    values = _blank()
    values[2:6, 2:6] = 1
    values[20:24, 20:24] = 2
    values[30, 50] = 9
    assert [region.peak for region in find_regions(values, VALID, 0.5)] == [9, 2, 1]
    assert [region.peak for region in find_regions(values, VALID, 0.5, min_area_px=2)] == [2, 1]
    assert [region.peak for region in find_regions(values, VALID, 0.5, max_regions=1)] == [9]
    assert [region.peak for region in find_regions(values, VALID, 0.5, min_length_px=2)] == [2, 1]


def test_pixels_outside_the_region_of_interest_do_not_count() -> None:
    values = _blank()
    values[5:9, 5:9] = 1
    valid = VALID.copy()
    valid[:, :7] = False
    (region,) = find_regions(values, valid, 0.5)
    assert (region.left, region.area_px) == (7, 8)


def test_marked_pixels_are_the_regions_whatever_the_map() -> None:
    """Peaks are still the map's, and pixels that are not valid are still left out."""
    values, marked = _blank(), np.zeros((40, 60), bool)
    values[20:30, 40:50] = 9
    values[6, 8] = 0.25
    marked[5:9, 5:12] = True
    marked[30, 50] = True
    valid = VALID.copy()
    valid[:, :7] = False
    regions = find_regions(values, valid, 0.5, marked=marked)
    assert [(r.left, r.top, r.width, r.height, r.area_px, r.peak) for r in regions] == [
        (7, 5, 5, 4, 20, 0.25),
        (50, 30, 1, 1, 1, 0.0),
    ]
    assert find_regions(values, valid, np.inf, marked=marked) == regions
    assert find_regions(values, valid, 0.5, marked=np.zeros((40, 60), bool)) == ()
    assert find_regions(values, valid, 0.5, marked=values > 0.5) == find_regions(values, valid, 0.5)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(UsageError, match="differ"):
        find_regions(_blank(), np.ones((2, 2), bool), 0.5)
    with pytest.raises(UsageError, match="NaN"):
        find_regions(np.full((40, 60), np.nan, np.float32), VALID, 0.5)
    with pytest.raises(UsageError, match="scale"):
        find_regions(_blank(), VALID, 0.5, mm_per_pixel=0.0)
