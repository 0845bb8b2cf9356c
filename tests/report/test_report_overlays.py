"""Heat colours, contours and panels."""

from __future__ import annotations

import numpy as np
import pytest

from fettle.report.overlays import (
    CONTOUR_COLOUR,
    MASK_COLOUR,
    PANE_GAP,
    PANE_SIDE,
    draw_contours,
    draw_heat,
    draw_overlay,
    draw_panel,
    eight_bit,
    heat_caption,
    heat_colours,
    heat_ramp,
)

GREY = np.full((40, 60, 3), 120, np.uint8)


def constant(value: float, height: int = 40, width: int = 60) -> np.ndarray:
    return np.full((height, width), value, np.float32)


def luminance(colours: np.ndarray) -> np.ndarray:
    """CIE Y from sRGB."""
    value = colours / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def test_hotter_colours_are_always_lighter() -> None:
    ramp = luminance(heat_ramp())
    assert (np.diff(ramp[::4]) > 0).all()
    assert ramp[0] < 0.01
    assert ramp[-1] > 0.8


def test_one_value_has_one_colour_whatever_else_the_picture_holds() -> None:
    calm, wild = constant(0.3), constant(0.3)
    wild[:20] = 50.0
    np.testing.assert_array_equal(heat_colours(calm, 0.5)[30, 30], heat_colours(wild, 0.5)[30, 30])


def test_scale_runs_from_zero_over_the_threshold_to_twice_the_threshold() -> None:
    values = np.array([[0.0, 0.5, 1.0, 9.0, -1.0]], np.float32)
    colours = heat_colours(values, 0.5)[0]
    np.testing.assert_array_equal(colours, heat_ramp()[[0, 128, 255, 255, 0]])


def test_without_a_threshold_the_maximum_is_hottest_and_the_caption_says_so() -> None:
    values = np.array([[0.0, 3.0]], np.float32)
    for threshold in (None, 0.0):
        np.testing.assert_array_equal(heat_colours(values, threshold)[0], heat_ramp()[[0, 255]])
        assert "can't be compared" in heat_caption(threshold)
    assert "0.25" in heat_caption(0.25)


def test_a_map_of_zeros_needs_no_threshold() -> None:
    np.testing.assert_array_equal(heat_colours(constant(0.0), None)[0, 0], heat_ramp()[0])


def test_no_heat_leaves_the_picture_as_it_is() -> None:
    np.testing.assert_array_equal(draw_heat(GREY, constant(0.0), 0.5), GREY)


def test_heat_steps_up_at_the_threshold() -> None:
    def change(value: float) -> float:
        return float(np.abs(draw_heat(GREY, constant(value), 0.5)[0, 0].astype(int) - 120).sum())

    assert change(0.505) > 2 * change(0.495)
    assert change(0.495) > 0
    assert change(0.3) == 0  # good pictures are full of such values


def test_what_lies_outside_the_valid_area_is_dimmed() -> None:
    valid = np.ones((40, 60), bool)
    valid[:, :10] = False
    drawn = draw_heat(GREY, constant(0.0), 0.5, valid)
    assert (drawn[:, :10] < 80).all()
    np.testing.assert_array_equal(drawn[:, 10:], GREY[:, 10:])


def test_contour_runs_outside_its_region_and_leaves_it_visible() -> None:
    anomaly_map = constant(0.0)
    anomaly_map[10:20, 20:30] = 0.6
    drawn = draw_contours(GREY, anomaly_map, 0.5)
    np.testing.assert_array_equal(drawn[10:20, 20:30], GREY[10:20, 20:30])
    np.testing.assert_array_equal(drawn[9, 25], CONTOUR_COLOUR)
    np.testing.assert_array_equal(drawn[8, 25], CONTOUR_COLOUR)
    np.testing.assert_array_equal(drawn[30, 50], GREY[30, 50])


def test_a_value_at_the_threshold_is_not_above_it() -> None:
    np.testing.assert_array_equal(draw_contours(GREY, constant(0.5), 0.5), GREY)


def test_a_region_as_large_as_the_picture_is_lined_at_the_edge() -> None:
    drawn = draw_contours(GREY, constant(0.6), 0.5)
    np.testing.assert_array_equal(drawn[0, 0], CONTOUR_COLOUR)
    np.testing.assert_array_equal(drawn[20, 30], GREY[20, 30])


def test_the_labelled_mask_has_a_colour_of_its_own() -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:20, 20:30] = True
    drawn = draw_contours(GREY, constant(0.0), 0.5, mask)
    np.testing.assert_array_equal(drawn[9, 25], MASK_COLOUR)


def test_without_a_threshold_no_region_is_drawn() -> None:
    np.testing.assert_array_equal(draw_contours(GREY, constant(9.0), None), GREY)


def test_the_callers_pixels_are_never_changed() -> None:
    pixels = GREY.copy()
    draw_overlay(pixels, constant(0.9), 0.5)
    np.testing.assert_array_equal(pixels, GREY)


def test_sixteen_bit_pictures_look_like_their_eight_bit_twins() -> None:
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    sixteen = eight.astype(np.uint16) * 257
    np.testing.assert_array_equal(eight_bit(sixteen), eight)
    for draw in (draw_heat, draw_contours, draw_panel, draw_overlay):
        a, b = (draw(pixels, constant(0.6, 16, 16), 0.5) for pixels in (eight, sixteen))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("height", "width"), [(1000, 500), (300, 1001), (50, 40), (1, 900), (7, 1)])
def test_panel_has_three_panes_of_at_most_320_px(height: int, width: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    mask = np.ones((height, width), bool)
    panel = draw_panel(pixels, constant(0.6, height, width), 0.5, mask, mask)
    scale = min(1.0, PANE_SIDE / max(height, width))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    assert panel.shape == (rows, 3 * columns + 2 * PANE_GAP, 3)
    assert panel.dtype == np.uint8


def test_a_defect_of_one_pixel_is_seen_in_the_panel() -> None:
    pixels = np.full((1024, 1024, 3), 120, np.uint8)
    anomaly_map = constant(0.0, 1024, 1024)
    anomaly_map[501, 703] = 0.9
    panel = draw_panel(pixels, anomaly_map, 0.5)
    heat, contour = panel[:, 324:644], panel[:, 648:]
    assert (np.abs(heat.astype(int) - 120).sum(axis=2) > 100).any()
    assert (contour == CONTOUR_COLOUR).all(axis=2).sum() >= 8


def test_overlay_lines_grow_with_the_picture() -> None:
    widths = []
    for side in (100, 1600):
        anomaly_map = constant(0.0, side, side)
        anomaly_map[side // 2, side // 2] = 0.9
        drawn = draw_overlay(np.zeros((side, side, 3), np.uint8), anomaly_map, 0.5)
        widths.append(int((drawn[side // 2] == CONTOUR_COLOUR).all(axis=1).sum()) // 2)
    assert widths == [2, 5]


def test_what_a_refiner_marks_is_lined_instead_of_what_is_above_the_threshold() -> None:
    anomaly_map, marked = constant(0.0), np.zeros((40, 60), bool)
    anomaly_map[30:36, 40:50] = 0.6
    marked[10:20, 20:30] = True
    drawn = draw_contours(GREY, anomaly_map, 0.5, marked=marked)
    as_mapped = constant(0.0)
    as_mapped[marked] = 0.6
    np.testing.assert_array_equal(drawn, draw_contours(GREY, as_mapped, 0.5))
    np.testing.assert_array_equal(drawn, draw_contours(GREY, anomaly_map, None, marked=marked))
    np.testing.assert_array_equal(drawn[9, 25], CONTOUR_COLOUR)
    np.testing.assert_array_equal(drawn[29, 45], GREY[29, 45])


def test_overlay_and_panel_line_what_a_refiner_marks() -> None:
    anomaly_map, marked = constant(0.0), np.zeros((40, 60), bool)
    anomaly_map[30:36, 40:50] = 0.6
    marked[10:20, 20:30] = True
    overlay = draw_overlay(GREY, anomaly_map, 0.5, marked=marked)
    contours = draw_panel(GREY, anomaly_map, 0.5, marked=marked)[:, 2 * (60 + PANE_GAP) :]
    for drawn in (overlay, contours):
        lined = (drawn == CONTOUR_COLOUR).all(axis=2)
        assert lined[9, 25] and not lined[25:].any()


def test_a_mark_of_one_pixel_is_seen_in_the_panel() -> None:
    marked = np.zeros((1024, 1024), bool)
    marked[501, 703] = True
    panel = draw_panel(np.full((1024, 1024, 3), 120, np.uint8), constant(0.0, 1024, 1024), 0.5, marked=marked)
    assert (panel[:, 648:] == CONTOUR_COLOUR).all(axis=2).sum() >= 8
