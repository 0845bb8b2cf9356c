"""One picture of a part, with its defect and the defect's exact mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fettle.datasets.parts.canvas import Canvas, Draw, Field, coverage
from fettle.datasets.parts.defects import SURFACE_DEFECTS
from fettle.datasets.parts.metal import BRUSHED_PLATE, HEX_NUT, SPUR_GEAR
from fettle.datasets.parts.packed import BOTTLE_CAP, PILL_BLISTER
from fettle.datasets.parts.scene import Product, Scene
from fettle.datasets.parts.surface import Rig, expose, shade
from fettle.datasets.parts.woven import WOODEN_BOARD, WOVEN_FABRIC
from fettle.errors import UsageError, nearest_name

_CATALOGUE: dict[str, Product] = {
    "bottle_cap": BOTTLE_CAP,
    "brushed_plate": BRUSHED_PLATE,
    "hex_nut": HEX_NUT,
    "pill_blister": PILL_BLISTER,
    "spur_gear": SPUR_GEAR,
    "wooden_board": WOODEN_BOARD,
    "woven_fabric": WOVEN_FABRIC,
}

PRODUCTS: tuple[str, ...] = tuple(_CATALOGUE)
"""Every product, sorted by name."""

SMALLEST, LARGEST = 64, 2048
"""Bounds of a picture's side, px."""


@dataclass(frozen=True)
class Rendered:
    """A picture and where its defect is.

    Attributes:
        pixels: uint8 (H, W, 3), sRGB.
        mask: uint8 (H, W), share of each pixel that the defect covers, 0..255; all 0 for a good part.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def _product(name: str) -> Product:
    if name not in _CATALOGUE:
        raise UsageError(f"There is no product '{name}'.", nearest_name(name, PRODUCTS))
    return _CATALOGUE[name]


def defects_of(product: str) -> tuple[str, ...]:
    """Names of the defects that the product can have, structural ones first.

    Raises:
        UsageError: there is no such product.
    """
    entry = _product(product)
    return entry.faults + entry.surface_defects


def check_size(size: int) -> None:
    """Refuse a side out of 64..2048 px.

    Raises:
        UsageError: the side is out of bounds.
    """
    if not SMALLEST <= size <= LARGEST:
        raise UsageError(
            f"The picture size {size} px is out of {SMALLEST}..{LARGEST}.", "Give a size within these bounds."
        )


def render(
    product: str, *, seed: int, index: int, defect: str | None = None, size: int = 256, stream: str = "test"
) -> Rendered:
    """Draw one picture. It depends on the arguments only, so any one can be drawn again alone.

    The same arguments with and without `defect` give the same part, light and noise: the two pictures differ
    only where the mask is not 0.

    Args:
        product: one of PRODUCTS.
        seed: seed of the set.
        index: number of the picture in its stream.
        defect: one of `defects_of(product)`, or None for a good part.
        size: side of the picture, px.
        stream: name of the series that the picture belongs to, such as "train/good".

    Raises:
        UsageError: an unknown product or defect, or a size out of 64..2048.
    """
    entry = _product(product)
    check_size(size)
    if defect is not None and defect not in defects_of(product):
        raise UsageError(
            f"The product '{product}' has no defect '{defect}'.", nearest_name(defect, defects_of(product))
        )
    canvas = Canvas(size)
    draw = Draw(f"fettle parts 1/{seed}/{product}/{stream}/{index}")
    rig = Rig.jittered(draw)
    scene = entry.build(canvas, draw, None)
    light = shade(scene.surface, rig, canvas)
    mask = np.zeros((size, size), np.uint8)
    if defect is not None:
        faulty_light, cover = _faulty(entry, scene, canvas, draw, defect, rig)
        mask = np.round(cover * 255).astype(np.uint8)
        # Mixed by the mask as it is written, so that where it says 0 the light is the good part's to the bit.
        light = light + (faulty_light - light) * (mask * np.float32(1 / 255))
    return Rendered(expose(light, rig, canvas, draw), mask)


def _faulty(
    entry: Product, sound: Scene, canvas: Canvas, draw: Draw, defect: str, rig: Rig
) -> tuple[Field, Field]:
    """Light (3, H, W) of the part with the defect, and the defect's coverage (H, W)."""
    if defect in entry.faults:
        scene = entry.build(canvas, draw, defect)
        assert scene.changed is not None  # every builder says what it changed
        return shade(scene.surface, rig, canvas), scene.changed
    surface, cover = SURFACE_DEFECTS[defect](sound, canvas, draw(defect), entry.look)
    if defect != "fibre":  # a fibre may lie across an edge; the others are in the part
        cover = cover * coverage(sound.body, canvas.px)
    return shade(surface, rig, canvas), cover
