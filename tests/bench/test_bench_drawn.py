"""Drawn defects: exact masks, seen, repeated by their seed."""

from __future__ import annotations

import numpy as np
import pytest

from fettle.bench.drawn import KINDS, draw_defect

PICTURE = np.random.default_rng(0).integers(90, 130, (128, 160, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_mask_names_is_changed_and_nothing_far_from_it(kind: str) -> None:
    for seed in range(6):
        before = PICTURE.copy()
        picture, mask = draw_defect(PICTURE, kind, np.random.default_rng(seed))
        np.testing.assert_array_equal(PICTURE, before)
        change = np.abs(picture.astype(int) - PICTURE).max(axis=2)
        assert mask.any() and mask.mean() < 0.1
        assert np.median(change[mask]) >= 8
        near = np.zeros_like(mask)
        for y, x in np.argwhere(mask):
            near[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5] = True
        assert not change[~near].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_and_another_one_differs(kind: str) -> None:
    first, same, other = (draw_defect(PICTURE, kind, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.picture, same.picture)
    np.testing.assert_array_equal(first.mask, same.mask)
    assert not np.array_equal(first.mask, other.mask)


def test_a_scratch_is_long_and_thin_and_a_stain_is_not() -> None:
    def thickness(kind: str, seed: int) -> float:
        mask = draw_defect(PICTURE, kind, np.random.default_rng(seed)).mask
        rows, columns = np.nonzero(mask)
        return float(mask.sum() / max(np.hypot(np.ptp(rows), np.ptp(columns)), 1))

    scratches, stains = ([thickness(kind, seed) for seed in range(8)] for kind in ("scratch", "stain"))
    assert max(scratches) < min(stains)


def test_defects_lie_where_the_picture_holds_something() -> None:
    picture = np.full((128, 128, 3), 120, np.uint8)
    picture[40:80, 40:80] = np.random.default_rng(1).integers(0, 255, (40, 40, 3))
    centres = []
    for seed in range(12):
        rows, columns = np.nonzero(draw_defect(picture, "stain", np.random.default_rng(seed)).mask)
        centres.append((rows.mean(), columns.mean()))
    inside = [30 < y < 90 and 30 < x < 90 for y, x in centres]
    assert sum(inside) >= 11
