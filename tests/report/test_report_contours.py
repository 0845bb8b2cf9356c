"""Outlines beside a run folder: each format says the same of the pixels that are marked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fettle.inspection import Inspection, Verdict
from fettle.report.contours import FORMATS, ContourWriter

HEIGHT, WIDTH = 16, 20
BOX = (slice(4, 9), slice(3, 12))  # 5 rows, 9 columns


def values(*boxes: tuple[slice, slice], value: float = 0.9) -> NDArray[np.float32]:
    own = np.zeros((HEIGHT, WIDTH), np.float32)
    for place in boxes:
        own[place] = value
    return own


def inspection(
    path: str, anomaly_map: NDArray[np.float32], soft: NDArray[np.float32] | None = None
) -> Inspection:
    valid = np.ones((HEIGHT, WIDTH), bool)
    return Inspection(path, 0.9, Verdict.REJECT, (), anomaly_map, valid, soft=soft)


def write(out: Path, *inspections: Inspection, threshold: float | None = 0.5, formats: object = None) -> None:
    chosen = FORMATS if formats is None else formats
    with ContourWriter(out, chosen, threshold) as writer:  # type: ignore[arg-type]
        for one in inspections:
            writer.add(one)


def coco(out: Path) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = json.loads((out / "contours" / "coco.json").read_text())
    return found


def png(out: Path, name: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(out / "contours" / "png" / f"{name}.png"))


def files(out: Path) -> list[str]:
    return sorted(
        str(path.relative_to(out / "contours")) for path in (out / "contours").rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("refined", [False, True])
def test_all_formats_outline_what_is_marked(refined: bool, tmp_path: Path) -> None:
    """Where the map is above the threshold, or where the soft mask is, and then not where the map is."""
    one = inspection("lot/a.png", values(BOX))
    if refined:
        one = inspection("lot/a.png", values((slice(12, 15), slice(14, 19))), soft=values(BOX))
    write(tmp_path, one)
    assert files(tmp_path) == ["coco.json", "labelme/a.json", "png/a.png", "yolo/a.txt"]
    (annotation,) = coco(tmp_path)["annotations"]
    assert annotation["bbox"] == pytest.approx([3, 4, 9, 5], abs=0.2)
    assert annotation["area"] == 45
    (image,) = coco(tmp_path)["images"]
    assert (image["file_name"], image["width"], image["height"]) == ("lot/a.png", WIDTH, HEIGHT)
    (shape,) = json.loads((tmp_path / "contours" / "labelme" / "a.json").read_text())["shapes"]
    np.testing.assert_allclose(np.min(shape["points"], axis=0), [3, 4], atol=0.2)
    np.testing.assert_allclose(np.max(shape["points"], axis=0), [12, 9], atol=0.2)
    (line,) = (tmp_path / "contours" / "yolo" / "a.txt").read_text().splitlines()
    points = np.array(line.split()[1:], float).reshape(-1, 2) * (WIDTH, HEIGHT)
    np.testing.assert_allclose(points.max(axis=0), [12, 9], atol=0.2)
    np.testing.assert_array_equal(png(tmp_path, "a"), np.where(one.marks(0.5), 255, 0))
    assert int((png(tmp_path, "a") > 0).sum()) == 45


def test_small_regions_are_left_out_of_every_format(tmp_path: Path) -> None:
    one = inspection("a.png", values(BOX, (slice(12, 14), slice(15, 17))))  # 45 and 4 px
    with ContourWriter(tmp_path, FORMATS, 0.5, min_area_px=5) as writer:
        writer.add(one)
    assert [annotation["area"] for annotation in coco(tmp_path)["annotations"]] == [45]
    assert len((tmp_path / "contours" / "yolo" / "a.txt").read_text().splitlines()) == 1
    np.testing.assert_array_equal(png(tmp_path, "a") > 0, values(BOX) > 0)


def test_a_picture_without_a_region_is_in_each_format_too(tmp_path: Path) -> None:
    write(tmp_path, inspection("good.png", values()), inspection("bad.png", values(BOX)))
    assert [image["file_name"] for image in coco(tmp_path)["images"]] == ["good.png", "bad.png"]
    assert [annotation["image_id"] for annotation in coco(tmp_path)["annotations"]] == [2]
    assert (tmp_path / "contours" / "yolo" / "good.txt").read_text() == ""
    assert not png(tmp_path, "good").any()


def test_without_a_threshold_only_a_refiner_outlines(tmp_path: Path) -> None:
    plain, refined = inspection("a.png", values(BOX)), inspection("b.png", values(), soft=values(BOX))
    write(tmp_path, plain, refined, threshold=None)
    assert [annotation["image_id"] for annotation in coco(tmp_path)["annotations"]] == [2]
    assert not png(tmp_path, "a").any() and int((png(tmp_path, "b") > 0).sum()) == 45


def test_what_is_not_valid_is_outlined_nowhere(tmp_path: Path) -> None:
    valid = np.ones((HEIGHT, WIDTH), bool)
    valid[:, :6] = False
    write(tmp_path, replace(inspection("a.png", values(), soft=values(BOX)), valid=valid))
    (annotation,) = coco(tmp_path)["annotations"]
    assert annotation["area"] == int((png(tmp_path, "a") > 0).sum()) == 30


def test_labelme_finds_the_picture_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lot").mkdir()
    (tmp_path / "lot" / "a.png").write_bytes(b"here")
    monkeypatch.chdir(tmp_path)
    for path, out in (("lot/a.png", Path("run")), (str(tmp_path / "lot" / "a.png"), tmp_path / "run2")):
        write(out, inspection(path, values(BOX)))
        folder = out / "contours" / "labelme"
        named = json.loads((folder / "a.json").read_text())["imagePath"]
        assert not Path(named).is_absolute()
        assert (folder / named).read_bytes() == b"here"


def test_pictures_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    own = [values(BOX), values(), values((slice(0, 2), slice(0, 2)))]
    paths = ("one/a.png", "two/a.png", "three/a.jpg")
    write(tmp_path, *(inspection(path, one) for path, one in zip(paths, own, strict=True)), formats=["png"])
    assert files(tmp_path) == ["png/a.png", "png/a_2.png", "png/a_3.png"]
    assert [int((png(tmp_path, name) > 0).sum()) for name in ("a", "a_2", "a_3")] == [45, 0, 4]


def test_known_pictures_of_one_name_are_told_by_their_folders(tmp_path: Path) -> None:
    paths = [Path("dent/a.png"), Path("good/a.png"), Path("good/b.png")]
    with ContourWriter(tmp_path, ["png"], 0.5, paths=paths) as writer:
        for path in paths:
            writer.add(inspection(str(path), values(BOX)))
    assert files(tmp_path) == ["png/b.png", "png/dent_a.png", "png/good_a.png"]


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_formats_asked_for_are_written(name: str, tmp_path: Path) -> None:
    write(tmp_path, inspection("a.png", values(BOX)), formats=[name])
    (found,) = files(tmp_path)
    assert found.split(".")[0].split("/")[0] == name
    write(tmp_path / "none", inspection("a.png", values(BOX)), formats=[])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("formats", [["png"], []])
def test_a_former_runs_outlines_are_removed_and_other_files_stay(formats: list[str], tmp_path: Path) -> None:
    write(tmp_path, inspection("old.png", values(BOX)))
    (tmp_path / "contours" / "notes.md").write_text("mine")
    write(tmp_path, inspection("new.png", values(BOX)), formats=formats)
    assert files(tmp_path) == ["notes.md", *(["png/new.png"] if formats else [])]


def test_a_run_that_breaks_off_keeps_what_was_added(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        ContourWriter(tmp_path, ["coco", "yolo"], 0.5) as writer,
    ):
        writer.add(inspection("a.png", values(BOX)))
        raise RuntimeError("stop")
    assert [image["file_name"] for image in coco(tmp_path)["images"]] == ["a.png"]


def test_a_path_that_is_no_unicode_can_be_written(tmp_path: Path) -> None:
    write(tmp_path, inspection("lot/\udcff.png", values(BOX)))
    (image,) = coco(tmp_path)["images"]
    assert image["file_name"] == "lot/\\udcff.png"
    assert len(files(tmp_path)) == 4
