"""Frames: what is chosen, that maps come back to the picture's own pixels, that padding never scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.errors import PictureError, UsageError
from fettle.images.framing import Frame, RoiMask, best_rectangle, choose_frame
from fettle.images.picture import Picture


def picture(height: int, width: int, dtype: type = np.uint8) -> Picture:
    rng = np.random.default_rng(height * 1000 + width)
    top = 65535 if dtype is np.uint16 else 255
    return Picture(rng.integers(0, top, (height, width, 3), dtype=dtype, endpoint=True), Path("p.png"), "0")


def test_auto_gives_the_rectangle_of_one_common_aspect() -> None:
    frame = choose_frame("auto", 256, [(256, 120)] * 5, 32)
    assert (frame.mode, frame.height, frame.width) == ("stretch", 352, 160)


def test_auto_gives_a_square_for_square_pictures() -> None:
    frame = choose_frame("auto", 256, [(512, 512), (1024, 1024)], 32)
    assert (frame.mode, frame.height, frame.width) == ("stretch", 256, 256)


def test_auto_gives_a_square_for_mixed_aspects() -> None:
    frame = choose_frame("auto", 256, [(300, 200), (200, 300)], 32)
    assert (frame.mode, frame.height, frame.width) == ("stretch", 256, 256)


@given(st.floats(-1.5, 1.5), st.sampled_from([(256, 32), (252, 14), (512, 32)]))
@settings(max_examples=60, deadline=None)
def test_rectangle_is_within_the_area_and_no_other_is_nearer(
    log_aspect: float, case: tuple[int, int]
) -> None:
    size, step = case
    height, width = best_rectangle(log_aspect, size, step)
    assert height % step == width % step == 0
    assert abs(height * width / size**2 - 1) <= 0.15
    error = abs(np.log(width / height) - log_aspect)
    for other_height in range(step, 4 * size, step):
        for other_width in range(step, 4 * size, step):
            if abs(other_height * other_width / size**2 - 1) <= 0.15:
                assert error <= abs(np.log(other_width / other_height) - log_aspect) + 1e-9


def test_native_pads_to_the_largest_and_shrinks_larger_ones_saying_so() -> None:
    frame = choose_frame("native", 256, [(100, 90), (80, 120)], 32)
    assert (frame.height, frame.width) == (128, 128)
    assert frame.place(picture(100, 90)).notes == ()
    assert "shrunk" in frame.place(picture(256, 128)).notes[0]


def test_native_pixels_are_untouched() -> None:
    frame = choose_frame("native", 256, [(64, 64)], 32)
    one = picture(64, 64)
    np.testing.assert_array_equal(np.round(frame.place(one).views[0].transpose(1, 2, 0) * 255), one.pixels)


@pytest.mark.parametrize("mode", ["square", "pad", "crop", "native", "tile", "auto"])
@pytest.mark.parametrize("size", [(64, 64), (200, 90), (90, 200), (33, 47), (300, 301)])
def test_map_comes_back_at_the_pictures_own_size(mode: str, size: tuple[int, int]) -> None:
    frame = choose_frame(mode, 64, [(64, 64), (200, 90)], 32)  # type: ignore[arg-type]
    placed = frame.place(picture(*size))
    assert placed.views.shape[1:] == (3, frame.height, frame.width)
    maps = np.ones((len(placed.views), frame.height, frame.width), np.float32)
    own, valid = frame.restore(maps, placed, size)
    assert own.shape == valid.shape == size
    np.testing.assert_allclose(own[valid], 1, atol=1e-5)
    assert not own[~valid].any()
    assert valid.all() or mode == "crop"


@pytest.mark.parametrize("mode", ["square", "pad", "native", "tile"])
def test_a_bright_spot_comes_back_where_it_was(mode: str) -> None:
    """The map of pixel values itself: its peak must lie where the picture's is."""
    pixels = np.zeros((150, 90, 3), np.uint8)
    pixels[100:110, 30:40] = 255
    frame = choose_frame(mode, 128, [(150, 90)], 32)  # type: ignore[arg-type]
    placed = frame.place(Picture(pixels, Path("p.png"), "0"))
    own, _ = frame.restore(placed.views[:, 0], placed, (150, 90))
    centre = np.argwhere(own > 0.5).mean(axis=0)
    np.testing.assert_allclose(centre, [104.5, 34.5], atol=1.0)


def test_padding_repeats_the_border_and_is_not_valid() -> None:
    frame = choose_frame("pad", 64, [(64, 32)], 32)
    placed = frame.place(picture(64, 32))
    assert placed.valid.sum() == 64 * 32
    left = placed.views[0][:, :, :16]
    np.testing.assert_array_equal(left, np.repeat(placed.views[0][:, :, 16:17], 16, axis=2))


def test_region_of_interest_is_the_only_valid_part() -> None:
    frame = choose_frame("square", 64, [(100, 200)], 32, roi=(0.5, 0, 1, 0.5))
    placed = frame.place(picture(100, 200))
    _, valid = frame.restore(np.ones((1, 64, 64), np.float32), placed, (100, 200))
    assert valid[:50, 100:].all()
    assert valid.sum() == 50 * 100
    assert placed.valid.sum() == 32 * 32


def test_region_of_any_shape_is_kept_and_applied() -> None:
    y, x = np.mgrid[:100, :200]
    disc = (y - 50) ** 2 + (x - 100) ** 2 < 40**2
    frame = choose_frame("square", 64, [(100, 200)], 32, roi_mask=RoiMask.from_array(disc))
    frame = Frame.model_validate_json(frame.model_dump_json())
    one = picture(100, 200)
    _, valid = frame.restore(np.ones((1, 64, 64), np.float32), frame.place(one), one.size)
    np.testing.assert_array_equal(valid, disc)
    larger, _ = frame.restore(np.ones((1, 64, 64), np.float32), frame.place(picture(200, 400)), (200, 400))
    assert larger[100, 200] == 1 and larger[5, 5] == 0


def test_damaged_region_of_interest_is_refused() -> None:
    with pytest.raises(ValueError, match="size"):
        RoiMask(height=10, width=10, bits="AAAA")


def test_empty_region_of_interest_is_refused() -> None:
    with pytest.raises(UsageError, match="no area"):
        choose_frame("square", 64, [(10, 10)], 32, roi=(0.5, 0, 0.5, 1))
    frame = choose_frame("square", 64, [(10, 10)], 32, roi=(0, 0, 0.01, 1))
    with pytest.raises(PictureError, match="region of interest"):
        frame.place(picture(10, 10))


def test_size_that_is_no_multiple_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="--size 256"):
        choose_frame("square", 250, [(10, 10)], 32)
    with pytest.raises(UsageError, match="--size 252"):
        choose_frame("square", 256, [(10, 10)], 14)


def test_tiles_overlap_cover_everything_and_blend_smoothly() -> None:
    frame = choose_frame("tile", 64, [(150, 170)], 32)
    placed = frame.place(picture(150, 170))
    covered = np.zeros((150, 170), int)
    for top, left in placed.boxes:
        covered[top : top + 64, left : left + 64] += 1
    assert covered.min() >= 1
    assert covered.max() >= 2
    ramp = np.arange(len(placed.boxes), dtype=np.float32)[:, None, None] * np.ones((1, 64, 64), np.float32)
    own, _ = frame.restore(ramp, placed, (150, 170))
    assert np.abs(np.diff(own, axis=1)).max() < 1  # neighbouring tiles differ by 1: no seam jumps that far


def test_16_bit_pictures_keep_their_scale() -> None:
    frame = choose_frame("square", 32, [(64, 64)], 32)
    pixels = np.full((64, 64, 3), 32768, np.uint16)
    np.testing.assert_allclose(frame.place(Picture(pixels, Path("p"), "0")).views, 32768 / 65535, atol=1e-4)


def test_frame_survives_json() -> None:
    frame = choose_frame("pad", 64, [(1, 2)], 32, roi=(0, 0, 0.5, 1))
    assert Frame.model_validate_json(frame.model_dump_json()) == frame
