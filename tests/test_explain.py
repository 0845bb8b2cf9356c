"""Explanations of an inspection: asked for only, of the framed picture, alone, beside the same answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import textured, write_good
from fettle.detector import Detector, Inspected
from fettle.errors import UsageError
from fettle.protocols import Explains, Explanation

TINY = {"backbone": "tiny", "weights": "random", "size": 64}


class Brightest:
    """Explains with the brightest pixel of each picture, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def __call__(self, pictures: Tensor, valid: Tensor) -> Explanation:
        assert not torch.is_grad_enabled()
        assert valid.shape == (len(pictures), 1, *pictures.shape[-2:]) and valid.dtype == torch.bool
        self.shown.append(pictures)
        grey = pictures.mean(dim=1)
        spot = (grey == grey.amax(dim=(1, 2), keepdim=True)).float()
        maps = {"spot": spot, "error": 2 * spot}
        return Explanation(maps, {"calls": len(self.shown)}, "A toy.", {"negative": 1 - pictures})


def spotted(path: Path, row: int, column: int, height: int = 64, width: int = 64) -> Path:
    """A dark textured picture with one white block of 4 x 4 px."""
    pixels = textured(900, height, width) // 2
    pixels[row : row + 4, column : column + 4] = 255
    Image.fromarray(pixels).save(path)
    return path


def fitted(good: Path, **more: object) -> Detector:
    return Detector.fit(good, **{**TINY, "settings": {"bank_rows": 200}, **more})


def with_explanations(detector: Detector) -> Brightest:
    toy = Brightest()
    detector.method.explain = toy  # type: ignore[attr-defined]
    assert isinstance(detector.method, Explains)
    return toy


def inspect(detector: Detector, *paths: Path, explain: bool = False, batch_size: int = 8) -> list[Inspected]:
    answers = list(detector.inspect_items(paths, lambda p: p, explain=explain, batch_size=batch_size))
    assert all(isinstance(answer, Inspected) for answer in answers)
    return answers  # type: ignore[return-value]


def test_nothing_is_explained_unless_asked_for(good_folder: Path) -> None:
    detector = fitted(good_folder)
    toy = with_explanations(detector)
    paths = sorted(good_folder.iterdir())[:3]
    plain = inspect(detector, *paths)
    assert toy.shown == [] and all(answer.explained is None for answer in plain)
    assert all("explain" not in answer.inspection.seconds for answer in plain)
    told = inspect(detector, *paths, explain=True)
    assert len(toy.shown) == 3 and all(answer.explained is not None for answer in told)
    for one, other in zip(plain, told, strict=True):
        assert one.inspection.score == other.inspection.score
        assert np.array_equal(one.inspection.anomaly_map, other.inspection.anomaly_map)
        assert other.inspection.seconds["explain"] > 0


def test_maps_lie_on_the_framed_picture(good_folder: Path, tmp_path: Path) -> None:
    detector = fitted(good_folder, frame="pad")
    with_explanations(detector)
    (answer,) = inspect(detector, spotted(tmp_path / "a.png", 8, 40, 32, 64), explain=True)
    shown = answer.explained
    assert shown is not None
    assert shown.view.shape == (64, 64, 3) and shown.view.dtype == np.uint8
    assert shown.valid[16:48].all() and not shown.valid[:16].any() and not shown.valid[48:].any()
    assert set(map(tuple, np.argwhere(shown.maps["spot"] == 1))) == {
        (16 + 8 + i, 40 + j) for i in range(4) for j in range(4)
    }
    assert (shown.view[shown.maps["spot"] == 1] == 255).all()
    assert shown.maps["error"].max() == 2 and shown.words == "A toy."


def test_pictures_are_in_colour_and_in_the_frame(good_folder: Path, tmp_path: Path) -> None:
    detector = fitted(good_folder, frame="pad")
    with_explanations(detector)
    (answer,) = inspect(detector, spotted(tmp_path / "a.png", 8, 40, 32, 64), explain=True)
    assert answer.explained is not None
    assert set(answer.explained.pictures) == {"negative"}
    assert np.array_equal(answer.explained.pictures["negative"], 255 - answer.explained.view)


def test_each_picture_is_explained_alone(good_folder: Path) -> None:
    detector = fitted(good_folder)
    toy = with_explanations(detector)
    inspect(detector, *sorted(good_folder.iterdir())[:5], explain=True, batch_size=4)
    assert [len(pictures) for pictures in toy.shown] == [1] * 5


def test_of_tiles_the_one_with_the_highest_score_is_explained(tmp_path: Path) -> None:
    """A picture that was learnt from, but for a block that only the last of 3 x 4 tiles shows."""
    good = write_good(tmp_path / "good", 20, height=150, width=200)
    detector = fitted(good, frame="tile", target_frr=0.1, settings={"bank_rows": 20_000})
    with_explanations(detector)
    pixels = textured(0, 150, 200)
    pixels[130:146, 180:196] = 255 - pixels[130:146, 180:196]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (answer,) = inspect(detector, tmp_path / "a.png", explain=True)
    assert answer.explained is not None
    assert np.array_equal(answer.explained.view, pixels[86:, 136:])
    assert "explained: tile 12 of 12, which has the highest score" in answer.inspection.notes


def test_a_method_that_cannot_explain_says_so_before_the_work(labelled_folder: Path) -> None:
    detector = fitted(labelled_folder)
    words = "'patchcore' cannot explain what it sees.*methods? that can: agpnet"
    with pytest.raises(UsageError, match=words):
        detector.inspect_items([Path("not read.png")], lambda p: p, explain=True)
    with pytest.raises(UsageError, match=words):
        detector.evaluate(labelled_folder, explain=True)


def test_an_evaluation_gives_explanations_to_its_listener(labelled_folder: Path) -> None:
    detector = fitted(labelled_folder)
    with_explanations(detector)
    answers: list[Inspected] = []
    told = detector.evaluate(labelled_folder, explain=True, each=lambda answer, mask: answers.append(answer))
    assert len(answers) == 12 and all(answer.explained is not None for answer in answers)
    plain = detector.evaluate(labelled_folder)
    assert told["image_auroc"] == plain["image_auroc"] and told["pixel_ap"] == plain["pixel_ap"]
