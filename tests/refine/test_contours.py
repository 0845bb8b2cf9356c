"""Outlines hold exactly the pixels above the level, and the formats say the same of them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, label

from fettle.errors import UsageError
from fettle.refine.contours import (
    Outline,
    OutlinedPicture,
    outlines,
    to_coco,
    to_labelme,
    to_png,
    to_yolo,
)


def filled(polygon: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Which pixel centres, at integers, lie inside by the even-odd rule."""
    y, x = np.mgrid[:height, :width].astype(float)
    inside = np.zeros((height, width), bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y1 != y2:
            passes = (y1 <= y) != (y2 <= y)
            inside ^= passes & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside


def area(polygon: NDArray[np.float64]) -> float:
    x, y = polygon.T
    return abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2


def drawn(found: tuple[Outline, ...], shape: tuple[int, int]) -> NDArray[np.int64]:
    """How many outlines hold each pixel."""
    return np.sum([filled(o.polygon(), *shape) for o in found] + [np.zeros(shape)], axis=0)


def blocky(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (16, 20)) -> NDArray[np.float32]:
    mask = np.zeros(shape, np.float32)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = 1
    return mask


RING = blocky((2, 12, 3, 15))
RING[5:9, 6:10] = 0
ISLAND = RING.copy()
ISLAND[6:8, 7:9] = 1
DIAGONAL = blocky((2, 5, 2, 5), (5, 8, 5, 9))


# --- outlines


@pytest.mark.parametrize(
    ("mask", "regions", "holes"),
    [
        (blocky((4, 9, 3, 12)), 1, 0),
        (blocky((0, 16, 0, 20)), 1, 0),
        (blocky((0, 3, 0, 4), (13, 16, 17, 20)), 2, 0),
        (blocky((7, 8, 9, 10)), 1, 0),
        (RING, 1, 1),
        (ISLAND, 2, 1),
        (DIAGONAL, 1, 0),
        (1 - DIAGONAL, 1, 2),
        (blocky(), 0, 0),
    ],
)
def test_a_blocky_mask_is_drawn_again_exactly(mask: NDArray[np.float32], regions: int, holes: int) -> None:
    found = outlines(mask)
    assert (len(found), sum(len(o.holes) for o in found)) == (regions, holes)
    np.testing.assert_array_equal(drawn(found, (16, 20)), mask)


@pytest.mark.parametrize("seed", range(3))
def test_random_masks_and_soft_ones_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rough = (rng.random((24, 31)) < 0.55).astype(np.float32)
    smooth = gaussian_filter(rng.random((24, 31)), 1.2).astype(np.float32)
    for soft in (rough, (smooth - smooth.min()) / np.ptp(smooth)):
        found = outlines(soft)
        np.testing.assert_array_equal(drawn(found, soft.shape), soft > 0.5)
        count = label(soft > 0.5, structure=np.ones((3, 3)))[1]
        assert len(found) == count
        assert sum(o.area_px for o in found) == int((soft > 0.5).sum())


def test_the_area_is_that_of_the_pixels_but_for_the_boundary() -> None:
    for mask in (blocky((4, 9, 3, 12)), RING, blocky((0, 16, 0, 20))):
        (outline,) = outlines(mask)
        boundary = np.pad(mask, 1) - np.pad(mask, 1) * np.roll(np.pad(mask, 1), 1, 0) * np.roll(
            np.pad(mask, 1), 1, 1
        )
        assert abs(area(outline.polygon()) - outline.area_px) <= boundary.sum() / 2
    assert area(outlines(blocky((4, 9, 3, 12)))[0].outer) == 45 - 4 / 8  # each corner is cut by an eighth


def test_a_hole_is_left_out_of_the_polygons_area() -> None:
    (outline,) = outlines(RING)
    assert area(outline.polygon()) == pytest.approx(area(outline.outer) - area(outline.holes[0]))


def test_a_soft_edge_lies_between_pixels() -> None:
    soft = np.tile(np.array([0.0, 0.2, 0.9, 0.6, 0.1], np.float32), (5, 1))
    (outline,) = outlines(soft)
    assert outline.outer[:, 0].min() == pytest.approx(1 + 0.3 / 0.7, abs=1e-6)
    assert outline.outer[:, 0].max() == pytest.approx(3 + 0.1 / 0.5, abs=1e-6)


def test_a_faint_region_still_reaches_the_pictures_edge() -> None:
    (outline,) = outlines(np.full((4, 6), 0.6, np.float32))
    assert outline.outer.min(axis=0).tolist() == [-0.5, -0.5]
    assert outline.outer.max(axis=0).tolist() == [5.5, 3.5]


def test_a_value_at_the_level_is_outside() -> None:
    soft = blocky((4, 9, 3, 12))
    soft[6, 6], soft[3, 5] = 0.5, 0.5
    np.testing.assert_array_equal(drawn(outlines(soft), (16, 20)), soft > 0.5)


def test_what_is_not_valid_is_outside() -> None:
    valid = np.ones((16, 20), bool)
    valid[:, :6] = False
    mask = blocky((4, 9, 3, 12))
    np.testing.assert_array_equal(drawn(outlines(mask, valid), (16, 20)), (mask > 0) & valid)


def test_another_level_serves_maps_of_another_unit() -> None:
    mask = blocky((4, 9, 3, 12)) * 40 + 3
    np.testing.assert_array_equal(drawn(outlines(mask, level=20), (16, 20)), mask > 20)
    assert outlines(mask, level=50) == ()


def test_a_map_of_no_numbers_is_refused() -> None:
    with pytest.raises(UsageError, match="NaN"):
        outlines(np.full((3, 3), np.nan, np.float32))


# --- formats: a box of 9 x 5 pixels, columns 3..11 and rows 4..8, in a picture of 20 x 16

BOX = OutlinedPicture("a/box.png", 20, 16, outlines(blocky((4, 9, 3, 12))))
HOLED = OutlinedPicture("ring.png", 20, 16, outlines(RING))
GOOD = OutlinedPicture("good.png", 20, 16, ())
TWO = OutlinedPicture("two.png", 20, 16, outlines(blocky((0, 3, 0, 4), (13, 16, 17, 20))))


def test_coco_numbers_pictures_and_regions() -> None:
    found = json.loads(json.dumps(to_coco([BOX, GOOD, TWO])))
    assert [(i["id"], i["file_name"], i["width"], i["height"]) for i in found["images"]] == [
        (1, "a/box.png", 20, 16),
        (2, "good.png", 20, 16),
        (3, "two.png", 20, 16),
    ]
    assert [(a["id"], a["image_id"], a["category_id"]) for a in found["annotations"]] == [
        (1, 1, 1),
        (2, 3, 1),
        (3, 3, 1),
    ]
    assert found["categories"] == [{"id": 1, "name": "defect", "supercategory": ""}]


def test_coco_counts_from_the_corner_of_the_first_pixel() -> None:
    box = to_coco([BOX])["annotations"][0]  # type: ignore[index,call-overload]
    assert box["bbox"] == [3, 4, 9, 5]
    assert (box["area"], box["iscrowd"]) == (45, 0)
    (flat,) = box["segmentation"]
    assert (min(flat[::2]), max(flat[::2]), min(flat[1::2]), max(flat[1::2])) == (3, 12, 4, 9)
    assert len(flat) == 2 * 8


def test_labelme_counts_from_the_corner_too() -> None:
    found = json.loads(json.dumps(to_labelme(BOX, label="scratch")))
    (shape,) = found["shapes"]
    assert (shape["label"], shape["shape_type"]) == ("scratch", "polygon")
    points = np.array(shape["points"])
    assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == ([3, 4], [12, 9])
    assert (found["imagePath"], found["imageWidth"], found["imageHeight"]) == ("a/box.png", 20, 16)
    assert found["imageData"] is None


def test_yolo_is_the_same_in_shares_of_the_picture() -> None:
    (line,) = to_yolo(BOX, category=2).splitlines()
    category, *values = line.split()
    points = np.array(values, float).reshape(-1, 2)
    assert category == "2"
    np.testing.assert_allclose(points.min(axis=0), [3 / 20, 4 / 16], atol=1e-6)
    np.testing.assert_allclose(points.max(axis=0), [12 / 20, 9 / 16], atol=1e-6)
    assert len(to_yolo(TWO).splitlines()) == 2
    assert to_yolo(GOOD) == ""


@pytest.mark.parametrize("picture", [BOX, HOLED, TWO])
def test_every_format_draws_the_same_mask(picture: OutlinedPicture) -> None:
    expected = drawn(picture.outlines, (16, 20))
    coco = [a["segmentation"][0] for a in to_coco([picture])["annotations"]]  # type: ignore[index,union-attr,call-overload]
    labelme = [s["points"] for s in to_labelme(picture)["shapes"]]  # type: ignore[index,union-attr,call-overload]
    yolo = [
        np.array(line.split()[1:], float).reshape(-1, 2) * (20, 16) for line in to_yolo(picture).splitlines()
    ]
    for polygons in (coco, labelme, yolo):
        again = [filled(np.reshape(p, (-1, 2)) - 0.5, 16, 20) for p in polygons]
        np.testing.assert_array_equal(np.sum(again, axis=0), expected)


def test_a_png_is_white_above_the_level() -> None:
    valid = np.ones((16, 20), bool)
    valid[5] = False
    picture = Image.open(io.BytesIO(to_png(RING * 0.7, valid)))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), np.where((RING > 0) & valid, 255, 0))
