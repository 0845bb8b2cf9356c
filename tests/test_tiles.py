"""Large pictures in overlapping tiles, from the fit to the map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import textured, write_good
from fettle.detector import Detector
from fettle.errors import UsageError
from fettle.inspection import Inspection

TINY = {"backbone": "tiny", "weights": "random", "size": 64, "frame": "tile", "target_frr": 0.1}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("large"), 20, height=150, width=200)


@pytest.fixture(scope="module")
def detector(large: Path) -> Detector:
    return Detector.fit(large, **TINY)


def inspect(detector: Detector, *paths: Path, batch_size: int = 8) -> list[Inspection]:
    found = list(detector.inspect(paths, batch_size=batch_size))
    assert all(isinstance(answer, Inspection) for answer in found)
    return found  # type: ignore[return-value]


def scratched(folder: Path, name: str, top: int, left: int) -> Path:
    pixels = textured(700, 150, 200)
    pixels[top : top + 8, left : left + 30] = 255 - pixels[top : top + 8, left : left + 30]
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def test_each_picture_counts_once_however_many_tiles_it_has(detector: Detector) -> None:
    assert detector.num_fit == detector.calibration.num_scores == 20


def test_defect_is_found_where_it_is_also_across_a_seam(detector: Detector, tmp_path: Path) -> None:
    for top, left in ((20, 30), (60, 50), (120, 150)):
        (answer,) = inspect(detector, scratched(tmp_path, f"{top}.png", top, left))
        assert answer.anomaly_map.shape == (150, 200)
        row, column = np.unravel_index(answer.anomaly_map.argmax(), answer.anomaly_map.shape)
        assert top - 8 <= row <= top + 16
        assert left - 8 <= column <= left + 38


def test_batch_size_and_batch_mates_change_nothing(detector: Detector, large: Path, tmp_path: Path) -> None:
    defect = scratched(tmp_path, "defect.png", 60, 50)
    (alone,) = inspect(detector, defect, batch_size=1)
    together = inspect(detector, large / "000.png", defect, large / "001.png", batch_size=32)[1]
    assert together.score == pytest.approx(alone.score, rel=1e-5)
    np.testing.assert_allclose(together.anomaly_map, alone.anomaly_map, rtol=1e-4, atol=1e-5)


def test_picture_smaller_than_a_tile_is_padded(detector: Detector, tmp_path: Path) -> None:
    Image.fromarray(textured(5, 40, 50)).save(tmp_path / "small.png")
    (answer,) = inspect(detector, tmp_path / "small.png")
    assert answer.anomaly_map.shape == (40, 50)


def test_method_bound_to_positions_refuses_tiles(large: Path) -> None:
    with pytest.raises(UsageError, match="cannot take tiles"):
        Detector.fit(large, method="padim", settings={"channels": 12}, **TINY)


@pytest.mark.slow
def test_real_large_screws_in_tiles(real_data: Path) -> None:
    """Native 1024 px screws: the map's peak lies on each labelled defect in most pictures."""
    from fettle.datasets.open import open_dataset
    from fettle.images.decode import read_mask

    dataset = open_dataset(real_data / "extra" / "screw_1024")
    detector = Detector.fit(dataset, frame="tile", size=512)
    defective = [record for record in dataset.for_testing() if not record.is_good][:3]
    answers = inspect(detector, *[record.path for record in defective])
    on_screw = 0
    for record, answer in zip(defective, answers, strict=True):
        assert record.mask is not None
        mask, _ = read_mask(record.mask, (1024, 1024))
        assert answer.anomaly_map.shape == mask.shape
        on_screw += float(answer.anomaly_map[mask].mean()) > float(answer.anomaly_map[~mask].mean())
    assert on_screw == len(defective)
