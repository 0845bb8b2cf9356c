"""Broken, strange and hostile files: each is refused in one sentence that names the file and the remedy."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fettle.datasets.open import open_dataset
from fettle.datasets.table import MAX_BYTES
from fettle.errors import DataError, PictureError, UsageError
from fettle.images.decode import picture_size, read_mask, read_picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own words on broken tags

GREY = np.random.default_rng(0).integers(0, 200, (40, 50), dtype=np.uint8)


def encoded(name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, name, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds one row of nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def refusal(path: Path) -> str:
    with pytest.raises(PictureError) as caught:
        read_picture(path)
    assert str(path) in caught.value.what and caught.value.remedy.endswith(".")
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty (0 bytes)"),
        (b"hello, I am a text", "does not begin like a PNG"),
        (b"GIF89a" + bytes(40), "does not begin like a PNG"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "damaged or truncated JPEG"),
        (b"BM" + bytes(60), "damaged or truncated BMP"),
        (b"II*\0" + bytes(60), "damaged or truncated TIFF"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(20), "damaged or truncated WEBP"),
    ],
)
def test_no_picture_is_called_by_its_name(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert words in refusal(path)
    with pytest.raises(PictureError, match=r"a\.png"):
        picture_size(path)


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "no.png")


def test_folder_named_like_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert "is a folder" in refusal(tmp_path / "a.png")


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert "not a regular file" in refusal(tmp_path / "a.png")


def test_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(60_000, 50_000))
    message = refusal(path)
    assert "60000 px wide and 50000 px high (3000 million pixels)" in message and "max_pixels" in message


def test_one_pixel_is_too_small(tmp_path: Path) -> None:
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    assert "1 px wide and 1 px high, and Fettle needs 8 px a side" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["TIFF", "PNG", "WEBP"])
def test_several_pages_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(name, save_all=True, append_images=[Image.fromarray(255 - GREY)]))
    assert "several pages or an animation" in refusal(path)


def test_float_tiff_is_refused_with_the_remedy(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "a.tif")
    assert refusal(tmp_path / "a.tif").endswith("Save it as 8- or 16-bit.")


def test_nan_is_refused_with_its_count(tmp_path: Path) -> None:
    values = GREY.astype(np.float32)
    values[3, :2] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert "holds 2 values that are not finite" in refusal(tmp_path / "a.tif")
    with pytest.raises(PictureError, match="not finite"):
        read_mask(tmp_path / "a.tif")


@pytest.mark.parametrize("extreme", [-5, 70_000])
def test_integers_of_unknown_range_are_refused(tmp_path: Path, extreme: int) -> None:
    values = GREY.astype(np.int32)
    values[0, 0] = extreme
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert f"{extreme}" in refusal(tmp_path / "a.tif")


def test_invisible_picture_is_refused(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert "transparent everywhere" in refusal(tmp_path / "a.png")


def test_unusual_colour_space_is_refused(tmp_path: Path) -> None:
    Image.new("LAB", (20, 20), (10, 20, 30)).save(tmp_path / "a.tif")
    assert "pixel layout LAB" in refusal(tmp_path / "a.tif")


def test_broken_exif_costs_a_note_not_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    picture = read_picture(path)
    assert picture.size == (40, 50)


WHOLE = {
    "PNG": encoded("PNG"),
    "BMP": encoded("BMP"),
    "TIFF": encoded("TIFF"),
    "JPEG": encoded("JPEG", quality=90),
    "WEBP": encoded("WEBP", lossless=True),
}


@pytest.mark.parametrize("name", list(WHOLE))
def test_truncated_file_is_refused_or_complete(tmp_path: Path, name: str) -> None:
    whole = tmp_path / "whole"
    whole.write_bytes(WHOLE[name])
    expected = read_picture(whole).pixels
    path = tmp_path / "cut.png"
    size = len(WHOLE[name])
    refused = 0
    for length in {1, 2, 8, 20, *range(30, size, max(1, size // 60)), size - 20, size - 3, size - 1}:
        path.write_bytes(WHOLE[name][:length])
        try:
            pixels = read_picture(path).pixels
        except PictureError as error:
            assert "cut.png" in str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, expected, err_msg=f"{name} cut to {length} bytes")
    assert refused > 20


@pytest.mark.parametrize("name", list(WHOLE))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_raise_nothing_but_a_picture_error(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(content) - 1, 400)))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.png"
    path.write_bytes(bytes(content))
    for read in (read_picture, read_mask, picture_size):
        try:
            read(path)
        except PictureError as error:
            assert "a.png" in str(error)


def dataset_refusal(path: Path, layout: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(path, layout)
    assert str(path) in caught.value.what and caught.value.remedy.endswith(".")
    return str(caught.value)


def test_missing_data_set(tmp_path: Path) -> None:
    assert "does not exist" in dataset_refusal(tmp_path / "no")
    assert "does not exist" in dataset_refusal(tmp_path / "no.csv", "manifest")


def test_empty_folder(tmp_path: Path) -> None:
    assert "is empty. Put pictures into it." in dataset_refusal(tmp_path)


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    message = dataset_refusal(tmp_path)
    assert "holds no pictures" in message and ".png" in message
    (tmp_path / "train/good").mkdir(parents=True)
    assert "holds no pictures" in dataset_refusal(tmp_path)


@pytest.mark.parametrize("layout", ["auto", "folder", "mvtec", "mvtec3d", "visa", "magnetic_tile"])
def test_file_where_a_folder_is_meant(tmp_path: Path, layout: str) -> None:
    (tmp_path / "a.png").touch()
    assert "is a file where a folder is meant" in dataset_refusal(tmp_path / "a.png", layout)


def test_folder_where_a_manifest_is_meant(tmp_path: Path) -> None:
    assert "a manifest is one" in dataset_refusal(tmp_path, "manifest")


def test_unknown_layout_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no layout 'mvtek'\. Did you mean 'mvtec'\?"):
        open_dataset(tmp_path, "mvtek")


def test_layout_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert "neither train/good nor test/" in dataset_refusal(tmp_path, "mvtec")
    assert "no folders named MT_*" in dataset_refusal(tmp_path, "magnetic_tile")


def test_folder_of_products_is_not_taken_for_good_pictures(tmp_path: Path) -> None:
    for name in ("bolt", "nut"):
        (tmp_path / name / "train/good").mkdir(parents=True)
    message = dataset_refusal(tmp_path)
    assert "holds several products (bolt, nut)" in message and str(tmp_path / "bolt") in message


def test_masks_are_not_taken_for_good_pictures(tmp_path: Path) -> None:
    (tmp_path / "ground_truth").mkdir()
    (tmp_path / "a.png").touch()
    assert "ground_truth/ but no train/" in dataset_refusal(tmp_path)


def test_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(bytes(range(256)))
    assert "not UTF-8 text" in dataset_refusal(tmp_path / "list.csv")


def test_manifest_over_the_bound_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "list.csv").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no disk
    assert "over the bound of 256 MiB" in dataset_refusal(tmp_path / "list.csv")


def test_manifest_with_a_nul_in_a_path(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label,mask,split,product\na\0.png,good,,,\n")
    assert "line 2" in dataset_refusal(tmp_path / "list.csv")


def test_manifest_with_one_endless_field(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label,mask,split,product\n" + "x" * 200_000 + ",good,,,\n")
    assert "line 2 is no valid CSV" in dataset_refusal(tmp_path / "list.csv")
