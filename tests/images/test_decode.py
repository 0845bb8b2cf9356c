"""Decoding gives the file's own values, or a refusal: formats, depths, transparency, orientation, masks."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fettle.errors import PictureError
from fettle.images.decode import (
    binarise_mask,
    check_mask_size,
    picture_header,
    picture_size,
    read_mask,
    read_picture,
)

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (12, 17), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (12, 17)).astype(np.uint16)
RGB8 = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(array: np.ndarray, depth: int, colour: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG written by hand: for the depths that Pillow does not write."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in array.astype(">u2" if depth == 16 else "u1"))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


def tiff(array: np.ndarray, bits: int, photometric: int, sample_format: int = 1) -> bytes:
    """A one-strip little-endian TIFF written by hand."""
    data = array.tobytes()
    height, width = array.shape[0], array.shape[1]
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    start = 8 + len(data)
    head = b"II*\0" + struct.pack("<I", start)
    return head + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.TIFF"])
def test_lossless_formats_give_the_pixels_that_were_saved(tmp_path: Path, name: str) -> None:
    picture = read_picture(saved(tmp_path / name, RGB8))
    assert picture.pixels.dtype == np.uint8 and picture.notes == ()
    np.testing.assert_array_equal(picture.pixels, RGB8)


def test_lossless_webp_gives_the_pixels_that_were_saved(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_picture(saved(tmp_path / "a.webp", RGB8, lossless=True)).pixels, RGB8)


def test_jpeg_gives_what_pillow_gives(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", RGB8, quality=95)
    np.testing.assert_array_equal(read_picture(path).pixels, np.asarray(Image.open(path)))


def test_grey_is_repeated_over_three_writable_channels(tmp_path: Path) -> None:
    pixels = read_picture(saved(tmp_path / "a.png", GREY8)).pixels
    np.testing.assert_array_equal(pixels, np.dstack([GREY8] * 3))
    assert pixels.flags.writeable and pixels.flags.c_contiguous


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = GREY8 > 100
    pixels = read_picture(saved(tmp_path / "a.png", bits)).pixels
    np.testing.assert_array_equal(pixels[:, :, 0], np.where(bits, 255, 0))


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("a.png", "<u2", {}),
        ("a.tif", "<u2", {}),
        ("a.tif", ">u2", {}),
        ("a.tif", "<u2", {"compression": "tiff_lzw"}),
        ("a.tif", ">u2", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_sixteen_bit_grey_keeps_its_values(
    tmp_path: Path, name: str, dtype: str, options: dict[str, str]
) -> None:
    picture = read_picture(saved(tmp_path / name, GREY16.astype(dtype), **options))
    assert picture.pixels.dtype == np.uint16
    np.testing.assert_array_equal(picture.pixels[:, :, 1], GREY16)


def test_sixteen_bit_white_is_zero_is_inverted(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(GREY16, 16, photometric=0))
    picture = read_picture(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.pixels[:, :, 0], 65535 - GREY16)
    assert picture.notes == ("white is zero in the file, inverted",)


def test_twelve_bit_is_scaled_to_the_full_range(tmp_path: Path) -> None:
    row = bytes([0xFF, 0xF0, 0x00] * 4)  # 4095, 0, 4095, 0, ...
    array = np.frombuffer(row * 8, np.uint8).reshape(8, 12)
    data = tiff(array, 12, photometric=1).replace(
        struct.pack("<HHII", 256, 3, 1, 12), struct.pack("<HHII", 256, 3, 1, 8)
    )
    (tmp_path / "a.tif").write_bytes(data)
    picture = read_picture(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.pixels[0, :, 0], [65535, 0] * 4)
    assert picture.notes == ("12 bits a pixel, scaled to 16",)


def test_integer_tiff_within_sixteen_bits_keeps_its_values(tmp_path: Path) -> None:
    picture = read_picture(saved(tmp_path / "a.tif", GREY16.astype(np.int32)))
    assert picture.pixels.dtype == np.uint16
    np.testing.assert_array_equal(picture.pixels[:, :, 0], GREY16)
    assert picture.notes == (f"32-bit integers, taken as 16-bit (largest value {GREY16.max()})",)


def test_sixteen_bit_colour_is_noted(tmp_path: Path) -> None:
    wide = RNG.integers(0, 65536, (12, 17, 3))
    (tmp_path / "a.png").write_bytes(png(wide, 16, 2))
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.pixels, wide >> 8)
    assert picture.notes == ("16-bit colour, read as 8-bit",)
    assert picture_header(tmp_path / "a.png").bits == 16


def test_transparency_is_laid_on_the_background_asked_for(tmp_path: Path) -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (200, 100, 50, 255)
    rgba[4:] = (255, 255, 255, 0)
    path = saved(tmp_path / "a.png", rgba)
    picture = read_picture(path, background=(1, 2, 3))
    np.testing.assert_array_equal(picture.pixels[0, 0], (200, 100, 50))
    np.testing.assert_array_equal(picture.pixels[7, 0], (1, 2, 3))
    assert picture.notes == ("transparency laid on background (1, 2, 3)",)
    np.testing.assert_array_equal(read_picture(path).pixels[7, 0], (0, 0, 0))


def test_half_transparency_mixes_evenly(tmp_path: Path) -> None:
    rgba = np.full((8, 8, 4), 128, np.uint8)
    pixels = read_picture(saved(tmp_path / "a.png", rgba), background=(0, 0, 0)).pixels
    assert abs(int(pixels[0, 0, 0]) - 64) <= 1


def test_opaque_alpha_changes_nothing_and_is_not_noted(tmp_path: Path) -> None:
    rgba = np.dstack([RGB8, np.full(RGB8.shape[:2], 255, np.uint8)])
    picture = read_picture(saved(tmp_path / "a.png", rgba), background=(9, 9, 9))
    np.testing.assert_array_equal(picture.pixels, RGB8)
    assert picture.notes == ()


def test_palette_gives_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (8, 4)))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.save(tmp_path / "a.png")
    assert picture_header(tmp_path / "a.png").mode == "P"
    pixels = read_picture(tmp_path / "a.png").pixels
    np.testing.assert_array_equal(pixels[0, :2], [(10, 20, 30), (200, 100, 0)])
    image.save(tmp_path / "b.png", transparency=0)
    clear = read_picture(tmp_path / "b.png", background=(7, 8, 9))
    np.testing.assert_array_equal(clear.pixels[0, :2], [(7, 8, 9), (200, 100, 0)])
    assert clear.notes == ("transparency laid on background (7, 8, 9)",)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_not_inverted(tmp_path: Path, name: str) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / name)
    picture = read_picture(tmp_path / name)
    red, green, blue = picture.pixels[8, 8].tolist()
    assert red > 240 and green < 15 and blue < 15
    assert picture.notes == ("CMYK, turned to RGB without its colour profile",)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "array"),
    [("a.jpg", RGB8), ("a.png", RGB8), ("a.tif", RGB8), ("b.tif", GREY16), ("c.tif", GREY8)],
)
def test_exif_orientation_is_applied_to_pixels_and_size(
    tmp_path: Path, name: str, array: np.ndarray, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / name, array, exif=exif)
    upright = saved(tmp_path / f"plain_{name}", array)
    with Image.open(upright) as plain:
        image = plain.copy()
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    picture = read_picture(path)
    shown = picture.pixels if array.ndim == 3 else picture.pixels[:, :, 0]
    np.testing.assert_array_equal(shown, expected)
    assert picture_size(path) == picture.size == expected.shape[:2]
    assert picture.notes == (() if orientation == 1 else (f"EXIF orientation {orientation}",))


def test_exif_after_the_pixels_counts_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    (tmp_path / "a.png").write_bytes(png(GREY8, 8, 0, after=chunk(b"eXIf", block)))
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.pixels[:, :, 0], np.rot90(GREY8, -1))
    assert picture_size(tmp_path / "a.png") == picture.size == (17, 12)


def test_the_first_picture_of_an_mpo_file_is_taken_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    second = Image.fromarray(255 - RGB8)
    Image.fromarray(RGB8).save(path, "MPO", save_all=True, append_images=[second], quality=95)
    picture = read_picture(path)
    assert picture.notes == ("MPO file, its first picture taken",)
    np.testing.assert_array_equal(picture.pixels, np.asarray(Image.open(path)))


def test_hash_is_of_the_file_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", GREY8)
    assert read_picture(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_long_thin_picture_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", np.zeros((10, 30_000), np.uint8))
    assert read_picture(path).size == picture_size(path) == (10, 30_000)


def test_pixel_bound_is_inclusive(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", GREY8)
    assert read_picture(path, max_pixels=12 * 17).size == (12, 17)
    with pytest.raises(PictureError, match="17 px wide and 12 px high"):
        read_picture(path, max_pixels=12 * 17 - 1)


def test_the_name_does_not_decide_the_format(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(GREY8).save(buffer, "PNG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert picture_header(tmp_path / "a.jpg").format == "PNG"
    np.testing.assert_array_equal(read_picture(tmp_path / "a.jpg").pixels[:, :, 0], GREY8)


@pytest.mark.parametrize(
    ("values", "expected", "kind"),
    [
        (np.array([[0, 255]], np.uint8), [[False, True]], "binary"),
        (np.array([[127, 128, 255]], np.uint8), [[False, True, True]], "antialiased"),
        (np.array([[0, 128]], np.uint8), [[False, True]], "antialiased"),
        (np.array([[0, 1, 3]], np.uint8), [[False, True, True]], "index"),
        (np.array([[0, 127]], np.uint8), [[False, True]], "index"),
        (np.array([[32767, 32768, 65535]], np.uint16), [[False, True, True]], "antialiased"),
        (np.array([[0, 255]], np.uint16), [[False, True]], "index"),
        (np.array([[0, 65535]], np.uint16), [[False, True]], "binary"),
        (np.array([[0.0, 0.5, 0.51, 1.0]], np.float32), [[False, False, True, True]], "antialiased"),
        (np.array([[0.0, 1.0]], np.float32), [[False, True]], "binary"),
        (np.array([[False, True]]), [[False, True]], "binary"),
        (np.zeros((1, 2), np.uint8), [[False, False]], "empty"),
        (np.zeros((1, 2), bool), [[False, False]], "empty"),
    ],
)
def test_mask_rule(values: np.ndarray, expected: list[list[bool]], kind: str) -> None:
    mask, found = binarise_mask(values)
    assert mask.dtype == np.bool_ and mask.tolist() == expected and found == kind


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((2, 2, 3), np.uint8), "3 dimensions"),
        (np.array([[np.nan, 1.0]]), "not finite"),
        (np.array([[-1, 1]]), "negative"),
        (np.array([[0.0, 255.0]]), "up to 255"),
    ],
)
def test_mask_rule_refuses_what_has_no_meaning(values: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        binarise_mask(values)


def test_masks_are_read_in_every_usual_form(tmp_path: Path) -> None:
    truth = GREY8 > 100
    full = np.where(truth, 255, 0).astype(np.uint8)
    palette = Image.fromarray(truth.astype(np.uint8))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "palette.png")
    saved(tmp_path / "grey.png", full)
    saved(tmp_path / "bits.png", truth)
    saved(tmp_path / "index.png", truth.astype(np.uint8))
    saved(tmp_path / "rgb.png", np.dstack([full] * 3))
    saved(tmp_path / "wide.tif", truth.astype(np.uint16) * np.uint16(65535))
    saved(tmp_path / "float.tif", truth.astype(np.float32))
    kinds = {}
    for path in tmp_path.iterdir():
        mask, kinds[path.name] = read_mask(path, (12, 17))
        np.testing.assert_array_equal(mask, truth, err_msg=path.name)
    assert kinds["palette.png"] == kinds["index.png"] == "index"
    assert {kinds[name] for name in ("grey.png", "bits.png", "rgb.png", "wide.tif", "float.tif")} == {
        "binary"
    }


def test_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.png", GREY8)
    with pytest.raises(PictureError, match=r"17 px wide and 12 px high.*20 px wide and 10 px high"):
        read_mask(path, (10, 20))
    check_mask_size(path, (10, 20), (10, 20))


def test_coloured_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"m\.png' is coloured.*Save it as 8-bit grey"):
        read_mask(saved(tmp_path / "m.png", RGB8))


def test_mask_with_holes_of_transparency_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="transparent in part"):
        read_mask(saved(tmp_path / "m.png", np.zeros((8, 8, 4), np.uint8)))


def test_float_mask_outside_its_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"m\.tif' holds float values up to 255"):
        read_mask(saved(tmp_path / "m.tif", np.full((8, 8), 255, np.float32)))
