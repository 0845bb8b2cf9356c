"""What a decoded mask says: which pixels are defect."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fettle.errors import MetricError

MaskKind: TypeAlias = Literal["binary", "antialiased", "index"]

_REMEDY = "Give a mask of bool, uint8, uint16, float in 0..1, or integers 0 and 1."


def binarise_mask(array: NDArray[np.generic]) -> tuple[NDArray[np.bool_], MaskKind]:
    """The defect pixels of a decoded mask (H, W), and how the mask was read.

    - "binary": at most one value besides 0.
    - "antialiased": several values; defect above one half of full scale (uint8 >= 128,
      uint16 >= 32768, float > 0.5).
    - "index": integers whose maximum lies below half of full scale are class numbers, as in VisA;
      anything but 0 is defect.

    Raises:
        MetricError: not two-dimensional, an unknown type, or values outside the type's range.
    """
    if array.ndim != 2:
        raise MetricError(f"The mask has shape {array.shape}, not (H, W).", "Give one channel of it.")
    if array.dtype == np.bool_:
        return array.astype(np.bool_), "binary"
    if array.dtype in (np.uint8, np.uint16):
        half = 1 << (8 * array.dtype.itemsize - 1)
        levels = array.astype(np.uint16)
        if 0 < levels.max(initial=0) < half:
            return levels != 0, "index"
        return _cut(array, levels >= half)
    if np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float64)
        if not ((values >= 0) & (values <= 1)).all():
            raise MetricError("The float mask has values outside 0..1, or NaN.", _REMEDY)
        return _cut(array, values > 0.5)
    if np.issubdtype(array.dtype, np.integer) and np.isin(array, (0, 1)).all():
        return array != 0, "binary"
    raise MetricError(f"The mask has type {array.dtype}, whose full scale is not known.", _REMEDY)


def _cut(array: NDArray[np.generic], defect: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], MaskKind]:
    """`defect`, and whether the mask has one value or several besides 0."""
    inked = array[array != 0]
    several = inked.size > 0 and bool((inked != inked[0]).any())
    return defect, "antialiased" if several else "binary"
