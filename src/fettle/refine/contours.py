"""Outlines of defects as polygons, and the formats in which labelling tools read them.

Within Fettle a pixel's centre lies at integers, x to the right and y down. COCO, LabelMe and YOLO count from
the picture's corner, so that a pixel's centre lies at halves and a picture reaches from 0 to its width: every
coordinate is 0.5 more. YOLO divides by the picture's size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fettle.errors import UsageError
from fettle.protocols import Json

LEVEL = 0.5
_LEAST_STEP = 0.01  # px that an outline keeps from every pixel's centre, so that rounding moves none across
_DECIMALS = 3


@dataclass(frozen=True, eq=False)
class Outline:
    """One connected region (8 neighbours).

    Attributes:
        outer: (n, 2) x and y of its outer ring, px, pixel centres at integers; not closed by repetition.
        holes: rings of what lies inside and is not of the region, turning the other way.
        area_px: number of its pixels.
    """

    outer: NDArray[np.float64]
    holes: tuple[NDArray[np.float64], ...]
    area_px: int

    def polygon(self) -> NDArray[np.float64]:
        """(n, 2): one ring, each hole joined to it by a slit of no width, walked there and back.

        The formats here know no holes. Even-odd and winding rules both leave the holes empty.
        """
        if not self.holes:
            return self.outer
        from scipy.spatial import cKDTree

        tree = cKDTree(self.outer)
        detours: dict[int, list[NDArray[np.float64]]] = {}
        for hole in self.holes:
            distances, nearest = tree.query(hole)
            start = int(np.argmin(distances))
            place = int(nearest[start])
            around = np.roll(hole, -start, axis=0)
            detours.setdefault(place, []).extend([around, around[:1], self.outer[place : place + 1]])
        walked, last = [], 0
        for place in sorted(detours):
            walked += [self.outer[last : place + 1], *detours[place]]
            last = place + 1
        return np.concatenate([*walked, self.outer[last:]])


class OutlinedPicture(NamedTuple):
    """A picture's outlines, and what the formats say of it: file name, width and height in px."""

    name: str
    width: int
    height: int
    outlines: tuple[Outline, ...]


def outlines(
    soft: NDArray[np.float32], valid: NDArray[np.bool_] | None = None, level: float = LEVEL
) -> tuple[Outline, ...]:
    """Outlines of what is above `level`, at sub-pixel places, in the order of their first pixels.

    Lines between pixel centres are cut where the map, taken as linear, passes the level (marching squares),
    and half way at the picture's edge and at pixels that are not valid. Exactly the pixels above the level
    have their centres inside.

    Args:
        soft: (H, W), a soft mask or a map in the picture's own pixels.
        valid: (H, W), False where nothing counts.
        level: between inside and outside.

    Raises:
        UsageError: the map holds NaN.
    """
    if np.isnan(soft).any():
        raise UsageError("The map to be outlined holds NaN.", "Check the model's weights.")
    values = np.pad(soft.astype(np.float64), 1, constant_values=np.nan)
    if valid is not None:
        values[1:-1, 1:-1][~valid] = np.nan
    inside = values > level  # NaN is outside
    if not inside.any():
        return ()
    from scipy import ndimage

    labels, count = ndimage.label(inside, structure=np.ones((3, 3), dtype=bool))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    outer: dict[int, NDArray[np.float64]] = {}
    holes: dict[int, list[NDArray[np.float64]]] = {}
    for owner, ring in _rings(values, inside, labels, level):
        if _signed_area(ring) > 0:
            outer[owner] = ring
        else:
            holes.setdefault(owner, []).append(ring)
    return tuple(Outline(outer[n], tuple(holes.get(n, ())), int(areas[n])) for n in range(1, count + 1))


def _rings(
    values: NDArray[np.float64], inside: NDArray[np.bool_], labels: NDArray[np.int32], level: float
) -> list[tuple[int, NDArray[np.float64]]]:
    """All closed rings with the label of what they go round; the region on the right of the way.

    A ring's vertices lie on edges: lines between neighbouring pixels of which one is inside. Of each square
    of four pixels, walked clockwise, the edge that leaves the region is followed by the next that enters it:
    this cuts off the pixels outside, and so joins diagonal neighbours inside.
    """
    height, width = values.shape
    number = np.arange(height * width).reshape(height, width)
    across, down = 2 * number, 2 * number + 1  # the edges to the right of each pixel, and below it
    edges = (across[:-1, :-1], down[:-1, 1:], across[1:, :-1], down[:-1, :-1])  # top, right, bottom, left
    corners = (inside[:-1, :-1], inside[:-1, 1:], inside[1:, 1:], inside[1:, :-1])
    successor: dict[int, int] = {}
    for k in range(4):
        outside = corners[k]
        for step in range(1, 4):
            outside = outside & ~corners[(k + step) % 4]
            ends = outside & corners[(k + step + 1) % 4]
            successor.update(zip(edges[k][ends].tolist(), edges[(k + step) % 4][ends].tolist(), strict=True))
    found = []
    while successor:
        edge = next(iter(successor))
        ring = []
        while edge in successor:
            ring.append(edge)
            edge = successor.pop(edge)
        places, owner = _vertices(np.array(ring), values, inside, labels, level)
        found.append((owner, _without_straight(places)))
    return found


def _vertices(
    ring: NDArray[np.int64],
    values: NDArray[np.float64],
    inside: NDArray[np.bool_],
    labels: NDArray[np.int32],
    level: float,
) -> tuple[NDArray[np.float64], int]:
    """x and y (n, 2) where the edges of a ring pass the level, and the label inside."""
    pixel, is_down = np.divmod(ring, 2)
    first = np.stack(np.divmod(pixel, values.shape[1]))  # (2, n) row and column
    second = first + np.stack([is_down, 1 - is_down])
    swap = inside[tuple(second)]
    high, low = np.where(swap, second, first), np.where(swap, first, second)
    top, bottom = values[tuple(high)], values[tuple(low)]
    share = np.nan_to_num((top - level) / (top - bottom), nan=0.5).clip(_LEAST_STEP, 1 - _LEAST_STEP)
    places = high + share * (low - high) - 1  # less the padding
    return np.stack([places[1], places[0]], axis=1), int(labels[tuple(high[:, 0])])


def _without_straight(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ring without vertices on the straight line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9
    return ring[turns]


def _signed_area(ring: NDArray[np.float64]) -> float:
    """Positive where the ring turns clockwise on the screen (y down)."""
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


def _from_corner(points: NDArray[np.float64]) -> list[list[float]]:
    """Points [x, y] counted from the picture's corner, px."""
    rounded: list[list[float]] = np.round(points + 0.5, _DECIMALS).tolist()
    return rounded


def to_coco(pictures: Sequence[OutlinedPicture], category: str = "defect") -> dict[str, Json]:
    """The "instances" JSON of the COCO data format for many pictures: one annotation a region.

    Polygons and boxes [x, y, width, height] in px from the picture's corner; `area` in pixels, as COCO's own
    tools count it; `iscrowd` 0.
    """
    images: list[Json] = []
    annotations: list[Json] = []
    for number, picture in enumerate(pictures, start=1):
        images.append(
            {"id": number, "file_name": picture.name, "width": picture.width, "height": picture.height}
        )
        for outline in picture.outlines:
            polygon = _from_corner(outline.polygon())
            flat: list[Json] = [value for point in polygon for value in point]
            left, top = np.min(polygon, axis=0).tolist()
            right, bottom = np.max(polygon, axis=0).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": [flat],
                    "bbox": [round(side, _DECIMALS) for side in (left, top, right - left, bottom - top)],
                    "area": outline.area_px,
                    "iscrowd": 0,
                }
            )
    categories: list[Json] = [{"id": 1, "name": category, "supercategory": ""}]
    return {"images": images, "annotations": annotations, "categories": categories}


def to_labelme(picture: OutlinedPicture, label: str = "defect") -> dict[str, Json]:
    """The JSON that LabelMe keeps beside a picture: one polygon a region, px from the picture's corner.

    `imagePath` is the picture's name, relative to the JSON's folder; the picture itself is not packed in.
    """
    shapes: list[Json] = []
    for outline in picture.outlines:
        points: list[Json] = [[x, y] for x, y in _from_corner(outline.polygon())]
        shapes.append(
            {"label": label, "points": points, "group_id": None, "shape_type": "polygon", "flags": {}}
        )
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": picture.name,
        "imageData": None,
        "imageHeight": picture.height,
        "imageWidth": picture.width,
    }


def to_yolo(picture: OutlinedPicture, category: int = 0) -> str:
    """The text file of YOLO segmentation: a line a region, "category x1 y1 x2 y2 ..." in 0..1.

    Counted from the picture's corner and divided by its width and height. A good picture's is empty.
    """
    lines = []
    for outline in picture.outlines:
        shares = (outline.polygon() + 0.5) / (picture.width, picture.height)
        lines.append(" ".join([str(category), *(f"{value:.6f}" for value in shares.ravel())]))
    return "".join(line + "\n" for line in lines)


def to_png(soft: NDArray[np.float32], valid: NDArray[np.bool_] | None = None, level: float = LEVEL) -> bytes:
    """The mask as a grey PNG of the picture's own size: 255 above the level, else 0."""
    above = soft > level if valid is None else (soft > level) & valid
    file = io.BytesIO()
    Image.fromarray(np.where(above, 255, 0).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
