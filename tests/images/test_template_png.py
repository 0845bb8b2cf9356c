"""A template as a PNG: the way there and back, and files that were damaged or made to harm."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fettle.errors import ModelFolderError
from fettle.images.template_png import from_png, to_png


def shown(height: int = 20, width: int = 24) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels of 8 bits, and where they are valid."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, height, width)) / 255
    return pixels.astype(np.float32), rng.random((height, width)) < 0.5


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claiming(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG whose header tells of any size, with a hundred bytes of picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def picture(mode: str, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (16, 16)).save(file, kind)
    return file.getvalue()


def test_there_and_back_is_exact() -> None:
    pixels, valid = shown()
    found, inside = from_png(to_png(pixels, valid))
    assert found.dtype == np.float32 and inside.dtype == np.bool_
    np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(inside, valid)


def test_values_between_are_rounded_and_those_outside_cut() -> None:
    pixels = np.array([-0.2, 0.5001 / 255, 0.4999 / 255, 1.7], np.float32).reshape(1, 2, 2).repeat(3, axis=0)
    found, _ = from_png(to_png(pixels, np.ones((2, 2), bool)))
    assert (255 * found[0]).flatten().tolist() == [0, 1, 0, 255]


def test_what_is_not_valid_keeps_its_colour() -> None:
    pixels, _ = shown()
    found, inside = from_png(to_png(pixels, np.zeros((20, 24), bool)))
    assert not inside.any()
    np.testing.assert_array_equal(found, pixels)


def test_a_cut_file_is_refused_unless_no_pixel_is_lost() -> None:
    pixels, valid = shown()
    file = to_png(pixels, valid)
    refused = 0
    for end in range(len(file)):
        try:
            found, inside = from_png(file[:end])
        except ModelFolderError:
            refused += 1
            continue
        np.testing.assert_array_equal(found, pixels)
        np.testing.assert_array_equal(inside, valid)
    assert refused > len(file) - 40  # checksums and the last chunk are what may lack


def test_bytes_changed_anywhere_are_read_or_refused() -> None:
    file, rng = to_png(*shown()), random.Random(0)
    for _ in range(500):
        changed = bytearray(file)
        for _ in range(3):
            changed[rng.randrange(len(file))] = rng.randrange(256)
        try:
            pixels, _ = from_png(bytes(changed))
        except ModelFolderError:
            continue
        assert bool(np.isfinite(pixels).all())


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [8193, 12_000, 20_000, 2**31 - 1])
def test_a_size_that_is_no_framed_picture_is_refused_unread(side: int) -> None:
    with pytest.raises(ModelFolderError, match="template is damaged"):
        from_png(claiming(side, side))


def test_a_text_that_unpacks_to_too_much_is_refused_or_left() -> None:
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20)))
    with pytest.raises(ModelFolderError, match="template is damaged"):
        from_png(claiming(16, 16, bomb))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "I;16"])
def test_a_picture_without_its_mask_is_refused(mode: str) -> None:
    with pytest.raises(ModelFolderError, match=r"16 x 16 px, "):
        from_png(picture(mode))


@pytest.mark.parametrize(
    "data", [b"", b"no picture", picture("RGB", "JPEG"), picture("RGBA", "TIFF")], ids=len
)
def test_what_is_no_png_is_refused_with_a_remedy(data: bytes) -> None:
    with pytest.raises(ModelFolderError, match=r"Fit it again, or restore a copy\.$"):
        from_png(data)
