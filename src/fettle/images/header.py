"""A picture file before it is decoded: is it a file, which format, how large, which way up.

The format is told from the first bytes, and only the five readers below are ever tried.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from fettle.errors import PictureError

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
MAX_FILE_BYTES = 1 << 30

_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
_ALLOWED = "PNG, JPEG, BMP, TIFF or WebP"
_ORIENTATION = 0x0112
_BITS = 258  # TIFF tag


@dataclass(frozen=True)
class PictureHeader:
    """What a picture's header says, without decoding it.

    Attributes:
        height, width: px, with the EXIF orientation applied.
        format: "PNG", "JPEG", "BMP", "TIFF" or "WEBP".
        mode: Pillow's name of the pixel layout ("L", "RGB", "I;16", ...).
        bits: bits a sample in the file.
    """

    height: int
    width: int
    format: str
    mode: str
    bits: int


@dataclass(frozen=True)
class OpenedPicture:
    """A parsed header, not yet decoded. `orientation` is what the decoded array still needs."""

    image: ImageFile.ImageFile
    format: str
    orientation: int
    bits: int
    notes: tuple[str, ...]


def picture_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in px from the header alone, EXIF orientation applied. Raises PictureError."""
    header = picture_header(path)
    return header.height, header.width


def picture_header(path: str | Path) -> PictureHeader:
    """Read a picture's header without decoding it. Raises PictureError."""
    path = Path(path)
    _check_file(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
            opened = open_picture(path, stream, start, None)
            width, height = opened.image.size
            if opened.orientation >= 5:  # a quarter turn
                width, height = height, width
            return PictureHeader(height, width, opened.format, opened.image.mode, opened.bits)
    except OSError as error:
        raise _unreadable(path, error) from None


def file_sha256(path: str | Path) -> str:
    """Hash of a file's bytes, hexadecimal: the same as `Picture.sha256`. Raises PictureError."""
    path = Path(path)
    _check_file(path)
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> PictureError:
    why = error.strerror or str(error)
    return PictureError(f"'{path}' can't be read: {why}.", "Check the path and its permissions.")


def _check_file(path: Path) -> None:
    """A regular file of a sane size. Looked at before opening: opening a pipe would wait for ever."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise PictureError(f"'{path}' does not exist.", "Check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PictureError(f"'{path}' can't be read: {error}.", "Check the path.") from None
    if stat.S_ISDIR(info.st_mode):
        raise PictureError(f"'{path}' is a folder, not a picture.", "Name a picture inside it.")
    if not stat.S_ISREG(info.st_mode):
        raise PictureError(f"'{path}' is not a regular file.", "Copy the picture to a file first.")
    if info.st_size == 0:
        raise PictureError(f"'{path}' is empty (0 bytes).", "Copy it again from its source.")
    if info.st_size > MAX_FILE_BYTES:
        raise PictureError(
            f"'{path}' has {info.st_size >> 20} MiB, over the bound of {MAX_FILE_BYTES >> 20} MiB.",
            "Save it compressed, or cut it into parts.",
        )


def file_bytes(path: Path) -> bytes:
    """The whole file, bounded. Raises PictureError."""
    _check_file(path)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size  # no more is asked for: a read reserves what it is asked
            data = stream.read(size + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(data) > size:
        raise PictureError(f"'{path}' grew while it was read.", "Wait until it is written, then try again.")
    return data


def _format_of(start: bytes) -> str | None:
    """The format by the first bytes, None when it is none of the five."""
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"BM"):
        return "BMP"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):  # the last two: BigTIFF
        return "TIFF"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    return None


def open_picture(path: Path, stream: BinaryIO, start: bytes, max_pixels: int | None) -> OpenedPicture:
    """Parse the header; refuse too many pixels (None: any number) and several pages.

    The readers are called directly: `Image.open` would compare with a bound of its own, which is
    one for the whole process. Pillow's stream stays in use until the picture is decoded.
    """
    name = _format_of(start)
    if name is None:
        raise PictureError(
            f"'{path}' does not begin like a {_ALLOWED} file.",
            f"Save it as {_ALLOWED}, or leave it out.",
        )
    stream.seek(0)
    try:
        image = _READERS[name](stream)  # without its name: given one, Pillow maps turned TIFFs garbled
        width, height = image.size
    except Exception as error:  # a parser on unknown bytes: what it may raise is not documented
        raise damaged(path, name, error) from error
    if max_pixels is not None and width * height > max_pixels:
        raise PictureError(
            f"'{path}' is {width} px wide and {height} px high ({width * height / 1e6:.0f} million pixels), "
            f"over the bound of {max_pixels / 1e6:.0f} million.",
            "Cut or shrink it, or raise max_pixels.",
        )
    if _several_pages(path, image, name):
        raise PictureError(
            f"'{path}' holds several pages or an animation.", "Save each page as a file of its own."
        )
    orientation, notes = _orientation(stream, image, name)
    if name == "JPEG" and "mp" in image.info:  # telephones put a thumbnail or a gain map behind
        notes += ("MPO file, its first picture taken",)
    return OpenedPicture(image, name, orientation, _bits(stream, image, name), notes)


def damaged(path: Path, name: str, error: Exception) -> PictureError:
    """The refusal of a file that a decoder broke off at."""
    why = str(error).strip().rstrip(".") or type(error).__name__
    return PictureError(
        f"'{path}' is a damaged or truncated {name} file ({why}).", "Copy it again from its source."
    )


def _several_pages(path: Path, image: ImageFile.ImageFile, name: str) -> bool:
    if name != "TIFF":
        return int(getattr(image, "n_frames", 1)) > 1
    try:  # not n_frames: it would walk a chain of any length
        image.seek(1)
    except EOFError:
        return False
    except Exception as error:
        raise damaged(path, name, error) from error
    return True


def _orientation(stream: BinaryIO, image: ImageFile.ImageFile, name: str) -> tuple[int, tuple[str, ...]]:
    """EXIF orientation, 1 to 8, that the decoded array still needs, and what to note."""
    if name == "TIFF":  # Pillow turns TIFF by itself, size and pixels
        tag = image.tag_v2.get(_ORIENTATION, 1)  # type: ignore[attr-defined]  # TIFF only
        return 1, (f"EXIF orientation {tag}",) if tag in range(2, 9) else ()
    try:
        if name == "PNG" and "exif" not in image.info and (block := _late_exif(stream)):
            exif = Image.Exif()
            exif.load(block)
        else:
            exif = Image.Image.getexif(image)  # not the PNG reader's own: it decodes the picture
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # a parser on unknown bytes
        return 1, ("EXIF block unreadable, taken as upright",)
    if value == 1:
        return 1, ()
    if value not in range(2, 9):
        return 1, (f"EXIF orientation {value!r} unknown, taken as upright",)
    return int(value), (f"EXIF orientation {value}",)


def _late_exif(stream: BinaryIO) -> bytes | None:
    """A PNG's eXIf chunk, wherever it stands: it may come after the pixels. The place is kept."""
    place = stream.tell()
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return stream.read(min(length, 1 << 16))
            if head[4:] == b"IEND":
                break
            stream.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        stream.seek(place)


def _bits(stream: BinaryIO, image: ImageFile.ImageFile, name: str) -> int:
    """Bits a sample as the file has them: Pillow's mode does not tell 16-bit colour from 8-bit."""
    if name == "TIFF":
        bits = image.tag_v2.get(_BITS, 1)  # type: ignore[attr-defined]  # TIFF only
        return int(max(bits)) if isinstance(bits, tuple) else int(bits)
    if name == "PNG":
        place = stream.tell()
        stream.seek(24)  # in IHDR, the first chunk always
        depth = stream.read(1)[0]
        stream.seek(place)
        return depth
    return 1 if image.mode == "1" else 8
