"""What a model keeps for refiners: saved, loaded, recalibrated, and used in an inspection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from conftest import textured, write_good
from fettle.calibration import pixel_statistic, pixel_threshold
from fettle.detector import Detector
from fettle.errors import ModelFolderError, UsageError
from fettle.inspection import Inspection
from fettle.model_folder import read_model, write_model
from fettle.refine.facts import stand_in_facts
from fettle.refining import ForRefiners

SIDE = 64
FIT: dict[str, Any] = {
    **{"method": "padim", "backbone": "tiny", "weights": "random", "size": SIDE},
    **{"settings": {"channels": 12}, "refine_refs": 6},
}


def scratched() -> NDArray[np.uint8]:
    pixels = textured(900)
    pixels[20:28, 16:36] = 255 - pixels[20:28, 16:36]
    return cast("NDArray[np.uint8]", pixels)


# --- in a model


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector.fit(write_good(tmp_path_factory.mktemp("fitted") / "good", 20), **FIT)


def kept(detector: Detector) -> ForRefiners:
    assert detector.for_refiners is not None
    return detector.for_refiners


def test_a_fit_keeps_as_many_references_as_it_is_asked_for(fitted: Detector) -> None:
    references = kept(fitted).references
    assert references is not None and len(references.pixels) == 6
    assert kept(fitted).facts.measured and kept(fitted).facts.noise_floor is not None


def test_the_same_seed_learns_the_same(fitted: Detector, tmp_path: Path) -> None:
    again = Detector.fit(write_good(tmp_path / "good", 20), **FIT)
    assert kept(again).facts == kept(fitted).facts
    one, other = kept(again).references, kept(fitted).references
    assert one is not None and other is not None and torch.equal(one.pixels, other.pixels)


def test_saved_and_loaded_they_are_the_same_bits(fitted: Detector, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    loaded = kept(Detector.load(tmp_path / "model"))
    assert loaded.facts == kept(fitted).facts
    one, other = loaded.references, kept(fitted).references
    assert one is not None and other is not None
    assert torch.equal(one.pixels, other.pixels) and torch.equal(one.valid, other.valid)


def test_without_references_a_model_holds_no_file_of_them(tmp_path: Path) -> None:
    detector = Detector.fit(write_good(tmp_path / "good", 6), **{**FIT, "refine_refs": 0})
    detector.save(tmp_path / "model")
    assert not list((tmp_path / "model").glob("references*"))
    loaded = kept(Detector.load(tmp_path / "model"))
    assert loaded.references is None and loaded.facts == kept(detector).facts


@pytest.mark.parametrize("count", [-1, 257])
def test_a_number_of_references_that_no_model_holds_is_refused(count: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="refine_refs"):
        Detector.fit(tmp_path, refine_refs=count)


def rewrite(folder: Path, *, without: Sequence[str] = (), **tensors: dict[str, Tensor]) -> None:
    """The same model with other content, under hashes that agree."""
    stored = read_model(folder)
    content = {name: value for name, value in stored.content.items() if name not in without}
    parts = {name: state for name, state in stored.tensors.items() if name not in without}
    write_model(folder, content, {**parts, **tensors})


def test_a_model_of_a_former_version_refines_with_stand_ins(fitted: Detector, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    rewrite(tmp_path / "model", without=("refine", "references"))
    old = Detector.load(tmp_path / "model")
    assert old.for_refiners is None
    refiner = old.refiner("f2pad", everything=True)
    assert refiner is not None and refiner.references is None
    assert refiner.facts == stand_in_facts(old.calibration.pixel_threshold)
    assert refiner.describe()["facts_measured"] is False
    Image.fromarray(scratched()).save(tmp_path / "bad.png")
    (answer,) = old.inspect([tmp_path / "bad.png"], refine=refiner)
    assert isinstance(answer, Inspection) and answer.refinement is not None
    assert answer.refinement["refined"] != "error"
    assert answer.refinement["fill"] == "diffusion"
    assert any("never measured" in note for note in answer.refinement["notes"])
    old.save(tmp_path / "again")
    assert Detector.load(tmp_path / "again").for_refiners is None


def test_damaged_references_are_refused(fitted: Detector, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    references = kept(fitted).references
    assert references is not None
    state = references.state()
    for wrong in (
        {"pixels": state["pixels"].float(), "valid": state["valid"]},
        {"pixels": state["pixels"], "valid": state["valid"][:2]},
        {"pixels": state["pixels"]},
    ):
        rewrite(tmp_path / "model", references=wrong)
        with pytest.raises(ModelFolderError, match="reference pictures are damaged"):
            Detector.load(tmp_path / "model")


def test_damaged_facts_are_refused(fitted: Detector, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    stored = read_model(tmp_path / "model")
    facts = cast("dict[str, Any]", stored.content["refine"])
    for wrong in ({**facts, "peak": -1}, {**facts, "lighter": {}}, {**facts, "more": 1}, [1]):
        for content in ({"refine": wrong}, {"product_refine": {"nut": wrong}}):
            write_model(tmp_path / "model", {**stored.content, **content}, stored.tensors)
            with pytest.raises(ModelFolderError, match="damaged"):
                Detector.load(tmp_path / "model")


def test_what_should_be_kept_by_product_must_be_an_object(fitted: Detector, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    stored = read_model(tmp_path / "model")
    for key in ("product_refine", "product_calibrations"):
        write_model(tmp_path / "model", {**stored.content, key: [1]}, stored.tensors)
        with pytest.raises(ModelFolderError, match="damaged"):
            Detector.load(tmp_path / "model")


def test_a_model_written_before_products_had_facts_loads(fitted: Detector, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    rewrite(tmp_path / "model", without=("product_refine",))
    assert kept(Detector.load(tmp_path / "model")).product_facts == {}


# --- recalibrated


def test_a_recalibration_keeps_references_and_sets_numbers_anew(fitted: Detector, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    rng = np.random.default_rng(0)
    noisy = [textured(500 + i).astype(int) + rng.integers(-30, 31, (SIDE, SIDE, 3)) for i in range(10)]
    fresh.mkdir()
    for i, pixels in enumerate(noisy):
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(fresh / f"{i}.png")
    moved = fitted.recalibrated(fresh)
    facts, former = kept(moved).facts, kept(fitted).facts
    assert kept(moved).references is kept(fitted).references
    assert facts.noise_floor == former.noise_floor
    assert facts.measured and facts.roi_high > 1.2 * former.roi_high and facts.peak > former.peak
    refiner = moved.refiner("blur", everything=True)
    paths = sorted(fresh.iterdir())
    found = [one for one in moved.inspect(paths, refine=refiner) if isinstance(one, Inspection)]
    statistics = [pixel_statistic(one.anomaly_map, one.valid) for one in found]
    own = pixel_threshold(statistics, moved.calibration.alpha_reject)[0]
    assert own == pytest.approx(moved.calibration.pixel_threshold, rel=1e-4)
    assert kept(fitted).facts == former  # the old one is as it was


def test_a_recalibrated_model_of_a_former_version_stays_without(fitted: Detector, tmp_path: Path) -> None:
    old = Detector(fitted.method, fitted.frame, fitted.calibration, fitted.card, "cpu")
    moved = old.recalibrated(write_good(tmp_path / "fresh", 6, first_seed=500))
    assert moved.for_refiners is None


# --- in an inspection


@pytest.fixture(scope="module")
def inspected(fitted: Detector, tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, list[Path]]:
    """A good picture, and one with a defect of 8 x 20 px."""
    folder = tmp_path_factory.mktemp("inspected")
    Image.fromarray(scratched()).save(folder / "bad.png")
    return fitted, [write_good(folder / "good", 1) / "000.png", folder / "bad.png"]


def test_f2pad_by_name_outlines_a_defect(inspected: tuple[Detector, list[Path]]) -> None:
    detector, paths = inspected
    plain = [one for one in detector.inspect(paths) if isinstance(one, Inspection)]
    found = [one for one in detector.inspect(paths, refine="f2pad") if isinstance(one, Inspection)]
    assert [(one.score, one.verdict) for one in found] == [(one.score, one.verdict) for one in plain]
    bad, base = found[1], plain[1]
    assert bad.refinement is not None and bad.refinement["applied"], bad.refinement
    true = np.zeros((64, 64), bool)
    true[20:28, 16:36] = True

    def overlap(marks: NDArray[np.bool_]) -> float:
        return float((marks & true).sum() / (marks | true).sum())

    threshold = detector.calibration.pixel_threshold
    assert threshold is not None
    assert overlap(bad.marks(threshold)) > max(0.5, overlap(base.marks(threshold)))
    assert bad.seconds["refine"] > 0


@pytest.mark.parametrize("name", ["blur", "guided", "difference"])
def test_refined_pictures_ignore_their_batch_mates(inspected: tuple[Detector, list[Path]], name: str) -> None:
    detector, paths = inspected
    order = [paths[1], *([paths[0]] * 2), paths[1]]
    refiner = detector.refiner(name, everything=True)
    alone = list(detector.inspect(order[:1], refine=refiner, batch_size=1))
    together = list(detector.inspect(order, refine=refiner, batch_size=8))
    for one in (together[0], together[3]):
        assert isinstance(one, Inspection) and isinstance(alone[0], Inspection)
        np.testing.assert_allclose(one.anomaly_map, alone[0].anomaly_map, rtol=1e-4, atol=1e-5)
        assert one.score == pytest.approx(alone[0].score, rel=1e-6)


def test_no_refiner_is_no_refiner(inspected: tuple[Detector, list[Path]]) -> None:
    detector, paths = inspected
    assert detector.refiner("none") is None
    (plain,), (none,) = detector.inspect(paths[1:]), detector.inspect(paths[1:], refine="none")
    assert isinstance(plain, Inspection) and isinstance(none, Inspection)
    assert none.refinement is None
    np.testing.assert_array_equal(plain.anomaly_map, none.anomaly_map)


def test_an_unknown_refiner_is_refused_with_the_nearest(inspected: tuple[Detector, list[Path]]) -> None:
    detector, paths = inspected
    with pytest.raises(UsageError, match=r"no refiner 'f2pat'.*f2pad"):
        next(iter(detector.inspect(paths, refine="f2pat")))
