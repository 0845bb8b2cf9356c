"""Frame: how a picture becomes network input, and how a map comes back to the picture's own pixels."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fettle.errors import PictureError, UsageError
from fettle.images.picture import Picture
from fettle.sampling import resize_map

FrameMode = Literal["auto", "square", "pad", "crop", "native", "tile"]
Pixels: TypeAlias = NDArray[np.generic]  # uint8, uint16, or float32 on the 8-bit scale
ConcreteMode = Literal["stretch", "pad", "crop", "native", "tile"]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_SAME_ASPECT = 0.02  # largest spread of log aspect that still counts as one common aspect
_AREA_SLACK = 0.15  # a rectangle's area may differ so much from size x size
_MAX_SIDE = 8192
_MAX_ROI_SIDE = 1024


class RoiMask(BaseModel):
    """A region of interest of any shape, for pictures that all show the same scene.

    Attributes:
        height, width: its size, px; it is brought to each picture's size.
        bits: base64 of the mask's bits, row by row, 1 inside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(ge=1, le=_MAX_SIDE)
    width: int = Field(ge=1, le=_MAX_SIDE)
    bits: str

    @classmethod
    def from_array(cls, inside: NDArray[np.bool_]) -> RoiMask:
        """Keep a mask (H, W), at no more than 1,024 px a side."""
        factor = min(1.0, _MAX_ROI_SIDE / max(inside.shape))
        small = _resize_valid(inside, *(max(round(side * factor), 1) for side in inside.shape))
        bits = base64.b64encode(np.packbits(small).tobytes()).decode()
        return cls(height=small.shape[0], width=small.shape[1], bits=bits)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len(base64.b64decode(self.bits, validate=True)) != -(-self.height * self.width // 8):
            raise ValueError("the region of interest does not have its size")
        return self

    def array(self) -> NDArray[np.bool_]:
        """The mask, (height, width) bool."""
        bits = np.frombuffer(base64.b64decode(self.bits), np.uint8)
        inside = np.unpackbits(bits, count=self.height * self.width)
        return inside.reshape(self.height, self.width).astype(bool)


class Frame(BaseModel):
    """A concrete frame, chosen once from the good pictures and stored in the model.

    Attributes:
        mode: "stretch" fills height x width whatever the aspect; "pad" keeps the aspect and repeats the
            border; "crop" shows the centre; "native" does not resize, only pads; "tile" cuts the picture
            into overlapping tiles of height x width at native scale.
        height, width: framed size, px.
        resize_to: "crop" only: the shorter side before the crop, px.
        overlap: "tile" only: px shared by neighbouring tiles.
        resample: filter for resizing; downscaling is antialiased.
        roi: left, top, right, bottom as shares (0..1) of the picture's own size; outside never scores.
        roi_mask: a region of another shape; outside never scores.
        reason: why this frame, in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: ConcreteMode
    height: int = Field(ge=14, le=_MAX_SIDE)
    width: int = Field(ge=14, le=_MAX_SIDE)
    resize_to: int = Field(default=0, ge=0, le=_MAX_SIDE)
    overlap: int = Field(default=0, ge=0)
    resample: Resample = "bilinear"
    roi: tuple[float, float, float, float] | None = None
    roi_mask: RoiMask | None = None
    reason: str = ""

    def place(self, picture: Picture) -> Placed:
        """The picture's views for the network.

        Raises:
            PictureError: the picture has no pixel in the region of interest.
        """
        inside = self._inside(picture)
        if self.mode == "tile":
            return self._place_tiles(picture, inside)
        scale_to, box, note = self._geometry(picture.size)
        pixels: Pixels = resize_pixels(picture.pixels, *scale_to, self.resample)
        valid = _resize_valid(inside, *scale_to)
        top, left = box[0], box[1]
        if self.mode == "crop":
            pixels = pixels[top : top + self.height, left : left + self.width]
            valid = valid[top : top + self.height, left : left + self.width]
        else:  # the border is repeated, and what was added never scores
            around = ((top, self.height - top - scale_to[0]), (left, self.width - left - scale_to[1]))
            pixels = _pad_edge(pixels, around)
            valid = np.pad(valid, around)
        notes = (note,) if note else ()
        return Placed(_to_input(pixels)[None], valid[None, None], picture.size, scale_to, (box,), notes)

    def restore(
        self, maps: NDArray[np.float32], placed: Placed, picture_size: tuple[int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Bring the views' maps (n, height, width) back to the picture's own size.

        Returns:
            the map (H, W), 0 where nothing was seen, and bool (H, W): where something was seen.
        """
        height, width = placed.scaled
        whole = np.zeros((height, width), np.float32)
        if self.mode == "tile":
            weights = np.zeros((height, width), np.float32)
            ramp = _tile_weights(self.height, self.width, self.overlap)
            for view, (top, left) in zip(maps, placed.boxes, strict=True):
                rows = slice(top, min(top + self.height, height))
                columns = slice(left, min(left + self.width, width))
                part = ramp[: rows.stop - top, : columns.stop - left]
                whole[rows, columns] += view[: rows.stop - top, : columns.stop - left] * part
                weights[rows, columns] += part
            whole /= weights
            seen = np.ones((height, width), bool)
        elif self.mode == "crop":
            top, left = placed.boxes[0]
            seen = np.zeros((height, width), bool)
            around = ((top, height - top - self.height), (left, width - left - self.width))
            whole = np.pad(maps[0], around, mode="edge")  # resizing then mixes nothing unseen in
            seen[top : top + self.height, left : left + self.width] = True
        else:
            top, left = placed.boxes[0]
            whole = np.ascontiguousarray(maps[0, top : top + height, left : left + width])
            seen = np.ones((height, width), bool)
        own = resize_map(whole, *picture_size)
        valid = _resize_valid(seen, *picture_size) & self._inside_size(picture_size)
        return np.where(valid, own, np.float32(0)), valid

    def _geometry(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], str]:
        """Scaled size, (top, left) of the picture in the frame (of the frame in the picture for "crop")."""
        height, width = size
        if self.mode == "stretch":
            return (self.height, self.width), (0, 0), ""
        if self.mode == "crop":
            factor = max(self.resize_to / min(size), self.height / height, self.width / width)
            scaled = (max(round(height * factor), self.height), max(round(width * factor), self.width))
            return scaled, ((scaled[0] - self.height) // 2, (scaled[1] - self.width) // 2), ""
        factor = min(self.height / height, self.width / width)
        note = ""
        if self.mode == "native":
            if factor < 1:
                note = f"shrunk to {factor:.3f} of its size to fit the frame"
            factor = min(factor, 1.0)
        scaled = (
            min(max(round(height * factor), 1), self.height),
            min(max(round(width * factor), 1), self.width),
        )
        return scaled, ((self.height - scaled[0]) // 2, (self.width - scaled[1]) // 2), note

    def _place_tiles(self, picture: Picture, inside: NDArray[np.bool_]) -> Placed:
        height, width = picture.size
        pixels: Pixels = picture.pixels
        valid = inside
        missing = ((0, max(self.height - height, 0)), (0, max(self.width - width, 0)))
        if any(after for _, after in missing):
            pixels = _pad_edge(pixels, missing)
            valid = np.pad(valid, missing)
        tops = _tile_starts(max(height, self.height), self.height, self.overlap)
        lefts = _tile_starts(max(width, self.width), self.width, self.overlap)
        boxes = tuple((top, left) for top in tops for left in lefts)
        views = [pixels[t : t + self.height, w : w + self.width] for t, w in boxes]
        valids = [valid[t : t + self.height, w : w + self.width] for t, w in boxes]
        return Placed(
            np.stack([_to_input(view) for view in views]),
            np.stack(valids)[:, None],
            picture.size,
            picture.size,
            boxes,
            (),
        )

    def _inside(self, picture: Picture) -> NDArray[np.bool_]:
        inside = self._inside_size(picture.size)
        if not inside.any():
            raise PictureError(
                f"{picture.path} has no pixel in the region of interest.",
                "Give a larger picture or another region.",
            )
        return inside

    def _inside_size(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        height, width = size
        inside = np.ones(size, bool)
        if self.roi_mask is not None:
            inside &= _resize_valid(self.roi_mask.array(), *size)
        if self.roi is not None:
            left, top, right, bottom = self.roi
            inside[: round(top * height)] = False
            inside[round(bottom * height) :] = False
            inside[:, : round(left * width)] = False
            inside[:, round(right * width) :] = False
        return inside


@dataclass(frozen=True)
class Placed:
    """A picture in its frame.

    Attributes:
        views: float32 (n, 3, height, width), RGB in 0..1; one view, or one a tile.
        valid: bool (n, 1, height, width).
        size: the picture's own (height, width).
        scaled: its (height, width) after resizing, before padding, cropping or tiling.
        boxes: (top, left) of each view.
        notes: what a user should know, e.g. that it was shrunk.
    """

    views: NDArray[np.float32]
    valid: NDArray[np.bool_]
    size: tuple[int, int]
    scaled: tuple[int, int]
    boxes: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


def choose_frame(
    mode: FrameMode,
    size: int,
    picture_sizes: Sequence[tuple[int, int]],
    side_step: int,
    *,
    resample: Resample = "bilinear",
    roi: tuple[float, float, float, float] | None = None,
    roi_mask: RoiMask | None = None,
) -> Frame:
    """The concrete frame for the good pictures at hand.

    Args:
        mode: what the user asked for; "auto" looks at the pictures.
        size: side of the square, or of the square with the rectangle's area, px.
        picture_sizes: (height, width) of every good picture.
        side_step: sides must be multiples of it (the backbone's).

    Raises:
        UsageError: a size that is no multiple of the step, or a region of interest without area.
    """
    if roi is not None and not (0 <= roi[0] < roi[2] <= 1 and 0 <= roi[1] < roi[3] <= 1):
        raise UsageError(
            f"The region of interest {roi} has no area.", "Give left, top, right, bottom as shares in 0..1."
        )
    if mode in ("auto", "square", "pad", "crop", "tile") and (size % side_step or size < side_step):
        near = max(round(size / side_step), 1) * side_step
        raise UsageError(f"Size {size} is no multiple of {side_step}.", f"Use --size {near}.")

    def frame(concrete: ConcreteMode, height: int, width: int, reason: str, **more: int) -> Frame:
        return Frame(
            mode=concrete,
            height=height,
            width=width,
            resample=resample,
            roi=roi,
            roi_mask=roi_mask,
            reason=reason,
            **more,
        )

    if mode == "square":
        return frame("stretch", size, size, "a square was asked for")
    if mode == "pad":
        return frame("pad", size, size, "keeping the aspect was asked for")
    if mode == "crop":
        inner = max(round(size * 0.875 / side_step), 1) * side_step
        return frame("crop", inner, inner, f"shorter side to {size}, centre {inner}", resize_to=size)
    if mode == "tile":
        return frame("tile", size, size, "tiles at native scale were asked for", overlap=size // 4)
    if mode == "native":
        height = _ceil_to(max(h for h, _ in picture_sizes), side_step)
        width = _ceil_to(max(w for _, w in picture_sizes), side_step)
        return frame("native", height, width, "no resizing was asked for; the largest good picture fits")
    aspects = [math.log(width / height) for height, width in picture_sizes]
    if max(aspects) - min(aspects) > _SAME_ASPECT:
        # Padded, a picture's border lies at another place each time, and good pictures are odd there.
        return frame("stretch", size, size, "the good pictures have several aspect ratios")
    height, width = best_rectangle(float(np.median(aspects)), size, side_step)
    return frame("stretch", height, width, "the good pictures share one aspect ratio")


def best_rectangle(log_aspect: float, size: int, side_step: int) -> tuple[int, int]:
    """(height, width): multiples of the step whose area is within 15 % of size x size, the nearest in
    log(width / height), then the larger area."""
    area = size * size
    best: tuple[float, int, int, int] | None = None
    for height in range(side_step, 16 * size + 1, side_step):
        low = max(math.ceil(area * (1 - _AREA_SLACK) / height / side_step), 1)
        high = math.floor(area * (1 + _AREA_SLACK) / height / side_step)
        for width in range(low * side_step, high * side_step + 1, side_step):
            error = round(abs(math.log(width / height) - log_aspect), 12)
            candidate = (error, -height * width, height, width)
            best = candidate if best is None else min(best, candidate)
    return (size, size) if best is None else (best[2], best[3])


def resize_pixels(pixels: Pixels, height: int, width: int, resample: Resample) -> Pixels:
    """(H, W, 3) to (height, width, 3). 16-bit pixels come back as float32 on the 8-bit scale."""
    if pixels.dtype == np.uint16:
        channels = [
            Image.fromarray(pixels[..., c].astype(np.float32) / np.float32(257)).resize(
                (width, height), _FILTERS[resample]
            )
            for c in range(3)
        ]
        stacked = np.stack([np.asarray(c, np.float32) for c in channels], axis=-1)
        return np.clip(stacked, np.float32(0), np.float32(255))
    if pixels.shape[:2] == (height, width):
        return pixels
    resized: Pixels = np.asarray(Image.fromarray(pixels).resize((width, height), _FILTERS[resample]))
    return resized


def _pad_edge(pixels: Pixels, around: tuple[tuple[int, int], tuple[int, int]]) -> Pixels:
    """Repeat the border: a network then sees no edge that is not there."""
    padded: Pixels = np.pad(pixels, (*around, (0, 0)), mode="edge")
    return padded


def _to_input(pixels: Pixels) -> NDArray[np.float32]:
    """(H, W, 3) to float32 (3, H, W) in 0..1."""
    full_scale = np.float32(65535 if pixels.dtype == np.uint16 else 255)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / full_scale


def from_input(view: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Network input, (3, H, W) in 0..1, as pixels (H, W, 3) for people."""
    pixels: NDArray[np.uint8] = np.rint(view.transpose(1, 2, 0).clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _resize_valid(valid: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """A mask at another size: nearest pixel."""
    if valid.shape == (height, width):
        return valid
    if valid.all():
        return np.ones((height, width), bool)
    rows = ((np.arange(height) + 0.5) * valid.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * valid.shape[1] / width).astype(int)
    resized: NDArray[np.bool_] = valid[rows][:, columns]
    return resized


def _ceil_to(value: int, step: int) -> int:
    return -(-value // step) * step


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of evenly spread tiles that cover `length` with at least `overlap` in common."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _tile_weights(height: int, width: int, overlap: int) -> NDArray[np.float32]:
    """Blend weights: 1 inside, falling linearly to the tile's edge over the overlap."""

    def ramp(length: int) -> NDArray[np.float64]:
        distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1.0
        return np.minimum(distance / max(overlap, 1), 1.0)

    return np.outer(ramp(height), ramp(width)).astype(np.float32)
