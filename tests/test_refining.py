"""What a fit learns of good pictures for refiners, and a recalibration anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from conftest import textured, write_good
from fettle import refining as module
from fettle.calibration import Calibration, calibrate, pixel_statistic, pixel_threshold
from fettle.datasets.folder import open_folder
from fettle.detector import Detector
from fettle.feature_stream import GoodPicture
from fettle.gathering import gather_good
from fettle.images.decode import read_picture
from fettle.images.framing import Frame
from fettle.judged import Calibrations, HeldOut, Judged, gather_judged
from fettle.layers.energy_scale import EnergyScale
from fettle.protocols import LeftOut, Maps, no_progress
from fettle.refine.blur import light_blur
from fettle.refine.facts import RefineFacts, stand_in_facts
from fettle.refine.guided import guided_map
from fettle.refining import ForRefiners, learn_for_refiners, raw_scale, relearn_for_refiners

SIDE = 64
FRAME = Frame(mode="stretch", height=SIDE, width=SIDE)
FIT: dict[str, Any] = {
    **{"method": "padim", "backbone": "tiny", "weights": "random", "size": SIDE},
    **{"settings": {"channels": 12}, "refine_refs": 6},
}


def save(folder: Path, *pictures: NDArray[np.uint8]) -> Path:
    folder.mkdir(parents=True)
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def pictures_of(folder: Path) -> list[GoodPicture]:
    found = gather_good(open_folder(folder), None, no_progress).pictures
    return sorted(found, key=lambda picture: picture.path.name)


def energies(count: int, grid: int = 8, seed: int = 0) -> Tensor:
    """Raw energies (count, grid, grid), positive, about 5."""
    return 5 + torch.rand(count, grid, grid, generator=torch.Generator().manual_seed(seed))


def judged_of(pictures: Sequence[GoodPicture], raw: Tensor) -> Judged:
    """As if their maps were their energies: each picture's statistic is the largest of them."""
    judged = Judged()
    for picture, grid in zip(pictures, raw, strict=True):
        judged.keys.append(picture.key)
        judged.groups.append(picture.group)
        judged.scores.append(float(grid.max()))
        judged.pixel_statistics.append(float(grid.max()))
        judged.held_out.append(HeldOut(picture.key, (grid,), float(grid.median())))
    judged.energies = raw.flatten()
    return judged


def calibration_of(judged: Judged, **changed: object) -> Calibration:
    found = calibrate(judged.scores, mode="holdout", target_frr=0.1, pixel_statistics=judged.pixel_statistics)
    return found.model_copy(update=changed)


def learn(
    pictures: Sequence[GoodPicture],
    judged: Judged,
    calibration: Calibration,
    *,
    frame: Frame = FRAME,
    num_references: int = 32,
    by_product: dict[str, Calibration] | None = None,
) -> ForRefiners:
    return learn_for_refiners(
        pictures,
        judged,
        Calibrations(calibration, by_product or {}),
        frame,
        num_references=num_references,
        generator=torch.Generator().manual_seed(0),
        progress=no_progress,
        scale=raw_scale(judged),
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[GoodPicture]:
    return pictures_of(write_good(tmp_path_factory.mktemp("refining") / "good", 12))


@pytest.fixture(scope="module")
def learnt(good: list[GoodPicture]) -> tuple[Judged, Calibration, ForRefiners]:
    judged = judged_of(good, energies(12))
    calibration = calibration_of(judged)
    return judged, calibration, learn(good, judged, calibration)


# --- the numbers


def test_numbers_are_those_of_the_good_pictures(
    learnt: tuple[Judged, Calibration, ForRefiners],
) -> None:
    judged, calibration, (facts, *_) = learnt
    scale = raw_scale(judged)
    raw = energies(12)
    middle, rare = np.median(raw.numpy()), np.quantile(raw.numpy(), 0.99)
    assert float(scale(torch.tensor(float(middle)))) == pytest.approx(0, abs=0.01)
    assert float(scale(torch.tensor(float(rare)))) == pytest.approx(1, abs=0.01)
    peaks = [float(scale(grid).max()) for grid in raw]
    assert facts.roi_high == pytest.approx(np.quantile(peaks, 0.9), rel=1e-6)
    assert facts.peak == pytest.approx(4 * np.median(judged.pixel_statistics), rel=1e-6)
    assert facts.measured and not facts.flat
    assert calibration.pixel_threshold is not None and facts.peak > calibration.pixel_threshold


def test_f2pad_takes_the_bound_of_the_energies_that_it_sees(good: list[GoodPicture]) -> None:
    """Without a bound on them the bound of regions is that of the peaks there, GrabCut's stays that of the
    bounded ones; and each product has its own."""
    judged = judged_of(good, energies(12))
    loud = 3 * energies(12, seed=5) - 10
    judged.held_out = [
        one._replace(unbounded=(grid,)) for one, grid in zip(judged.held_out, loud, strict=True)
    ]
    calibration, scale = calibration_of(judged), raw_scale(judged)
    (facts, *_) = learn(good, judged, calibration)
    assert facts.roi_high_unbounded == pytest.approx(
        np.quantile([float(scale(grid).max()) for grid in loud], 0.9), rel=1e-6
    )
    assert facts.roi_high_unbounded > 1.5 * facts.roi_high
    assert facts.with_references(None).roi_high == facts.roi_high_unbounded
    half = [replace(picture, product="a" if i % 2 else "b") for i, picture in enumerate(good)]
    own = learn(half, judged, calibration, by_product={"a": calibration, "b": calibration}).product_facts
    peaks = [float(scale(grid).max()) for grid in loud[1::2]]
    assert own["a"].roi_high_unbounded == pytest.approx(np.quantile(peaks, 0.9), rel=1e-6)


def test_without_other_energies_there_is_one_bound(
    learnt: tuple[Judged, Calibration, ForRefiners],
) -> None:
    facts = learnt[2].facts
    assert facts.roi_high_unbounded is None
    assert facts.with_references(None).roi_high == facts.roi_high


@pytest.mark.parametrize("name", ["blur", "guided"])
def test_a_lighter_maps_own_threshold_falls_on_the_base_maps(
    name: str, good: list[GoodPicture], learnt: tuple[Judged, Calibration, ForRefiners]
) -> None:
    """Made here anew from pictures and energies; and a typical patch falls on the typical pixel."""
    judged, calibration, (facts, *_) = learnt
    scale = raw_scale(judged)
    statistics = []
    for picture, grid in zip(good, energies(12), strict=True):
        placed = FRAME.place(read_picture(picture.path))
        view, valid = torch.from_numpy(placed.views), torch.from_numpy(placed.valid)
        z = scale(grid[None])
        lighter = light_blur(z, valid) if name == "blur" else guided_map(z, view, valid)
        values = facts.lighter[name].factor * lighter + facts.lighter[name].offset  # type: ignore[index]
        statistics.append(pixel_statistic(values[0].numpy(), np.ones((SIDE, SIDE), bool)))
    found = pixel_threshold(statistics, calibration.alpha_reject)[0]
    assert found == pytest.approx(calibration.pixel_threshold, rel=1e-5)
    typical = np.median([one.map_median for one in judged.held_out])
    assert facts.lighter[name].offset == pytest.approx(typical)  # type: ignore[index]


def test_refined_maps_keep_what_the_threshold_marks_where_good_pictures_differ_much(
    good: list[GoodPicture],
) -> None:
    """One good picture's map is a hundred times the others': so is the threshold."""
    judged = judged_of(good, energies(12))
    judged.pixel_statistics[3] *= 100
    calibration = calibration_of(judged)
    assert calibration.pixel_threshold == judged.pixel_statistics[3]
    assert learn(good, judged, calibration).facts.peak > calibration.pixel_threshold


def test_energies_that_are_all_alike_are_told(good: list[GoodPicture]) -> None:
    judged = judged_of(good, torch.full((12, 8, 8), 5.0))
    facts = learn(good, judged, calibration_of(judged)).facts
    assert facts.flat and facts.measured
    assert facts.roi_high == 1.0


def test_without_judged_pictures_numbers_are_stand_ins(good: list[GoodPicture]) -> None:
    calibration = calibrate([], mode="none")
    facts, references, _ = learn(good, Judged(), calibration)
    assert not facts.measured
    assert facts.model_copy(update={"noise_floor": None}) == stand_in_facts(None)
    assert facts.noise_floor is not None and references is not None  # these need no judge


def test_pixels_outside_the_region_of_interest_are_in_no_number(good: list[GoodPicture]) -> None:
    frame = FRAME.model_copy(update={"roi": (0.0, 0.0, 0.5, 1.0)})
    raw = energies(12)
    spoilt = raw.clone()
    spoilt[:, :, 4:] = 1000
    found = []
    for own in (raw, spoilt):
        judged = judged_of(good, raw)
        judged.held_out = [
            one._replace(energies=(grid,)) for one, grid in zip(judged.held_out, own, strict=True)
        ]
        found.append(learn(good, judged, calibration_of(judged), frame=frame).facts)
    assert found[0] == found[1]


def test_pictures_that_were_held_out_are_measured_however_many_others_there_are(
    good: list[GoodPicture], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = sorted(good, key=lambda picture: picture.key)[-4:]
    judged = judged_of(last, 10 * energies(4))
    monkeypatch.setattr(module, "_MOST_LOOKED_AT", 3)
    facts, references, _ = learn(good, judged, calibration_of(judged))
    scale = raw_scale(judged)
    peaks = [float(scale(10 * grid).max()) for grid in energies(4)]
    assert facts.measured and facts.roi_high == pytest.approx(np.quantile(peaks, 0.9), rel=1e-6)
    assert references is not None and len(references.pixels) == 3 + 4


# --- reference pictures and their differences


def shown(references: Tensor | None) -> set[bytes]:
    assert references is not None
    return {picture.permute(1, 2, 0).numpy().tobytes() for picture in references}


def test_references_are_good_pictures_as_they_are(
    good: list[GoodPicture], learnt: tuple[Judged, Calibration, ForRefiners]
) -> None:
    references = learnt[2].references
    assert references is not None and references.valid.all()
    files = {np.asarray(Image.open(picture.path)).tobytes() for picture in good}
    assert shown(references.pixels) == files
    assert learnt[2].facts.noise_floor is not None


def test_a_rejected_picture_is_no_reference(tmp_path: Path) -> None:
    """A white one among good ones: as unlike them as can be, so the first to be chosen otherwise."""
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pictures = pictures_of(save(tmp_path / "good", *(textured(i) for i in range(7)), white))
    judged = judged_of(pictures, energies(8))
    judged.scores[7] = 90.0
    trusting = calibration_of(judged, t_reject=None)
    strict = calibration_of(judged, t_reject=50.0)
    known = learn(pictures, judged, trusting, num_references=4).references
    kept = learn(pictures, judged, strict, num_references=4).references
    assert known is not None and white.tobytes() in shown(known.pixels)
    assert kept is not None and white.tobytes() not in shown(kept.pixels)
    assert len(kept.pixels) == 4


def test_none_asked_for_are_none(good: list[GoodPicture]) -> None:
    judged = judged_of(good, energies(12))
    facts, references, _ = learn(good, judged, calibration_of(judged), num_references=0)
    assert references is None and facts.measured
    assert facts.noise_floor is not None and facts.noise_floor > 0  # of fills by diffusion


@pytest.mark.parametrize("side", [SIDE, 96])
def test_a_disc_is_never_filled_from_its_own_picture(side: int, tmp_path: Path) -> None:
    """Of pictures of pure noise no other shows the same. At 96 px a picture is four tiles that overlap."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2)]
    pictures = pictures_of(save(tmp_path / "good", *noise))
    frame = FRAME if side == SIDE else Frame(mode="tile", height=SIDE, width=SIDE, overlap=16)
    judged = judged_of(pictures, energies(2))
    judged.held_out.clear()
    facts, references, _ = learn(pictures, judged, calibration_of(judged), frame=frame)
    assert references is not None and len(references.pixels) == (2 if side == SIDE else 8)
    assert facts.noise_floor is not None and facts.noise_floor > 0.5


def test_a_small_region_of_interest_costs_the_difference_and_not_the_fit(tmp_path: Path) -> None:
    detector = Detector.fit(write_good(tmp_path / "good", 6), **FIT, roi=(0.45, 0.45, 0.55, 0.55))
    assert detector.for_refiners is not None
    assert detector.for_refiners.facts.noise_floor is None
    assert detector.for_refiners.references is not None


def test_tiles_give_references_and_numbers(tmp_path: Path) -> None:
    detector = Detector.fit(
        write_good(tmp_path / "good", 6, height=96, width=130),
        **{**FIT, "method": "patchcore", "settings": {"bank_rows": 500}, "frame": "tile"},
    )
    assert detector.for_refiners is not None and detector.for_refiners.facts.measured
    references = detector.for_refiners.references
    assert references is not None and references.pixels.shape == (6, 3, SIDE, SIDE)


# --- what is judged


def test_held_out_pictures_keep_their_energies_as_they_are() -> None:
    """Two pictures, the second in two tiles of which one half is not valid."""
    valid = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    half = valid.clone()
    half[..., 8:] = False
    grids = energies(3, grid=2)

    def view(key: str, number: int, inside: Tensor) -> LeftOut:
        values = torch.full((1, 16, 16), float(number)) * inside[:, 0]
        grid = grids[number : number + 1]
        loud = None if key == "a" else 2 * grid
        return LeftOut(key, key, Maps(values, values.flatten(1).amax(1)), inside, grid, loud)

    judged = gather_judged([view("a", 0, valid), view("b", 1, half), view("b", 2, valid)], 2)
    assert [one.key for one in judged.held_out] == ["a", "b"]
    assert [len(one.energies) for one in judged.held_out] == [1, 2]
    assert torch.equal(judged.held_out[1].energies[0], grids[1])
    assert [len(one.unbounded) for one in judged.held_out] == [0, 2]
    assert torch.equal(judged.held_out[1].unbounded[1], 2 * grids[2])
    assert [one.map_median for one in judged.held_out] == [0.0, 2.0]
    expected = torch.cat([grids[0].flatten(), grids[1][:, :1].flatten(), grids[2].flatten()])
    assert judged.energies is not None
    assert torch.equal(judged.energies.sort().values, expected.sort().values)


# --- learnt anew


def test_relearning_equals_learning_but_for_the_references(good: list[GoodPicture]) -> None:
    judged = judged_of(good, energies(12, seed=3))
    calibration = calibration_of(judged)
    first = judged_of(good, energies(12))
    former = learn(good, first, calibration_of(first), num_references=4)
    shared = Calibrations(calibration, {})
    again = relearn_for_refiners(former, good, judged, shared, FRAME, raw_scale(judged))
    anew = learn(good, judged, calibration, num_references=4)
    assert again.facts == anew.facts.model_copy(update={"noise_floor": former.facts.noise_floor})
    assert again.references is former.references
    assert again.facts != former.facts


def test_settled_energies_are_taken_as_they_are(good: list[GoodPicture]) -> None:
    judged = judged_of(good, energies(12))
    settled = judged_of(good, raw_scale(judged)(energies(12)))
    settled.pixel_statistics = judged.pixel_statistics
    former = ForRefiners(stand_in_facts(None), None)
    shared = Calibrations(calibration_of(judged), {})
    raw = relearn_for_refiners(former, good, judged, shared, FRAME, raw_scale(judged))
    own = relearn_for_refiners(former, good, settled, shared, FRAME, EnergyScale())
    assert own.facts.roi_high == pytest.approx(raw.facts.roi_high, rel=1e-6)
    assert isinstance(own.facts, RefineFacts) and own.references is None


# --- of many products


def two_products(folder: Path) -> tuple[list[GoodPicture], Judged]:
    """Ten good pictures of each: smooth ones of low energies, and noisy ones of high."""
    rng = np.random.default_rng(0)
    smooth = [rng.integers(120, 124, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(10)]
    noisy = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(10)]
    pictures = [
        *(replace(one, product="smooth") for one in pictures_of(save(folder / "smooth", *smooth))),
        *(replace(one, product="noisy") for one in pictures_of(save(folder / "noisy", *noisy))),
    ]
    raw = energies(20)
    raw[10:] *= 3
    return pictures, judged_of(pictures, raw)


def calibrations_of(pictures: Sequence[GoodPicture], judged: Judged, *products: str) -> Calibrations:
    own = {
        name: calibration_of(judged.of({one.key for one in pictures if one.product == name}))
        for name in products
    }
    return Calibrations(calibration_of(judged), own)


def test_each_product_has_facts_of_its_own_pictures(tmp_path: Path) -> None:
    """One noise floor for all would be the noisy one's: no mask of a smooth part reached above it."""
    pictures, judged = two_products(tmp_path)
    both = calibrations_of(pictures, judged, "smooth", "noisy")
    found = learn(pictures, judged, both.shared, by_product=both.by_product)
    assert found.facts == learn(pictures, judged, both.shared).facts
    smooth, noisy = found.product_facts["smooth"], found.product_facts["noisy"]
    assert smooth.hold == both.by_product["smooth"].pixel_threshold
    assert noisy.hold == both.by_product["noisy"].pixel_threshold
    assert smooth.roi_high < noisy.roi_high and smooth.peak < noisy.peak
    assert smooth.noise_floor is not None and noisy.noise_floor is not None
    assert smooth.noise_floor < 0.1 * noisy.noise_floor
    assert smooth.lighter != noisy.lighter


def test_a_product_without_held_out_pictures_takes_the_facts_of_all(tmp_path: Path) -> None:
    pictures, judged = two_products(tmp_path)
    both = calibrations_of(pictures, judged, "smooth", "noisy")
    judged.held_out = judged.held_out[:10]
    found = learn(pictures, judged, both.shared, by_product=both.by_product)
    assert set(found.product_facts) == {"smooth"}


def test_fresh_pictures_of_one_product_change_its_facts_alone(tmp_path: Path) -> None:
    pictures, judged = two_products(tmp_path)
    both = calibrations_of(pictures, judged, "smooth", "noisy")
    former = learn(pictures, judged, both.shared, by_product=both.by_product)
    fresh = pictures[:10]
    own = judged_of(fresh, energies(10, seed=7))
    again = relearn_for_refiners(
        former,
        fresh,
        own,
        calibrations_of(fresh, own, "smooth"),
        FRAME,
        raw_scale(judged),
        keep_shared=True,
    )
    assert again.facts == former.facts
    assert again.product_facts["noisy"] == former.product_facts["noisy"]
    assert again.product_facts["smooth"] != former.product_facts["smooth"]
    assert again.product_facts["smooth"].noise_floor == former.product_facts["smooth"].noise_floor
