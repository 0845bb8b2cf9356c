"""Picture and mask files to arrays: few formats, bounds before decoding, right values or a refusal.

Pillow decodes. What Pillow would pass on silently wrong (16-bit white-is-zero, 12-bit, signed 8-bit, key
colours of other depths) is put right here, or refused with a remedy.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from fettle.errors import PictureError
from fettle.images.header import (
    PICTURE_SUFFIXES,
    OpenedPicture,
    PictureHeader,
    damaged,
    file_bytes,
    file_sha256,
    open_picture,
    picture_header,
    picture_size,
)
from fettle.images.picture import Picture

__all__ = [
    "MAX_PIXELS",
    "MIN_SIDE",
    "PICTURE_SUFFIXES",
    "PictureHeader",
    "binarise_mask",
    "check_mask_size",
    "file_sha256",
    "picture_header",
    "picture_size",
    "read_mask",
    "read_picture",
]

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]
_AnyArray = TypeVar("_AnyArray", bound=NDArray[np.generic])

MAX_PIXELS = 100_000_000
MIN_SIDE = 8  # px; no part can be judged on less, and no backbone takes it

_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339  # TIFF tags
_SIGNED = 2  # a TIFF sample format


def read_picture(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = (0, 0, 0)
) -> Picture:
    """Decode one picture to RGB.

    8-bit sources give uint8, 16-bit grey gives uint16 with its own values. EXIF orientation is
    applied. Transparency is composited on `background` (RGB, 0..255). Everything that is not plain
    is told in `Picture.notes`.

    Args:
        path: a PNG, JPEG, BMP, TIFF or WebP file, told by its first bytes, not by its name.
        max_pixels: bound on height times width, checked on the header before anything is decoded.

    Raises:
        PictureError: missing, empty, truncated, too large, too small, several pages, or values
            whose range can't be known.
    """
    path = Path(path)
    data = file_bytes(path)
    opened = open_picture(path, io.BytesIO(data), data[:16], max_pixels)
    if min(opened.image.size) < MIN_SIDE:
        width, height = opened.image.size
        raise PictureError(
            f"'{path}' is {width} px wide and {height} px high, and Fettle needs {MIN_SIDE} px a side.",
            "Leave it out, or use the uncut picture.",
        )
    _decode(path, opened)
    pixels, notes = _rgb(path, opened, background)
    turned = _turn(pixels, opened.orientation)
    return Picture(turned, path, hashlib.sha256(data).hexdigest(), (*opened.notes, *notes))


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> tuple[NDArray[np.bool_], str]:
    """Decode one defect mask: (H, W) bool, True on the defect, and its kind (see `binarise_mask`).

    Args:
        path: the mask's file, grey, or coloured with a palette of class numbers.
        size: (height, width) that the mask must have: its picture's. Not checked when None.

    Raises:
        PictureError: unreadable, coloured, transparent, or not of the size asked for.
    """
    path = Path(path)
    data = file_bytes(path)
    opened = open_picture(path, io.BytesIO(data), data[:16], MAX_PIXELS)
    _decode(path, opened)
    values = _turn(_mask_values(path, opened), opened.orientation)
    if size is not None:
        check_mask_size(path, (values.shape[0], values.shape[1]), size)
    try:
        return binarise_mask(values)
    except ValueError as error:
        raise PictureError(f"The mask '{path}' {error}.", "Save it as 8-bit grey, 0 and 255.") from None


def binarise_mask(values: NDArray[np.generic]) -> tuple[NDArray[np.bool_], str]:
    """Decide which pixels of a mask are defect.

    A pixel is defect above half of full scale (8-bit: >= 128, 16-bit: >= 32768, float: > 0.5).
    An integer mask whose largest value is nonzero and below half of full scale holds class
    numbers: there every nonzero pixel is defect.

    Args:
        values: (H, W), bool, unsigned or signed integers, or floats in 0..1.

    Returns:
        The mask (H, W), and its kind: "empty" (all zero), "binary" (0 and full scale only),
        "antialiased" (other values too) or "index" (class numbers).

    Raises:
        ValueError: not two-dimensional, negative, not finite, or floats above 1. The message is
            the rest of a sentence that begins with the mask's name.
    """
    if values.ndim != 2:
        raise ValueError(f"has {values.ndim} dimensions where height and width are expected")
    if values.dtype == np.bool_:
        mask = values.astype(np.bool_)
        return mask, "binary" if mask.any() else "empty"
    if values.size == 0:
        return np.zeros(values.shape, np.bool_), "empty"
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    low, high = values.min(), values.max()
    if low < 0:
        raise ValueError(f"holds negative values (down to {low})")
    if high == 0:
        return np.zeros(values.shape, np.bool_), "empty"
    levels = cast("NDArray[np.float64]", values)  # for the type checker: any numbers
    if np.issubdtype(values.dtype, np.floating):
        if high > 1:
            raise ValueError(f"holds float values up to {high:g}, where 0 to 1 is expected")
        kind = "binary" if np.isin(values, (0, 1)).all() else "antialiased"
        return np.asarray(levels > 0.5), kind
    full = int(np.iinfo(values.dtype).max)  # type: ignore[type-var]  # not bool, not float: an integer
    if int(high) <= full // 2:
        return np.asarray(values != 0), "index"
    kind = "binary" if np.isin(values, (0, full)).all() else "antialiased"
    return np.asarray(levels > full // 2), kind


def check_mask_size(mask_path: Path, mask_size: tuple[int, int], picture_size: tuple[int, int]) -> None:
    """Refuse a mask that hasn't its picture's (height, width); the message names both sizes."""
    if mask_size != picture_size:
        raise PictureError(
            f"The mask '{mask_path}' is {mask_size[1]} px wide and {mask_size[0]} px high, "
            f"its picture {picture_size[1]} px wide and {picture_size[0]} px high.",
            "Draw the mask on the picture as it is; Fettle never resizes a mask.",
        )


def _decode(path: Path, opened: OpenedPicture) -> None:
    """Run the decoder; refuse what it would give wrong values for."""
    image, name = opened.image, opened.format
    if name == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]  # TIFF only
        sample = tags.get(_SAMPLE_FORMAT, 1)
        sample = sample[0] if isinstance(sample, tuple) else sample
        if sample == _SIGNED and opened.bits <= 8:
            raise PictureError(f"'{path}' holds signed 8-bit values.", "Save it as unsigned 8- or 16-bit.")
    if opened.image.info.get("transparency") is not None and image.mode != "P" and opened.bits != 8:
        raise PictureError(
            f"'{path}' marks transparency by a key colour at {opened.bits} bits.",
            "Save it without transparency.",
        )
    try:
        image.load()
    except Exception as error:  # a parser on unknown bytes
        raise damaged(path, name, error) from error


def _grey(path: Path, opened: OpenedPicture) -> tuple[Pixels, tuple[str, ...]] | None:
    """(H, W) of a picture of one channel with its own values and what to note; None for other modes."""
    image = opened.image
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8) * np.uint8(255), ()
    if image.mode == "L":
        return np.asarray(image), ()
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        notes: tuple[str, ...] = ()
        if opened.bits == 12:
            values = values * np.uint16(16) + values // np.uint16(256)  # 0..4095 to 0..65535, both ends exact
            notes = ("12 bits a pixel, scaled to 16",)
        tags = image.tag_v2 if opened.format == "TIFF" else {}  # type: ignore[attr-defined]  # TIFF only
        if tags.get(_PHOTOMETRIC) == 0:
            values = np.uint16(65535) - values  # white is zero; Pillow inverts 8-bit only
            notes += ("white is zero in the file, inverted",)
        return values, notes
    if image.mode == "I":
        wide = np.asarray(image)
        low, high = int(wide.min()), int(wide.max())
        if low < 0 or high > 65535:
            raise PictureError(
                f"'{path}' holds integers from {low} to {high}, and its white can't be known.",
                "Save it as 8- or 16-bit.",
            )
        note = f"{opened.bits}-bit integers, taken as 16-bit (largest value {high})"
        return wide.astype(np.uint16), (note,)
    return None


def _refuse_float(path: Path, image: ImageFile.ImageFile) -> None:
    if image.mode == "F":
        bad = int(np.count_nonzero(~np.isfinite(np.asarray(image))))
        what = f"{bad} values that are not finite" if bad else "float values, whose white can't be known"
        raise PictureError(f"'{path}' holds {what}.", "Save it as 8- or 16-bit.")


def _rgb(
    path: Path, opened: OpenedPicture, background: tuple[int, int, int]
) -> tuple[Pixels, tuple[str, ...]]:
    """The decoded picture as (H, W, 3), and what to note."""
    image = opened.image
    _refuse_float(path, image)
    clear = image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or image.info.get("transparency") is not None
    grey = None if clear else _grey(path, opened)
    if grey is not None:
        return cast(Pixels, np.dstack([grey[0]] * 3)), grey[1]
    notes: tuple[str, ...] = ()
    if opened.bits == 16:
        notes = ("16-bit colour, read as 8-bit",)
    if clear:
        pixels, note = _composite(path, image, background)
        return pixels, notes + note
    if image.mode == "CMYK":
        notes += ("CMYK, turned to RGB without its colour profile",)
    elif image.mode not in ("RGB", "P", "YCbCr"):
        raise PictureError(f"'{path}' has the pixel layout {image.mode}.", "Save it as grey or RGB.")
    return np.array(image if image.mode == "RGB" else image.convert("RGB")), notes  # a copy: writable


def _composite(
    path: Path, image: ImageFile.ImageFile, background: tuple[int, int, int]
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Lay a transparent picture on a background colour; note it where anything shows through."""
    middle = image.convert("LA") if image.mode == "La" else image
    layered = middle.convert("RGBA")
    alpha = np.asarray(layered.getchannel("A"))
    lowest, highest = alpha.min(), alpha.max()
    if highest == 0:
        raise PictureError(f"'{path}' is transparent everywhere.", "Save it without its alpha channel.")
    if lowest == 255:
        return np.array(layered.convert("RGB")), ()
    ground = Image.new("RGBA", layered.size, (*background, 255))
    red, green, blue = background
    note = f"transparency laid on background ({red}, {green}, {blue})"
    return np.array(Image.alpha_composite(ground, layered).convert("RGB")), (note,)


def _mask_values(path: Path, opened: OpenedPicture) -> NDArray[np.generic]:
    """(H, W) values of a decoded mask: grey levels, floats, or a palette's class numbers."""
    image = opened.image
    if image.mode == "F":
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image)
    grey = _grey(path, opened)
    if grey is not None:
        return grey[0]
    if image.mode == "P":
        shown = np.asarray(image.convert("RGB"))
        return shown[:, :, 0] if _colourless(shown) else np.asarray(image)
    if image.mode in ("LA", "RGBA") and np.asarray(image)[:, :, -1].min() < 255:
        raise PictureError(f"The mask '{path}' is transparent in part.", "Save it as 8-bit grey, 0 and 255.")
    if image.mode in ("RGB", "LA", "RGBA"):
        shown = np.asarray(image.convert("RGB"))
        if _colourless(shown):
            return shown[:, :, 0]
    raise PictureError(
        f"The mask '{path}' is coloured ({image.mode}), so which colour means defect is not known.",
        "Save it as 8-bit grey, 0 and 255.",
    )


def _colourless(shown: NDArray[np.uint8]) -> bool:
    """Whether (H, W, 3) is grey, but for the few levels that JPEG may add."""
    spread = shown.max(axis=2) - shown.min(axis=2)
    return bool(spread.max() <= 8)


def _turn(pixels: _AnyArray, orientation: int) -> _AnyArray:
    """Apply an EXIF orientation, 1 to 8, to (H, W) or (H, W, C)."""
    turned: NDArray[np.generic] = pixels
    if orientation in (5, 6, 7, 8):
        turned = np.swapaxes(turned, 0, 1)
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return cast(_AnyArray, np.ascontiguousarray(turned))
