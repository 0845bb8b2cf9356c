"""Fills: diffusion keeps and continues, exemplars are found where a plain loop finds them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.refine.fill import fill_roi, pull_push
from fettle.refine.references import References
from fettle.refine.search import best_window


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(pictures: Tensor, valid: Tensor | None = None) -> References:
    """References of pictures (R, 3, H, W) in 0..1."""
    everywhere = torch.ones(len(pictures), 1, *pictures.shape[2:], dtype=torch.bool)
    return References.from_views(pictures, everywhere if valid is None else valid)


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=seeded(seed))


def stripes(height: int, width: int, shift: int = 0, period: int = 8) -> Tensor:
    """(3, H, W): a pattern that repeats itself along both sides."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None] + shift
    wave = 0.5 + 0.2 * torch.sin(2 * math.pi * x / period) + 0.1 * torch.cos(2 * math.pi * y / period)
    return wave.expand(3, height, width).clone()


def square(height: int, width: int, top: int, left: int, side: int) -> Tensor:
    roi = torch.zeros(height, width, dtype=torch.bool)
    roi[top : top + side, left : left + side] = True
    return roi


# --- pull-push


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (40, 17)])
@pytest.mark.parametrize(("top", "left"), [(8, 1), (0, 0), (16, 0)])
def test_a_constant_is_continued(size: tuple[int, int], top: int, left: int) -> None:
    known = ~square(*size, top, left, 16)[None, None]
    values = torch.where(known, 0.37, 0.0).expand(1, 3, -1, -1)
    assert float((pull_push(values, known) - 0.37).abs().max()) < 1e-6


def test_known_values_are_kept_and_unknown_ones_lie_between_them() -> None:
    values = 0.2 + 0.5 * noise(2, 45, 70)
    known = torch.rand(2, 1, 45, 70, generator=seeded(1)) < 0.05
    filled = pull_push(torch.where(known, values, 9.0), known)
    everywhere = known.expand_as(values)
    assert torch.equal(filled[everywhere], values[everywhere])
    assert float(filled.min()) >= 0.2 - 1e-6
    assert float(filled.max()) <= 0.7 + 1e-6


def test_far_from_what_is_known_the_mean_is_taken() -> None:
    values, known = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    values[..., 0, 0], values[..., 0, 1] = 0.2, 0.6
    known[..., 0, :2] = True
    torch.testing.assert_close(pull_push(values, known)[..., -1, -1], torch.tensor([[0.4]]))


def test_a_picture_is_filled_as_it_would_be_alone() -> None:
    values, known = noise(3, 20, 31), torch.rand(3, 1, 20, 31, generator=seeded(1)) < 0.3
    together = pull_push(values, known)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], pull_push(values[i : i + 1], known[i : i + 1]))


def test_nothing_can_be_continued_from_nothing() -> None:
    known = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    known[1] = False
    with pytest.raises(UsageError, match="known"):
        pull_push(torch.zeros(2, 1, 8, 8), known)


# --- the search


def looped(own: Tensor, ring: Tensor, references: References) -> tuple[float, tuple[int, int, int]]:
    """Least squared difference over every window in turn, and where."""
    height, width = own.shape[1:]
    best = (math.inf, (-1, -1, -1))
    for number, pixels in enumerate(references.pixels.double() / 255):
        for top in range(pixels.shape[1] - height + 1):
            for left in range(pixels.shape[2] - width + 1):
                window = (slice(top, top + height), slice(left, left + width))
                if bool(references.valid[number, 0, *window].all()):
                    difference = (own.double() - pixels[:, *window]).square().sum(0)
                    best = min(best, (float(difference[ring].sum()), (number, top, left)))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_window_is_the_one_that_a_loop_finds(seed: int) -> None:
    valid = torch.rand(11, 1, 21, 18, generator=seeded(seed)) < 0.995
    references = kept(noise(11, 21, 18, seed), valid)
    own = noise(1, 7, 5, seed + 100)[0]
    ring = torch.rand(7, 5, generator=seeded(seed + 200)) < 0.6
    assert best_window(own, ring, references) == looped(own, ring, references)[1]


def test_no_window_runs_over_the_edge() -> None:
    reference = noise(1, 16, 16)
    wrapped = torch.roll(reference[0], (4, 5), dims=(1, 2))[:, :8, :8]
    ring = torch.ones(8, 8, dtype=torch.bool)
    assert best_window(wrapped, ring, kept(reference)) == looped(wrapped, ring, kept(reference))[1]


def test_of_equal_windows_the_first_is_taken() -> None:
    """Whatever rounding the transforms leave: the tile lies at other places in each reference."""
    pattern = noise(1, 11, 13, seed=2)[0].repeat(1, 5, 5)[:, :50, :61]
    own, ring = pattern[:, 25:34, 31:42], torch.ones(9, 11, dtype=torch.bool)
    tiles = torch.stack([torch.roll(pattern, (k, 2 * k), dims=(1, 2)) for k in range(12)])
    assert best_window(own, ring, kept(tiles)) == (0, 25 - 2 * 11, 31 - 2 * 13)


def test_what_is_left_out_is_not_taken() -> None:
    references = kept(noise(3, 24, 24))
    picture, roi = references.pixels[1].float() / 255, square(24, 24, 10, 10, 3)
    assert fill_roi(picture, roi, references, ring=3).reference == 1
    assert fill_roi(picture, roi, references, ring=3, leave_out=1).reference in (0, 2)
    assert fill_roi(picture, roi, references, ring=3, leave_out={0, 1}).reference == 2
    assert fill_roi(picture, roi, references, ring=3, leave_out=range(3)).kind == "diffusion"


# --- the fill


def test_a_copy_of_the_picture_restores_it() -> None:
    good = noise(1, 64, 64)
    roi = square(64, 64, 20, 30, 10)
    references = kept(torch.cat([noise(2, 64, 64, 5), good]))
    fill = fill_roi(torch.where(roi, 0.0, good[0]), roi, references)
    assert fill.reference == 2
    assert fill.place == (0, 0)
    assert float((fill.pixels - good[0]).abs().max()) < 2.1 / 255


def test_a_periodic_texture_finds_its_phase() -> None:
    good = stripes(64, 64, shift=3)
    roi = square(64, 64, 24, 24, 14)
    fill = fill_roi(torch.where(roi, 1.0, good), roi, kept(stripes(64, 64)[None]))
    assert fill.place is not None
    assert (fill.place[0] % 8, fill.place[1] % 8) == (0, 3)
    assert float((fill.pixels - good).abs().max()) < 3 / 255


def test_a_crop_is_filled_from_its_place_in_the_frame() -> None:
    good = noise(1, 96, 96)
    crop, roi = good[0, :, 30:80, 20:70], square(50, 50, 20, 22, 8)
    fill = fill_roi(torch.where(roi, 0.5, crop), roi, kept(good))
    assert fill.place == (30, 20)


def test_the_light_of_the_picture_is_carried_over() -> None:
    reference = 0.6 * stripes(96, 96)
    light = torch.linspace(0, 0.3, 96)[None, :, None] * torch.tensor([1.0, 0.6, 0.2])[:, None, None]
    good, roi = reference + light, square(96, 96, 40, 40, 20)
    fill = fill_roi(torch.where(roi, 0.0, good), roi, kept(reference[None]))
    assert float((fill.pixels - good)[:, roi].abs().max()) < 0.02
    assert float((reference - good)[:, roi].abs().max()) > 0.15


def test_the_light_carries_no_grain() -> None:
    picture = 0.5 + 0.05 * torch.randn(3, 64, 64, generator=seeded())
    roi = square(64, 64, 22, 22, 20)
    fill = fill_roi(picture, roi, kept(torch.full((1, 3, 64, 64), 0.5)))
    steps = fill.pixels[:, 22:42, 22:42].diff(dim=2)
    assert float(steps.abs().max()) < 0.01


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 52), (52, 0), (52, 52), (0, 20)])
def test_a_corner_is_filled_like_the_rest(top: int, left: int) -> None:
    good, roi = 0.3 + 0.4 * noise(1, 64, 64), square(64, 64, top, left, 12)
    damaged = torch.where(roi, 0.0, good[0])
    exemplar = fill_roi(damaged, roi, kept(good))
    assert float((exemplar.pixels - good[0]).abs().max()) < 2.1 / 255
    diffusion = fill_roi(damaged, roi, None)
    assert float(diffusion.pixels.min()) >= 0.3 - 1e-6


def test_the_defect_has_no_part_in_its_fill() -> None:
    picture, roi = noise(1, 48, 48)[0], square(48, 48, 10, 15, 12)
    references = kept(noise(4, 48, 48, 3))
    for given in (references, None):
        first = fill_roi(torch.where(roi, 0.0, picture), roi, given)
        second = fill_roi(torch.where(roi, noise(1, 48, 48, 9)[0], picture), roi, given)
        assert torch.equal(first.pixels[:, roi], second.pixels[:, roi])


def test_outside_the_region_the_picture_is_unchanged() -> None:
    picture, roi = noise(1, 48, 48)[0], square(48, 48, 10, 15, 12)
    for references in (kept(noise(4, 48, 48, 3)), None):
        fill = fill_roi(picture, roi, references)
        assert torch.equal(fill.pixels[:, ~roi], picture[:, ~roi])
        assert 0 <= float(fill.pixels.min()) <= float(fill.pixels.max()) <= 1


def test_padding_has_no_part_in_a_fill() -> None:
    picture, roi = noise(1, 48, 48)[0], square(48, 48, 14, 15, 12)
    valid = torch.ones(48, 48, dtype=torch.bool)
    valid[:12] = False
    other = torch.where(valid, picture, 0.0)
    for references in (kept(noise(4, 48, 48, 3)), None):
        first = fill_roi(picture, roi, references, valid=valid)
        second = fill_roi(other, roi, references, valid=valid)
        assert torch.equal(first.pixels[:, roi], second.pixels[:, roi])


def test_without_room_in_a_reference_the_fill_is_diffusion() -> None:
    picture, roi = noise(1, 48, 48)[0], square(48, 48, 10, 10, 20)
    assert fill_roi(picture, roi, kept(noise(1, 32, 64))).kind == "diffusion"
    padded = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    padded[:, :, :, :30] = True
    fill = fill_roi(picture, roi, kept(noise(1, 64, 64), padded))
    assert (fill.kind, fill.reference, fill.place) == ("diffusion", None, None)


@pytest.mark.parametrize("side", [0, 16])
def test_a_region_needs_surroundings(side: int) -> None:
    with pytest.raises(UsageError, match="region"):
        fill_roi(noise(1, 16, 16)[0], square(16, 16, 0, 0, side), None)


def test_a_fill_in_inference_mode_serves_gradients_later() -> None:
    picture, roi = noise(1, 48, 48)[0], square(48, 48, 10, 15, 12)
    references = kept(noise(4, 48, 48, 3))
    with torch.inference_mode():
        first = fill_roi(picture, roi, references)
    second = fill_roi(picture.clone().requires_grad_(), roi, references)
    assert torch.equal(first.pixels, second.pixels)
