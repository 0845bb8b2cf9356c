"""The contact sheet: every product and defect at a glance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fettle.datasets.parts.render import PRODUCTS, defects_of, render

_BAR, _GAP = 16, 3
_PAPER, _OUTLINE = 245, (255, 40, 160)


def outlined(pixels: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture (H, W, 3) with a line two px outside the mask (H, W), so that the defect stays in sight."""
    inside = ndimage.binary_dilation(mask > 127, iterations=2)
    line = ndimage.binary_dilation(inside) & ~inside
    out = pixels.copy()
    out[line] = _OUTLINE
    return out


def contact_sheet(
    products: Sequence[str] = PRODUCTS, *, size: int = 192, seed: int = 0, index: int = 0
) -> NDArray[np.uint8]:
    """One line a product: a good part and one of each defect; below each, the mask's outline on it.

    Args:
        products: names out of PRODUCTS.
        size: side of each picture, px.
        seed, index: which pictures, as for `render`.

    Returns:
        uint8 (H, W, 3).
    """
    from PIL import Image, ImageDraw

    columns = 1 + max(len(defects_of(product)) for product in products)
    pitch, line = size + _GAP, _BAR + 2 * (size + _GAP)
    sheet = Image.new("RGB", (columns * pitch + _GAP, len(products) * line + _GAP), (_PAPER,) * 3)
    pen = ImageDraw.Draw(sheet)
    for row, product in enumerate(products):
        top = row * line + _GAP
        for column, defect in enumerate((None, *defects_of(product))):
            stream = f"sheet/{defect or 'good'}"
            shown = render(product, seed=seed, index=index, defect=defect, size=size, stream=stream)
            left = column * pitch + _GAP
            label = f"{product}: {defect}" if defect else f"{product}: good"
            pen.text((left + 2, top + 1), label, fill=(30, 30, 30))
            sheet.paste(Image.fromarray(shown.pixels), (left, top + _BAR))
            marked = outlined(shown.pixels, shown.mask)
            sheet.paste(Image.fromarray(marked), (left, top + _BAR + size + _GAP))
    return np.asarray(sheet, np.uint8)
