"""draw_explanation: what a method shows of its inner view, as one row beside the picture.

Everything is drawn in the frame, as the network saw it, so that the maps lie on the picture pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fettle.inspection import Explained
from fettle.report.overlays import PANE_GAP, heat_ramp, scale_is_fixed

if TYPE_CHECKING:
    from PIL import ImageFont

EXPLAINED_SIDE = 240  # px, the longer side of each pane
LABEL_HEIGHT = 24
ERROR = "error"  # the map that is on the anomaly map's own scale, all others are in 0..1

_LABEL_SIZE = 16
_LABEL_COLOUR = (255, 255, 255)
_GROUND = 72  # grey behind labels and between panes


def label_of(name: str, pixel_threshold: float | None) -> str:
    """What stands above a map."""
    words = name.replace("_", " ")
    if name != ERROR:
        return words
    return f"{words} / {'pixel threshold' if scale_is_fixed(pixel_threshold) else 'its maximum'}"


def explanation_caption(
    maps: Sequence[str], pixel_threshold: float | None, pictures: Sequence[str] = ()
) -> str:
    """What the row and its colours mean, in sentences."""
    names, coloured = (", ".join(name.replace("_", " ") for name in some) for some in (maps, pictures))
    caption = (
        "The row below each strip shows the picture as the network saw it, "
        f"{f'then in full colour: {coloured}; ' if coloured else ''}then: {names}. "
        "Dark is 0, bright is 1 and more."
    )
    if ERROR not in maps:
        return caption
    if scale_is_fixed(pixel_threshold):
        return f"{caption} The error is divided by the pixel threshold {pixel_threshold:.4g}."
    return f"{caption} Without a pixel threshold above 0 the error is divided by its picture's largest."


def draw_explanation(explained: Explained, pixel_threshold: float | None) -> NDArray[np.uint8]:
    """The framed picture, other pictures and its maps side by side, each with its name above; uint8.

    Each pane is 240 px on its longer side. A map is shrunk by the mean of each block: a mask keeps its share
    of the picture. One colour scale for all: darkest at 0, brightest from 1 on. "error" is divided by the
    pixel threshold, without one by its own maximum. The picture is dimmed where it is not valid.
    """
    from PIL import Image, ImageFont

    height, width = explained.view.shape[:2]
    scale = EXPLAINED_SIDE / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    dimmed = np.where(explained.valid[..., None], explained.view, explained.view * 0.45).astype(np.uint8)
    filtered = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    panes = [
        (label, np.asarray(Image.fromarray(pixels).resize((columns, rows), filtered)))
        for label, pixels in (
            ("picture", dimmed),
            *((label_of(name, None), pixels) for name, pixels in explained.pictures.items()),
        )
    ]
    for name, values in explained.maps.items():
        shares = _in_unit_range(values, pixel_threshold if name == ERROR else 1.0)
        small = Image.fromarray(shares).resize((columns, rows), Image.Resampling.BOX)
        index = np.rint(np.asarray(small) * 255).astype(np.uint8)
        panes.append((label_of(name, pixel_threshold), heat_ramp()[index]))
    font = ImageFont.load_default(_LABEL_SIZE)
    return _side_by_side(panes, font)


def _in_unit_range(values: NDArray[np.float32], unit: float | None) -> NDArray[np.float32]:
    """Values / unit, cut to 0..1; without a unit above 0 by the largest value."""
    finite = np.nan_to_num(values.astype(np.float32, copy=False), posinf=1e30)
    divisor = unit if scale_is_fixed(unit) else float(finite.max(initial=0.0)) or 1.0
    shares: NDArray[np.float32] = np.clip(finite / np.float32(divisor), 0, 1)
    return shares


def _side_by_side(
    panes: Sequence[tuple[str, NDArray[np.uint8]]], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> NDArray[np.uint8]:
    """Panes of one size in a row, each under its label; a pane narrower than a label gets more room."""
    from PIL import Image, ImageDraw

    rows, columns = panes[0][1].shape[:2]
    room = max(columns, *(int(font.getlength(label)) + 8 for label, _ in panes))
    size = (len(panes) * (room + PANE_GAP) - PANE_GAP, LABEL_HEIGHT + rows)
    drawn = Image.new("RGB", size, (_GROUND,) * 3)
    pen = ImageDraw.Draw(drawn)
    for number, (label, pane) in enumerate(panes):
        left = number * (room + PANE_GAP)
        pen.text((left + 4, 2), label, _LABEL_COLOUR, font)
        drawn.paste(Image.fromarray(pane), (left, LABEL_HEIGHT))
    return np.asarray(drawn)
