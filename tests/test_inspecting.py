"""What a method remarks on a picture becomes a note of it: of the view with the highest score, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

from conftest import textured, write_good
from fettle.detector import Detector
from fettle.inspection import Inspection
from fettle.protocols import Maps

TINY = {"backbone": "tiny", "weights": "random", "size": 64, "settings": {"bank_rows": 200}}


class Remarking(nn.Module):
    """A fitted method that also remarks on the brightest value of each view."""

    def __init__(self, method: nn.Module, remark: Callable[[Sequence[float]], tuple[str, ...]]) -> None:
        super().__init__()
        self.method = method
        self.remark = remark

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        maps: Maps = self.method(pictures, valid)
        return maps._replace(remarks=(255 * pictures).round().amax(dim=(2, 3)))


def in_words(numbers: Sequence[float]) -> tuple[str, ...]:
    assert all(type(number) is float for number in numbers)
    return ("brightest:", *(f"{number:.0f}" for number in numbers))


def notes(detector: Detector, *paths: Path, batch_size: int = 8) -> list[tuple[str, ...]]:
    answers = list(detector.inspect(paths, batch_size=batch_size))
    assert all(isinstance(answer, Inspection) for answer in answers)
    return [answer.notes for answer in answers]  # type: ignore[union-attr]


def expected(path: Path) -> tuple[str, ...]:
    return ("brightest:", *(str(value) for value in np.asarray(Image.open(path)).max(axis=(0, 1))))


def test_each_picture_has_its_own_remarks_whatever_its_batch(good_folder: Path) -> None:
    detector = Detector.fit(good_folder, **TINY)
    detector.method = Remarking(detector.method, in_words)  # type: ignore[assignment]
    paths = sorted(good_folder.iterdir())[:5]
    assert notes(detector, *paths, batch_size=2) == [expected(path) for path in paths]


def test_of_tiles_the_one_with_the_highest_score_is_remarked_on(tmp_path: Path) -> None:
    """The last of 3 x 4 tiles alone shows a block, and another is the brightest."""
    good = write_good(tmp_path / "good", 20, height=150, width=200)
    detector = Detector.fit(good, **{**TINY, "frame": "tile", "settings": {"bank_rows": 20_000}})
    detector.method = Remarking(detector.method, in_words)  # type: ignore[assignment]
    pixels = textured(0, 150, 200)
    pixels[0, 0] = 255
    pixels[130:146, 180:196] = 3
    Image.fromarray(pixels).save(tmp_path / "a.png")
    scores = pixels[86:, 136:].max(axis=(0, 1))
    assert notes(detector, tmp_path / "a.png") == [("brightest:", *map(str, scores))]


def test_numbers_of_a_method_without_words_are_left(good_folder: Path) -> None:
    detector = Detector.fit(good_folder, **TINY)
    detector.method = Remarking(detector.method, in_words)  # type: ignore[assignment]
    del detector.method.remark  # type: ignore[attr-defined]
    assert notes(detector, good_folder / "000.png") == [()]


def test_words_without_numbers_are_never_asked_for(good_folder: Path) -> None:
    detector = Detector.fit(good_folder, **TINY)
    detector.method.remark = in_words  # type: ignore[attr-defined]
    assert notes(detector, good_folder / "000.png") == [()]


def test_the_models_of_folds_remark_nothing(good_folder: Path) -> None:
    detector = Detector.fit(good_folder, **{**TINY, "calibration": "cross"})
    plain = notes(detector, good_folder / "000.png")
    detector.fold_methods = tuple(Remarking(fold, in_words) for fold in detector.fold_methods)  # type: ignore[assignment,arg-type]
    assert notes(detector, good_folder / "000.png") == plain == [()]
