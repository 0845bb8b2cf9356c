"""Layouts that are made of others: which picture goes where, and what becomes of its mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fettle.bench.layouts import pasted_layout, turned_layout
from fettle.datasets.open import open_dataset


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "made"))
    (tmp_path / "made").mkdir()


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def layout(root: Path) -> Path:
    """5 good pictures to learn from, 1 good and 3 defective ones to test, with masks."""
    for number in range(5):
        save(root / "train" / "good" / f"{number}.png", picture(number))
    save(root / "test" / "good" / "5.png", picture(5))
    for number in (6, 7, 8):
        save(root / "test" / "dent" / f"{number}.png", picture(number))
        save(root / "ground_truth" / "dent" / f"{number}_mask.png", mask(number))
    return root


def mask(number: int) -> np.ndarray:
    inside = np.zeros((12, 20), np.uint8)
    inside[2:5, number : number + 4] = 255
    return inside


def test_turned_pictures_keep_their_pixels_kinds_and_masks(tmp_path: Path) -> None:
    source = open_dataset(layout(tmp_path / "parts"))
    turned = open_dataset(turned_layout(source, "parts"))
    before = [*source.good_for_training(), *source.for_testing()]
    assert [len(turned.good_for_training()), len(turned.for_testing())] == [5, 4]
    after = {record.path.stem: record for record in turned.records}
    for number, old in enumerate(before):
        new = after[f"{number:04d}"]
        assert new.defect == old.defect
        np.testing.assert_array_equal(
            np.asarray(Image.open(new.path)), np.rot90(np.asarray(Image.open(old.path)), number % 4)
        )
        if not old.is_good:
            assert old.mask is not None and new.mask is not None
            np.testing.assert_array_equal(
                np.asarray(Image.open(new.mask)), np.rot90(np.asarray(Image.open(old.mask)), number % 4)
            )


def test_pasted_layout_keeps_every_third_picture_for_the_test(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        save(path, picture(number))
    made = open_dataset(pasted_layout(paths, "parts"))
    assert sorted(r.path.stem for r in made.good_for_training()) == ["1", "2", "4", "5"]
    tested = made.for_testing()
    assert sorted(r.path.stem for r in tested if r.is_good) == ["0", "3", "6"]
    for record in tested:
        if not record.is_good:
            assert record.mask is not None
            changed = np.asarray(Image.open(record.path)) != picture(int(record.path.stem))
            np.testing.assert_array_equal(changed.any(axis=2), np.asarray(Image.open(record.mask)) > 0)


def test_a_layout_is_made_once(tmp_path: Path) -> None:
    source = open_dataset(layout(tmp_path / "parts"))
    first = turned_layout(source, "parts")
    marker = first / "marker"
    marker.touch()
    assert turned_layout(source, "parts") == first and marker.exists()
