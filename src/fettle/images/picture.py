"""Picture: decoded pixels, with the path and how they were read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Picture:
    """Decoded pixels of one picture.

    Attributes:
        pixels: uint8 or uint16, (H, W, 3), RGB.
        path: where it came from.
        sha256: hash of the file's bytes, hexadecimal.
        notes: how it was read where that is not plain ("EXIF orientation 6", "alpha on black", ...).
    """

    pixels: NDArray[np.uint8] | NDArray[np.uint16]
    path: Path
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self.pixels.shape[0], self.pixels.shape[1]
