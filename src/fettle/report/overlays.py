"""Heat colours, contours, panels: how an anomaly map is shown over its picture.

The colour scale is fixed by the calibration's pixel threshold, never by the picture at hand or by its
neighbours: the same colour means the same map value on every picture of a model.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
_Value = TypeVar("_Value", np.float32, np.bool_)

CONTOUR_COLOUR = (0, 221, 255)  # cyan: no hue of the heat ramp comes near it
MASK_COLOUR = (255, 77, 210)  # pink: told from cyan by every common kind of colour vision
PANE_SIDE = 320
PANE_GAP = 4

_HEAT_BEGINS = 0.7  # of the pixel threshold: below lies what good pictures are full of
_HEAT_STRENGTH_BELOW = 0.3  # opacity just below the threshold
_HEAT_STRENGTH_AT = 0.65  # opacity at the threshold: the step is the onset that the eye should catch
_HEAT_STRENGTH_TOP = 0.85


@lru_cache(maxsize=1)
def heat_ramp() -> NDArray[np.uint8]:
    """(256, 3): near black, violet, red, orange, pale yellow; lightness rises in even steps.

    Laid out in OKLab (Ottosson, "A perceptual color space for image processing", 2020): lightness is
    linear, the hue turns from violet over red to yellow, the chroma swells in the middle.
    """
    position = np.linspace(0, 1, 256)
    lightness = 0.10 + 0.86 * position
    hue = np.deg2rad(np.interp(position, (0, 0.5, 1), (-75, 15, 105)))
    chroma = 0.20 * np.sin(np.pi * np.clip(0.08 + 0.84 * position, 0, 1)) ** 0.8
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        axis=1,
    ).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    ramp: NDArray[np.uint8] = np.rint(encoded * 255).astype(np.uint8)
    ramp.setflags(write=False)
    return ramp


def scale_is_fixed(pixel_threshold: float | None) -> TypeGuard[float]:
    """Whether the calibration's threshold can carry the colour scale (it must be above 0)."""
    return pixel_threshold is not None and pixel_threshold > 0


def heat_caption(pixel_threshold: float | None) -> str:
    """One sentence that says what the colours mean."""
    if scale_is_fixed(pixel_threshold):
        return (
            f"Colours have one fixed scale for all pictures: the heat sets in at the pixel threshold "
            f"{pixel_threshold:.4g} and is hottest from twice that value on."
        )
    return (
        "This model has no pixel threshold above 0, so the colours of each picture are scaled by its own "
        "largest value: they can't be compared between pictures."
    )


def _relative(anomaly_map: NDArray[np.float32], pixel_threshold: float | None) -> NDArray[np.float32]:
    """The map in units of the pixel threshold; without one, 2 is the map's own maximum."""
    finite = np.nan_to_num(anomaly_map.astype(np.float32, copy=False), posinf=1e30)
    unit = pixel_threshold if scale_is_fixed(pixel_threshold) else float(finite.max(initial=0.0)) / 2 or 1.0
    relative: NDArray[np.float32] = np.clip(finite / np.float32(unit), 0, 2)
    return relative


def heat_colours(anomaly_map: NDArray[np.float32], pixel_threshold: float | None) -> NDArray[np.uint8]:
    """Colours (H, W, 3) of a map (H, W).

    Darkest at 0, the ramp's middle at the pixel threshold, hottest from twice the threshold on. Without a
    threshold above 0 the map's own maximum is the hottest; `heat_caption` says so.
    """
    index = np.rint(_relative(anomaly_map, pixel_threshold) * 127.5).astype(np.uint8)
    colours: NDArray[np.uint8] = heat_ramp()[index]
    return colours


def eight_bit(pixels: Pixels) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) as uint8; uint16 is scaled by 255 / 65535."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def draw_heat(
    pixels: Pixels,
    anomaly_map: NDArray[np.float32],
    pixel_threshold: float | None,
    valid: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """The heat map laid over its picture, uint8 (H, W, 3); what lies outside `valid` is dimmed.

    The heat is transparent up to 0.7 of the pixel threshold, faint below it and steps up where it is passed.
    """
    relative = _relative(anomaly_map, pixel_threshold)
    strength = np.where(
        relative < 1,
        _HEAT_STRENGTH_BELOW * np.maximum(relative - _HEAT_BEGINS, 0) / (1 - _HEAT_BEGINS),
        _HEAT_STRENGTH_AT + (_HEAT_STRENGTH_TOP - _HEAT_STRENGTH_AT) * (relative - 1),
    )[..., None]
    base = eight_bit(pixels).astype(np.float32)
    if valid is not None:
        base = np.where(valid[..., None], base, base * 0.45)
    heat = heat_colours(anomaly_map, pixel_threshold)
    return np.rint(base + (heat - base) * strength).astype(np.uint8)


def draw_contours(
    pixels: Pixels,
    anomaly_map: NDArray[np.float32],
    pixel_threshold: float | None,
    mask: NDArray[np.bool_] | None = None,
    line: int = 2,
    marked: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """The picture with a line just outside every marked region, uint8 (H, W, 3).

    Args:
        pixels: (H, W, 3).
        anomaly_map: (H, W).
        pixel_threshold: regions are where the map is larger; None draws no region.
        mask: the labelled defect (H, W), outlined in another colour.
        line: width of the line, px.
        marked: the regions (H, W), where something else than the threshold says so.
    """
    drawn = eight_bit(pixels).copy()
    if mask is not None:
        _outline(drawn, mask, MASK_COLOUR, line)
    if marked is not None:
        _outline(drawn, marked, CONTOUR_COLOUR, line)
    elif pixel_threshold is not None:
        _outline(drawn, anomaly_map > pixel_threshold, CONTOUR_COLOUR, line)
    return drawn


def _outline(
    drawn: NDArray[np.uint8], region: NDArray[np.bool_], colour: tuple[int, int, int], line: int
) -> None:
    """Draw around `region` in place, with a thin dark rim so that the line reads on bright ground too."""
    if not region.any():
        return
    from scipy.ndimage import maximum_filter

    rim_width = max(1, line // 2)
    ring = maximum_filter(region, size=2 * line + 1) & ~region
    # A region that runs out of the picture has no outside there: its line lies on the picture's edge.
    edge = np.zeros_like(region)
    edge[:line], edge[-line:], edge[:, :line], edge[:, -line:] = True, True, True, True
    ring |= edge & region
    rim = maximum_filter(ring, size=2 * rim_width + 1) & ~ring & ~region
    drawn[rim] //= 2
    drawn[ring] = colour


def draw_overlay(
    pixels: Pixels,
    anomaly_map: NDArray[np.float32],
    pixel_threshold: float | None,
    valid: NDArray[np.bool_] | None = None,
    mask: NDArray[np.bool_] | None = None,
    marked: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Heat and contours on one picture at its own size, uint8 (H, W, 3)."""
    heated = draw_heat(pixels, anomaly_map, pixel_threshold, valid)
    line = max(2, round(max(anomaly_map.shape) / PANE_SIDE))
    return draw_contours(heated, anomaly_map, pixel_threshold, mask, line, marked)


def draw_panel(
    pixels: Pixels,
    anomaly_map: NDArray[np.float32],
    pixel_threshold: float | None,
    valid: NDArray[np.bool_] | None = None,
    mask: NDArray[np.bool_] | None = None,
    marked: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Picture, heat map and contours side by side, each at most 320 px on its longer side; uint8.

    The map and the mask are shrunk by the largest value of each block, so that a defect of a few
    pixels is still to be seen.
    """
    from PIL import Image

    height, width = anomaly_map.shape
    scale = min(1.0, PANE_SIDE / max(height, width))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    small = np.asarray(
        Image.fromarray(eight_bit(pixels)).resize((columns, rows), Image.Resampling.LANCZOS, reducing_gap=3.0)
    )
    small_map = _shrink_by_max(anomaly_map, rows, columns)
    small_valid = None if valid is None or valid.all() else _shrink_by_max(valid, rows, columns)
    small_mask, small_marked = (
        None if one is None else _shrink_by_max(one, rows, columns) for one in (mask, marked)
    )
    gap = np.full((rows, PANE_GAP, 3), 128, np.uint8)
    return np.concatenate(
        [
            small,
            gap,
            draw_heat(small, small_map, pixel_threshold, small_valid),
            gap,
            draw_contours(small, small_map, pixel_threshold, small_mask, marked=small_marked),
        ],
        axis=1,
    )


def _shrink_by_max(values: NDArray[_Value], rows: int, columns: int) -> NDArray[_Value]:
    """(H, W) to (rows, columns) with rows <= H, columns <= W: the largest value of each block."""
    if values.shape == (rows, columns):
        return values
    row_starts = np.arange(rows) * values.shape[0] // rows
    column_starts = np.arange(columns) * values.shape[1] // columns
    tall: NDArray[_Value] = np.maximum.reduceat(values, row_starts, axis=0)
    shrunk: NDArray[_Value] = np.maximum.reduceat(tall, column_starts, axis=1)
    return shrunk
