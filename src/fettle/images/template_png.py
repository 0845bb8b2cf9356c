"""A framed picture as a PNG, opaque where it is valid: what a model stores of its template."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fettle.errors import ModelFolderError

_MAX_SIDE = 8192  # px


def to_png(pixels: NDArray[np.float32], valid: NDArray[np.bool_]) -> bytes:
    """A PNG of pixels (3, H, W) in 0..1, opaque where valid (H, W)."""
    colours = np.rint(pixels.clip(0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)
    opaque = np.where(valid, 255, 0).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.dstack([colours, opaque])).save(file, "PNG")
    return file.getvalue()


def from_png(data: bytes) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels (3, H, W) in 0..1, and valid (H, W).

    Raises:
        ModelFolderError: it is no such PNG.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if max(picture.size) > _MAX_SIDE or picture.mode != "RGBA":
                raise ValueError(f"it is {picture.size[0]} x {picture.size[1]} px, {picture.mode}")
            values = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ModelFolderError(
            f"The model's template is damaged: {error}.", "Fit it again, or restore a copy."
        ) from error
    return (values[..., :3].transpose(2, 0, 1) / 255).astype(np.float32), values[..., 3] > 0
