"""Pasted defects: masks are exact, sizes and places as promised, seeds repeat."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import textured
from fettle.bench.pasted import AREA, Pasted, paste_defect, paste_defects
from fettle.errors import UsageError

PICTURES = [textured(seed, 64, 96) for seed in range(12)]


def pasted(seed: int = 0) -> list[Pasted]:
    return paste_defects(PICTURES, seed)


def test_mask_is_exactly_what_changed() -> None:
    before = [picture.copy() for picture in PICTURES]
    for picture, old, (changed, mask) in zip(PICTURES, before, pasted(), strict=True):
        np.testing.assert_array_equal(picture, old)  # the argument stays as it is
        assert changed.dtype == np.uint8 and changed.shape == picture.shape and mask.shape == (64, 96)
        np.testing.assert_array_equal(changed[~mask], picture[~mask])
        assert (changed[mask] != picture[mask]).any(axis=1).all()


def test_area_is_within_its_bounds() -> None:
    shares = [mask.mean() for seed in range(10) for _, mask in pasted(seed)]
    assert max(shares) <= AREA[1] + 1e-3 and min(shares) >= 0.9 * AREA[0]  # equal pixels may be left out
    assert max(shares) > 0.03 and min(shares) < 0.008  # both ends are drawn


def test_defects_can_be_seen() -> None:
    for picture, (changed, mask) in zip(PICTURES, pasted(), strict=True):
        assert np.abs(changed.astype(int) - picture)[mask].mean() >= 5


def test_defects_lie_everywhere() -> None:
    covered = np.zeros((64, 96), bool)
    for seed in range(40):
        for _, mask in pasted(seed):
            covered |= mask
    assert covered.mean() > 0.95


def test_seed_repeats_and_another_one_differs() -> None:
    for one, same, other in zip(pasted(1), pasted(1), pasted(2), strict=True):
        np.testing.assert_array_equal(one.picture, same.picture)
        np.testing.assert_array_equal(one.mask, same.mask)
        assert not np.array_equal(one.mask, other.mask)


def test_defect_stays_inside_what_is_valid_and_its_area_is_a_share_of_it() -> None:
    valid = np.zeros((64, 96), bool)
    valid[20:44, 30:70] = True
    for picture, mask in paste_defects(PICTURES, 3, [valid] * len(PICTURES)):
        assert not mask[~valid].any() and picture.shape == (64, 96, 3)
        assert 1 <= mask.sum() <= np.ceil(AREA[1] * valid.sum())


def test_donor_may_have_another_size() -> None:
    donor = np.full((5, 9, 3), 250, np.uint8)
    picture, mask = paste_defect(PICTURES[0], donor, np.random.default_rng(0))
    values = picture[mask]
    assert mask.any() and (values == values[0]).all()  # filled with the donor's one colour


@pytest.mark.parametrize(
    ("picture", "valid", "sentence"),
    [
        (np.zeros((8, 8, 3), np.float32), None, "float32"),
        (np.zeros((8, 8), np.uint8), None, r"\(8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool), "no valid pixel"),
    ],
)
def test_what_cannot_be_pasted_into_is_refused(
    picture: np.ndarray, valid: np.ndarray | None, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        paste_defect(picture, picture, np.random.default_rng(0), valid=valid)
