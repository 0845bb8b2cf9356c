"""Regions of interest and the crop around them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fettle.refine.energy import Box
from fettle.refine.roi import Roi, crop_box, find_roi, of_mask, widened


def found(energy: NDArray[np.float32], **changed: float) -> Roi:
    bounds = {"high": 2.0, "low": 1.0, "rel": 0.15, "dilate": 0.0, **changed}
    return find_roi(energy, np.ones(energy.shape, bool), **bounds)


def test_a_component_must_reach_the_high_bound() -> None:
    energy = np.zeros((20, 20), np.float32)
    energy[2:5, 2:5] = 1.5
    energy[10:14, 10:14] = 1.5
    energy[11, 11] = 2.5
    roi = found(energy)
    assert roi.num_components == 1
    assert roi.mask.sum() == 16 and roi.mask[10:14, 10:14].all()


def test_the_skirt_of_a_high_peak_is_cut() -> None:
    """Of a peak of 20 only what exceeds 3 stays; beside it a low component keeps all above 1."""
    energy = np.zeros((20, 40), np.float32)
    energy[5:15, 5:15] = 2.9
    energy[8:10, 8:10] = 20
    energy[5:15, 25:35] = 2.9
    roi = found(energy)
    assert roi.mask[:, :20].sum() == 4
    assert roi.mask[:, 20:].sum() == 100


def test_corners_connect() -> None:
    energy = np.zeros((8, 8), np.float32)
    energy[2, 2], energy[3, 3] = 3, 1.5
    assert found(energy).mask.sum() == 2


def test_widening_is_euclidean_and_stays_within_valid() -> None:
    energy = np.zeros((21, 21), np.float32)
    energy[10, 10] = 5
    y, x = np.mgrid[:21, :21] - 10
    np.testing.assert_array_equal(found(energy, dilate=5).mask, np.hypot(y, x) <= 5)
    valid = np.ones((21, 21), bool)
    valid[:, 12:] = False
    roi = find_roi(energy, valid, high=2, low=1, rel=0.15, dilate=5)
    np.testing.assert_array_equal(roi.mask, (np.hypot(y, x) <= 5) & valid)


def test_regions_that_touch_after_widening_are_one() -> None:
    energy = np.zeros((20, 20), np.float32)
    energy[10, 5], energy[10, 9] = 5, 5
    assert found(energy).num_components == 2
    assert found(energy, dilate=2).num_components == 1


def test_nothing_raised_gives_no_region() -> None:
    roi = found(np.full((8, 8), 0.9, np.float32), dilate=3)
    assert not roi.mask.any() and roi.num_components == 0
    assert not widened(np.zeros((4, 4), bool), 3).any()
    assert of_mask(np.zeros((4, 4), bool)).num_components == 0


def test_crop_holds_the_region_and_its_margin() -> None:
    """Any region anywhere: the window lies in the frame, on its grid, covers what it should, and no smaller
    side of the allowed ones would do."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = 32 * rng.integers(3, 9, 2)
        top, left = rng.integers(0, height), rng.integers(0, width)
        bottom, right = rng.integers(top, min(top + 90, height)) + 1, rng.integers(left, width) + 1
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = True
        box = crop_box(mask, margin=24, least=96, multiple=32, step=16)
        need = max(min(bottom + 24, height) - max(top - 24, 0), min(right + 24, width) - max(left - 24, 0))
        if box is None:
            assert need > min(height, width) - 16 or max(need, 96) > min(height, width) - 32
            continue
        assert box.height == box.width and box.height % 32 == 0 and box.height >= max(96, need)
        assert box.height <= max(96, need + 15 + 31)
        assert box.top % 16 == 0 and box.left % 16 == 0
        assert box.top >= 0 and box.top + box.height <= height and box.left + box.width <= width
        assert box.top <= max(top - 24, 0) and box.top + box.height >= min(bottom + 24, height)
        assert box.left <= max(left - 24, 0) and box.left + box.width >= min(right + 24, width)


@pytest.mark.parametrize(
    ("place", "corner"), [((128, 128), (80, 80)), ((2, 2), (0, 0)), ((250, 250), (160, 160))]
)
def test_crop_is_centred_where_it_can_be(place: tuple[int, int], corner: tuple[int, int]) -> None:
    mask = np.zeros((256, 256), bool)
    mask[place] = True
    assert crop_box(mask, margin=24, least=96, multiple=32, step=16) == Box(*corner, 96, 96)
