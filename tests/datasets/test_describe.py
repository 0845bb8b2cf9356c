"""`describe` counts, finds what is wrong with the files, and measures shortcuts."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fettle.datasets import open_dataset
from fettle.datasets.describe import Description, Finding, describe


def texture(seed: int, brightness: float = 100.0) -> np.ndarray:
    """Blobs of a few pixels, so that thumbnails differ from picture to picture."""
    coarse = np.random.default_rng(seed).normal(size=(12, 12)) * 20 + brightness
    rough = Image.fromarray(coarse.astype(np.float32)).resize((96, 96), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(rough), 0, 255).astype(np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """12 good training, 6 good test, 6 defective test pictures; defective ones are brighter."""
    root = tmp_path / "nut"
    for i in range(12):
        save(root / f"train/good/{i}.png", texture(i))
    for i in range(6):
        save(root / f"test/good/{i}.png", texture(100 + i))
        save(root / f"test/dent/{i}.png", texture(200 + i, brightness=160))
        mask = np.zeros((96, 96), np.uint8)
        mask[10:20, 10:20] = 255
        save(root / f"ground_truth/dent/{i}_mask.png", mask)
    return root


def found(root: Path, kind: str) -> list[Finding]:
    return [finding for finding in describe(open_dataset(root)).findings if finding.kind == kind]


def names(finding: Finding) -> list[str]:
    return [Path(path).name for path in finding.paths]


def test_a_clean_set_has_no_findings(product: Path) -> None:
    description = describe(open_dataset(product))
    assert description.findings == ()
    assert [(c.split, c.label, c.pictures, c.masks) for c in description.counts] == [
        ("test", "dent", 6, 6),
        ("test", "good", 6, 0),
        ("train", "good", 12, 0),
    ]
    assert description.sizes == {"96x96": 24}
    assert description.modes == {"PNG L 8-bit": 24}


def test_description_is_plain_json(product: Path) -> None:
    plain = describe(open_dataset(product)).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["layout"] == "mvtec"


def test_text_tells_counts_scores_and_findings(product: Path) -> None:
    (product / "train/good/3.png").write_bytes(b"")
    text = describe(open_dataset(product)).to_text()
    for line in ("nut test dent: 6, 6 with a mask", "nut train good: 12", "96x96: 23", "brightness: 1.00"):
        assert f"\n  {line}\n" in text
    assert "Findings: 1\n  unreadable: '" in text and "a shortcut" in text


def test_text_is_bounded_and_says_so(product: Path) -> None:
    for i in range(30):
        (product / f"train/good/bad{i}.png").write_bytes(b"")
    text = describe(open_dataset(product)).to_text()
    assert text.count("unreadable: ") == 20 and "and 10 more" in text


def test_an_unreadable_picture_is_one_finding(product: Path) -> None:
    (product / "train/good/3.png").write_bytes(b"")
    (product / "test/dent/2.png").write_bytes((product / "test/dent/1.png").read_bytes()[:200])
    findings = found(product, "unreadable")
    assert [names(f) for f in findings] == [["2.png"], ["3.png"]]
    assert "truncated" in findings[0].message and "empty (0 bytes)" in findings[1].message


def test_equal_pixels_are_found_whatever_the_file(product: Path) -> None:
    save(product / "train/good/copy.bmp", texture(3))
    (finding,) = found(product, "duplicate")
    assert names(finding) == ["3.png", "copy.bmp"]


def test_equal_pixels_in_both_parts_are_leakage(product: Path) -> None:
    save(product / "test/dent/copy.png", texture(3))
    save(product / "ground_truth/dent/copy_mask.png", np.full((96, 96), 255, np.uint8))
    (finding,) = found(product, "leakage")
    assert sorted(names(finding)) == ["3.png", "copy.png"]
    assert "different labels" in finding.message and "in training and in test" in finding.message


@pytest.mark.parametrize("how", ["encoded anew", "lit anew", "enlarged"])
def test_a_near_copy_in_test_is_found(product: Path, how: str) -> None:
    array = texture(3)
    path = product / "test/good/copy.png"
    if how == "encoded anew":
        save(path.with_suffix(".jpg"), array, quality=70)
    elif how == "lit anew":
        save(path, np.clip(array * 1.1 + 8, 0, 255).astype(np.uint8))
    else:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(array).resize((150, 150), Image.Resampling.BICUBIC).save(path)
    (finding,) = found(product, "near_duplicate")
    assert names(finding)[0] == "3.png" and names(finding)[1].startswith("copy")


def test_alike_parts_in_one_place_are_no_copies(tmp_path: Path) -> None:
    part = np.full((96, 96), 30, np.uint8)
    part[20:70, 30:60] = 200
    for i in range(12):
        save(tmp_path / f"train/good/{i}.png", part // 2 + texture(i) // 2)
        save(tmp_path / f"test/good/{i}.png", part // 2 + texture(50 + i) // 2)
    assert found(tmp_path, "near_duplicate") == []


def test_flat_pictures_are_no_copies_of_each_other(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"train/good/{i}.png", np.full((20, 20), 100 + i, np.uint8))
        save(tmp_path / f"test/good/{i}.png", np.full((20, 20), 110 + i, np.uint8))
    assert found(tmp_path, "near_duplicate") == []


def test_mask_troubles_are_told_apart(product: Path) -> None:
    masks = product / "ground_truth/dent"
    save(masks / "0_mask.png", np.full((90, 96), 255, np.uint8))
    save(masks / "1_mask.png", np.zeros((96, 96), np.uint8))
    (masks / "2_mask.png").write_bytes(b"nothing")
    (masks / "3_mask.png").unlink()
    save(masks / "99_mask.png", np.zeros((96, 96), np.uint8))
    findings = describe(open_dataset(product)).findings
    by_kind = {f.kind: f for f in findings}
    assert Counter(f.kind for f in findings) == {
        "mask_size": 1,
        "mask_empty": 1,
        "mask_unreadable": 1,
        "mask_missing": 1,
        "mask_orphan": 1,
    }
    assert by_kind["mask_size"].message == "The mask is 96x90 px, its picture 96x96 px."
    assert names(by_kind["mask_missing"]) == ["3.png"]
    assert names(by_kind["mask_orphan"]) == ["99_mask.png"]


def test_no_masks_at_all_is_one_finding(product: Path) -> None:
    for path in (product / "ground_truth/dent").iterdir():
        path.unlink()
    (finding,) = found(product, "mask_missing")
    assert "None of the 6 defective pictures has a mask" in finding.message


def test_orphan_masks_of_the_magnetic_tile_layout(tmp_path: Path) -> None:
    save(tmp_path / "MT_Free/Imgs/exp1_num_1.jpg", texture(0))
    save(tmp_path / "MT_Free/Imgs/exp1_num_1.png", np.zeros((96, 96), np.uint8))
    save(tmp_path / "MT_Crack/Imgs/exp1_num_9.png", np.zeros((96, 96), np.uint8))
    (finding,) = found(tmp_path, "mask_orphan")
    assert names(finding) == ["exp1_num_9.png"]


def test_good_picture_with_a_drawn_mask_is_found(tmp_path: Path) -> None:
    save(tmp_path / "a.png", texture(0))
    save(tmp_path / "m.png", np.full((96, 96), 255, np.uint8))
    (tmp_path / "list.csv").write_text("path,label,mask,split,product\na.png,good,m.png,,\n")
    assert len(found(tmp_path / "list.csv", "good_with_mask")) == 1


def test_brightness_shortcut_is_measured_and_told(product: Path) -> None:
    description = describe(open_dataset(product))
    scores = description.trivial_scores["nut"]
    assert scores["brightness"] == 1.0 and scores["height"] == 0.5
    assert (
        "In the test part of 'nut', brightness alone has an AUROC of 1.00: a shortcut."
        in description.warnings
    )


def test_nearest_pixels_is_the_distance_to_the_nearest_training_picture(tmp_path: Path) -> None:
    for i, level in enumerate((50, 200)):
        save(tmp_path / f"train/good/{i}.png", np.full((20, 20), level, np.uint8))
    for i, level in enumerate((52, 198)):
        save(tmp_path / f"test/good/{i}.png", np.full((20, 20), level, np.uint8))
    save(tmp_path / "test/dent/0.png", np.full((20, 20), 125, np.uint8))
    scores = describe(open_dataset(tmp_path)).trivial_scores[tmp_path.name]
    assert scores["nearest_pixels"] == 1.0  # far from both training pictures
    assert scores["distance_to_mean"] == 0.0  # and just at their mean


def test_training_and_test_recorded_differently_is_told(tmp_path: Path) -> None:
    for i in range(8):
        save(tmp_path / f"train/good/{i}.png", texture(i))
        save(tmp_path / f"test/good/{i}.png", texture(50 + i, brightness=60))
    description = describe(open_dataset(tmp_path))
    assert description.shift[tmp_path.name]["brightness"] == 0.0
    assert any("will not hold on the other" in warning for warning in description.warnings)


def test_a_folder_without_defects_has_no_trivial_scores(tmp_path: Path) -> None:
    save(tmp_path / "a.png", texture(0))
    scores = describe(open_dataset(tmp_path)).trivial_scores[""]
    assert set(scores.values()) == {None} and len(scores) == 6


def test_progress_counts_every_picture(product: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    describe(open_dataset(product), lambda what, done, total: calls.append((what, done, total)))
    assert calls == [("describe", i, 24) for i in range(1, 25)]


def real(name: str) -> Description:
    folder = os.environ.get("FETTLE_DATA")
    if not folder:
        pytest.skip("FETTLE_DATA is not set: real pictures are not at hand")
    return describe(open_dataset(Path(folder) / name))


@pytest.mark.parametrize(
    ("name", "product", "expected"),
    [
        ("screw", "screw", (0.37, 0.17, 1.00, 0.95, 0.93, 0.50)),
        ("split_magnetic_tile.csv", "magnetic_tile", (0.54, 0.58, 0.52, 0.48, 0.47, 0.42)),
        ("battery_weld", "battery_weld", (0.63, 0.87, 0.33, 0.65, 0.72, 0.50)),
        ("fabric", "fabric", (0.72, 0.83, 0.63, 0.62, 0.60, 0.50)),
    ],
)
def test_real_sets_have_their_documented_shortcuts(
    name: str, product: str, expected: tuple[float, ...]
) -> None:
    description = real(name)
    assert tuple(description.trivial_scores[product].values()) == pytest.approx(expected, abs=0.006)
    kinds = {finding.kind for finding in description.findings}
    assert kinds <= {"mask_missing"}  # four of the magnetic tile have none
