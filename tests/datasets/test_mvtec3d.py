"""MVTec 3D-AD: colour pictures are read, points are named, validation pictures serve neither side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fettle.datasets import open_dataset
from fettle.errors import DataError
from fettle.images.decode import read_mask, read_picture


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def shot(folder: Path, number: int, mask: bool) -> None:
    """One scan: colour, points and, where asked, a mask that marks something outside of good/."""
    rng = np.random.default_rng(number)
    save(folder / f"rgb/{number:03d}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    save(folder / f"xyz/{number:03d}.tiff", rng.normal(size=(16, 16)).astype(np.float32))
    if mask:
        marked = np.full((16, 16), 0 if folder.name == "good" else 255, np.uint8)
        save(folder / f"gt/{number:03d}.png", marked)


@pytest.fixture
def bagel(tmp_path: Path) -> Path:
    root = tmp_path / "bagel"
    for i in range(3):
        shot(root / "train/good", i, mask=False)
    for part, defect, number, mask in (
        ("validation", "good", 10, False),
        ("validation", "good", 11, False),
        ("test", "good", 20, True),
        ("test", "hole", 30, True),
        ("test", "hole", 31, True),
    ):
        shot(root / part / defect, number, mask)
    (root / "calibration").mkdir()
    (root / "calibration/camera_parameters.json").write_text("{}")
    return root


def test_splits_labels_and_product(bagel: Path) -> None:
    dataset = open_dataset(bagel)
    assert dataset.layout == "mvtec3d"
    assert Counter((r.split, r.defect) for r in dataset.records) == {
        ("train", "good"): 3,
        ("validation", "good"): 2,
        ("test", "good"): 1,
        ("test", "hole"): 2,
    }
    assert {r.product for r in dataset.records} == {"bagel"}
    assert {r.path.parent.name for r in dataset.records} == {"rgb"}
    assert [r.path for r in dataset.records] == sorted(r.path for r in dataset.records)


def test_validation_pictures_are_neither_learnt_from_nor_tested_on(bagel: Path) -> None:
    dataset = open_dataset(bagel)
    assert {r.path.stem for r in dataset.good_for_training()} == {"000", "001", "002"}
    assert {r.path.stem for r in dataset.for_testing()} == {"020", "030", "031"}


def test_masks_belong_to_defects_only(bagel: Path) -> None:
    records = {r.path.stem: r for r in open_dataset(bagel).records}
    assert records["030"].mask == bagel / "test/hole/gt/030.png"
    assert records["020"].mask is None
    assert read_mask(bagel / "test/hole/gt/030.png", read_picture(records["030"].path).size)[0].all()


def test_a_defect_without_a_mask_has_none(bagel: Path) -> None:
    (bagel / "test/hole/gt/031.png").unlink()
    assert {r.path.stem: r.mask for r in open_dataset(bagel).records}["031"] is None


def test_points_are_named_where_they_are(bagel: Path) -> None:
    (bagel / "train/good/xyz/001.tiff").unlink()
    records = {r.path.stem: r for r in open_dataset(bagel).records}
    assert records["000"].columns == {"xyz": (bagel / "train/good/xyz/000.tiff").as_posix()}
    assert records["001"].columns == {}


def test_mvtec_with_a_folder_named_rgb_stays_mvtec(tmp_path: Path) -> None:
    shot(tmp_path / "train/good", 0, mask=False)
    (tmp_path / "ground_truth").mkdir()
    assert open_dataset(tmp_path).layout == "mvtec"


@pytest.mark.parametrize("part", ["train", "validation"])
def test_defects_outside_of_test_are_refused(bagel: Path, part: str) -> None:
    shot(bagel / part / "hole", 40, mask=True)
    with pytest.raises(DataError, match=rf"{part}' holds 'hole'.*Move it to 'test/hole'"):
        open_dataset(bagel)


def test_pictures_outside_of_the_layout_are_refused(bagel: Path) -> None:
    save(bagel / "test/hole/40.png", np.zeros((16, 16), np.uint8))
    with pytest.raises(DataError, match=r"40\.png' stands outside of DEFECT/rgb.*test/DEFECT/rgb'"):
        open_dataset(bagel)


def test_the_layout_by_name_needs_colour_pictures(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((16, 16), np.uint8))
    with pytest.raises(DataError, match="has no train/good/rgb"):
        open_dataset(tmp_path, "mvtec3d")
    (tmp_path / "train/good/rgb").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no pictures"):
        open_dataset(tmp_path, "mvtec3d")
    with pytest.raises(DataError, match="a file where a folder is meant"):
        open_dataset(tmp_path / "a.png", "mvtec3d")


def test_a_folder_of_such_products_is_not_taken_for_good_pictures(bagel: Path) -> None:
    with pytest.raises(DataError, match=r"holds several products \(bagel\)"):
        open_dataset(bagel.parent)
