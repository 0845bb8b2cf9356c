"""From a solved mask to pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fettle.refine.readout import choose_mask, cleaned, read_out, refined_map, refined_share, snapped
from fettle.refine.settings import F2PADConfig, Lengths
from refine_toys import SQUARE, grey_with, problem_of

LENGTHS = Lengths(F2PADConfig(), 256, 256)


def read(unknown: torch.Tensor, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    picture = grey_with(SQUARE)
    roi = torch.zeros(64, 64, dtype=torch.bool)
    roi[16:48, 16:48] = True
    config = F2PADConfig.model_validate(settings)
    found = read_out(
        picture,
        roi,
        (picture - 0.5) * roi,
        unknown,
        torch.ones_like(roi),
        cut=0.1,
        config=config,
        lengths=Lengths(config, 64, 64),
    )
    return found.soft, found.mask


def test_half_the_noise_floor_is_a_half() -> None:
    """What is removed has a size of 0.1, half of tau, give or take a hundredth."""
    just = torch.full((3, 64, 64), 0.1 / 3**0.5)
    soft, mask = read(just * 1.01, read_out="a")
    assert float(soft[30, 30]) == pytest.approx(0.5025, abs=1e-3)
    assert bool(mask[30, 30])
    _, mask = read(just * 0.99, read_out="a")
    assert not mask.any()


def test_a_mask_that_is_transparent_throughout_counts_as_a_whole_one() -> None:
    square = (grey_with(SQUARE)[0] > 0.6).float()[None]
    for kind in ("V", "a", "guided"):
        soft, mask = read(0.3 * square, read_out=kind)
        whole_soft, whole_mask = read(square, read_out=kind)
        torch.testing.assert_close(soft, whole_soft, msg=kind)
        assert torch.equal(mask, whole_mask), kind


def test_read_outs_agree_on_a_clear_square() -> None:
    square = grey_with(SQUARE)[0] > 0.6
    for kind in ("V", "a", "guided"):
        _, mask = read(square.float()[None], read_out=kind)
        assert torch.equal(mask, square), kind


def test_guided_read_out_follows_the_pictures_edge() -> None:
    """A mask with holes all over becomes whole inside the edge, and does not leave it."""
    square = grey_with(SQUARE)[0] > 0.6
    holes = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.4
    _, plain = read((square & ~holes).float()[None], read_out="a")
    _, guided = read((square & ~holes).float()[None], read_out="guided")
    assert not torch.equal(plain, square)
    assert torch.equal(guided, square)


def test_free_form_reads_its_own_size() -> None:
    anomaly = (grey_with(SQUARE) - 0.5) * 0.5
    _, mask = read(anomaly, read_out="a")
    assert torch.equal(mask, grey_with(SQUARE)[0] > 0.6)
    soft, _ = read(anomaly, read_out="V")
    assert float(soft[30, 30]) == pytest.approx(0.5)


def test_small_holes_are_filled_and_specks_dropped() -> None:
    mask = np.zeros((64, 64), bool)
    mask[10:30, 10:30] = True
    mask[12:15, 12:17] = False  # 15 px
    mask[20:24, 20:24] = False  # 16 px
    mask[40:42, 40:44] = True  # 8 px
    mask[50:53, 50:53] = True  # 9 px
    kept = cleaned(mask, np.ones((64, 64), bool), LENGTHS)
    assert kept[12:15, 12:17].all() and not kept[20:24, 20:24].any()
    assert not kept[40:42, 40:44].any() and kept[50:53, 50:53].all()


def test_a_speck_stays_where_it_is_all_there_is() -> None:
    mask = np.zeros((16, 16), bool)
    mask[3:5, 3:5] = True
    np.testing.assert_array_equal(cleaned(mask, np.ones((16, 16), bool), LENGTHS), mask)


def test_holes_outside_the_regions_stay() -> None:
    mask = np.zeros((16, 16), bool)
    mask[3:9, 3:9] = True
    mask[5, 5] = False
    roi = mask.copy()
    np.testing.assert_array_equal(cleaned(mask, roi, LENGTHS), mask)


def test_refined_share_is_above_a_half_exactly_in_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    soft = torch.rand(32, 32, generator=generator)
    soft[:4], soft[4:8] = 0, 1
    mask = torch.rand(32, 32, generator=generator) < 0.5
    roi = torch.ones(32, 32, dtype=torch.bool)
    roi[:, 28:] = False
    share = refined_share(soft, mask & roi, roi)
    assert torch.equal(share > 0.5, mask & roi)
    assert share[~roi].abs().max() == 0
    torch.testing.assert_close(share[8:, :28], (0.5 * mask + 0.5 * soft)[8:, :28], atol=5e-4, rtol=0)


def test_refined_map_adds_in_the_mask_and_holds_the_rest_of_the_region_down() -> None:
    base = torch.tensor([[0.5, 3.0, 1.0, 1.0, 0.3]])
    share = torch.tensor([[0.0, 0.0, 0.75, 0.4, 0.4]])
    inside = torch.tensor([[False, False, True, True, True]])
    found = refined_map(base, share, inside, peak=2.0, hold=0.5)
    torch.testing.assert_close(found, torch.tensor([[0.5, 2.0, 2.5, 0.5, 0.3]]))


# --- the choice between masks


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_objective_takes_the_mask_that_explains_most_for_its_area(batch: int) -> None:
    problem, energy = problem_of(grey_with(SQUARE))
    square = grey_with(SQUARE)[0] > 0.6
    half, whole = square.clone(), problem.roi[0, 0] > 0
    half[32:] = False
    assert choose_mask([half, square, whole], problem, energy, 0.6, batch) == 1
    assert choose_mask([square, square], problem, energy, 0.6, batch) == 0
    # J: nothing 1; half of it 0.5 + weight / 8; the square weight / 4.
    assert choose_mask([half, square], problem, energy, 3.9, batch) == 1
    assert choose_mask([half, square], problem, energy, 4.1, batch) == 0


def test_snap_stays_within_the_regions_and_finds_a_colour() -> None:
    pytest.importorskip("cv2")
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    picture = (grey_with(SQUARE) + noise).clamp(0, 1)
    square = grey_with(SQUARE)[0] > 0.6
    roi = torch.zeros(64, 64, dtype=torch.bool)
    roi[18:46, 18:46] = True
    seeds = torch.zeros_like(roi)
    seeds[28:36, 28:36] = True
    found = snapped(picture, roi, seeds, 8)
    assert found is not None and torch.equal(found, square)
    assert snapped(picture, roi, torch.zeros_like(roi), 8) is None
