"""How a refiner is built into an inspection: who is refined, what becomes of it, what stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fettle.calibration import Calibration, RegionRules, calibrate, find_regions
from fettle.images.framing import Frame
from fettle.inspecting import Inspected, Inspector
from fettle.inspection import Inspection, Verdict
from fettle.protocols import Maps
from fettle.refine.f2pad import Refined
from fettle.refine.record import RefineRecord
from fettle.sampling import resize_map

HEIGHT, WIDTH = 48, 64
REVIEW, REJECT, PIXEL = 0.3, 0.6, 0.5
FRAME = Frame(mode="stretch", height=HEIGHT, width=WIDTH)


class Grey:
    """The map is the picture's grey value in 0..1, the score the largest of it."""

    def __call__(self, pictures: Tensor, valid: Tensor) -> Maps:
        anomaly_map = pictures.mean(dim=1) * valid[:, 0]
        return Maps(anomaly_map, anomaly_map.flatten(1).amax(dim=1))


class Known(NamedTuple):
    """What a stub finds in one view: soft mask, and where it speaks; (H, W)."""

    soft: NDArray[np.float32]
    speaks: NDArray[np.bool_]


@dataclass
class Stub:
    """A refiner whose answers are known: the map is doubled where the mask is."""

    find: Callable[[NDArray[np.float32]], Known | None]  # of a view's map; None: nothing was applied
    everything: bool = False
    name: str = "f2pad"
    chosen: list[bool] = field(default_factory=list)
    maps: list[NDArray[np.float32]] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)

    def __call__(
        self,
        method: object,
        views: Tensor,
        valid: Tensor,
        base_maps: Tensor,
        chosen: Sequence[bool],
        pictures: Sequence[int],
        products: Sequence[str],
    ) -> list[Refined]:
        parts = (views, valid, base_maps, chosen, pictures, products)
        assert len({len(part) for part in parts}) == 1
        self.chosen += chosen
        self.pictures += pictures
        self.maps += list(base_maps.numpy().copy())
        return [self._one(base, wanted) for base, wanted in zip(base_maps, chosen, strict=True)]

    def _one(self, base: Tensor, wanted: bool) -> Refined:
        if not wanted:
            return Refined(base, None, None, RefineRecord(refined="gate", gate_reason="verdict_ok"))
        known = self.find(base.numpy())
        if known is None:
            return Refined(base, None, None, RefineRecord(refined="empty_roi", seconds=0.125))
        soft, speaks = torch.from_numpy(known.soft), torch.from_numpy(known.speaks)
        record = RefineRecord(refined="yes", applied=True, roi_pixels=7, seconds=0.25)
        return Refined(base * (1 + soft), soft, speaks, record)


def block(
    rows: slice, columns: slice, shape: tuple[int, int] = (HEIGHT, WIDTH), value: float = 0.9
) -> NDArray[np.float32]:
    soft = np.zeros(shape, np.float32)
    soft[rows, columns] = value
    return soft


def everywhere(soft: NDArray[np.float32]) -> Stub:
    return Stub(lambda base: Known(soft, np.ones(soft.shape, bool)))


def calibration(pixel_threshold: float | None = PIXEL) -> Calibration:
    found = calibrate([0.1] * 99, mode="holdout", target_frr=0.01)
    return found.model_copy(
        update={"t_reject": REJECT, "t_review": REVIEW, "pixel_threshold": pixel_threshold}
    )


def grey(folder: Path, name: str, value: float, **blocks: tuple[slice, slice, float]) -> Path:
    """A plain picture of this grey value, with blocks of others."""
    return grey_of(folder, name, np.full((HEIGHT, WIDTH), value), **blocks)


def grey_of(folder: Path, name: str, values: NDArray[Any], **blocks: tuple[slice, slice, float]) -> Path:
    for rows, columns, value in blocks.values():
        values[rows, columns] = value
    pixels = np.rint(255 * values).astype(np.uint8)[..., None].repeat(3, axis=2)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def inspect(
    paths: Sequence[Path],
    refiner: Stub | None,
    *,
    frame: Frame = FRAME,
    own: Calibration | None = None,
    rules: RegionRules | None = None,
    batch_size: int = 8,
    folds: Sequence[Any] = (),
) -> list[Inspection]:
    used = own or calibration()
    inspector: Inspector[Path] = Inspector(
        methods=(Grey(), *folds),  # type: ignore[arg-type]  # what an inspection needs of a method
        frame=frame,
        device="cpu",
        path_of=lambda path: path,
        product_of=lambda path: "",
        calibration_of=lambda product: used,
        batch_size=batch_size,
        rules=rules or RegionRules(),
        refiner=refiner,  # type: ignore[arg-type]  # what an inspection needs of a refiner
    )
    answers = list(inspector.inspect(paths))
    assert all(isinstance(answer, Inspected) for answer in answers)
    return [answer.inspection for answer in answers]  # type: ignore[union-attr]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """One of each verdict."""
    return [grey(tmp_path, f"{i}.png", value) for i, value in enumerate((0.2, 0.4, 0.8))]


# --- who is refined


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_reviewed_and_rejected_pictures_are_refined_and_others_stay_bit_for_bit(
    three: list[Path], batch_size: int
) -> None:
    stub = everywhere(block(slice(8, 16), slice(8, 16)))
    plain, found = inspect(three, None), inspect(three, stub, batch_size=batch_size)
    assert [one.verdict for one in found] == [Verdict.OK, Verdict.REVIEW, Verdict.REJECT]
    assert stub.chosen == [False, True, True]
    np.testing.assert_array_equal(found[0].anomaly_map, plain[0].anomaly_map)
    assert (found[0].soft, found[0].regions) == (None, plain[0].regions)
    assert found[0].refinement is not None
    assert (found[0].refinement["refined"], found[0].refinement["gate_reason"]) == ("gate", "verdict_ok")
    assert "refine" not in found[0].seconds
    for one, other in zip(plain, found, strict=True):
        assert (one.score, one.verdict) == (other.score, other.verdict)
        assert one.refinement is None and one.soft is None and "refine" not in one.seconds


def test_all_pictures_are_refined_where_that_is_asked_for(three: list[Path]) -> None:
    stub = everywhere(block(slice(8, 16), slice(8, 16)))
    stub.everything = True
    found = inspect(three, stub)
    assert stub.chosen == [True] * 3
    assert [one.verdict for one in found] == [Verdict.OK, Verdict.REVIEW, Verdict.REJECT]
    assert all(one.soft is not None for one in found)


def test_the_refiner_gets_the_base_map(three: list[Path]) -> None:
    stub = everywhere(block(slice(8, 16), slice(8, 16)))
    inspect(three, stub)
    for got, value in zip(stub.maps, (0.2, 0.4, 0.8), strict=True):
        np.testing.assert_allclose(got, value, atol=1e-6)


def test_a_picture_without_a_finite_score_is_never_handed_over(tmp_path: Path) -> None:
    class Broken(Grey):
        def __call__(self, pictures: Tensor, valid: Tensor) -> Maps:
            maps = super().__call__(pictures, valid)
            return maps._replace(score=torch.where(maps.score > 0.7, torch.nan, maps.score))

    stub = everywhere(block(slice(8, 16), slice(8, 16)))
    stub.everything = True
    inspector: Inspector[Path] = Inspector(
        (Broken(),), FRAME, "cpu", lambda path: path, lambda path: "", lambda product: calibration(), 8,
        RegionRules(), refiner=stub,  # type: ignore[arg-type]
    )  # fmt: skip
    paths = [grey(tmp_path, "a.png", 0.4), grey(tmp_path, "b.png", 0.8)]
    answers = list(inspector.inspect(paths))
    assert [isinstance(answer, Inspected) for answer in answers] == [True, False]
    assert stub.chosen == [True, False]


def test_with_models_of_folds_their_verdict_chooses(three: list[Path]) -> None:
    """They find dark what the whole model finds bright."""
    scores = list(np.linspace(0.01, 0.5, 99))
    crossed = calibrate(scores, mode="cross", target_frr=0.01, folds=[i % 2 for i in range(99)])

    class Inverted(Grey):
        def __call__(self, pictures: Tensor, valid: Tensor) -> Maps:
            return super().__call__(1 - pictures, valid)

    stub = everywhere(block(slice(8, 16), slice(8, 16)))
    found = inspect(three, stub, own=crossed, folds=(Inverted(), Inverted()))
    assert [one.verdict for one in found] == [Verdict.REJECT, Verdict.REJECT, Verdict.OK]
    assert stub.chosen == [True, True, False]


# --- what becomes of it


def test_regions_and_marks_are_the_masks_and_not_the_thresholds(tmp_path: Path) -> None:
    """The map is above its threshold elsewhere, and in the mask it is below."""
    path = grey(tmp_path, "a.png", 0.1, wrong=(slice(30, 40), slice(40, 60), 0.8))
    place = (slice(8, 14), slice(20, 31))
    (found,) = inspect([path], everywhere(block(*place)))
    (region,) = found.regions
    assert (region.left, region.top, region.width, region.height) == (20, 8, 11, 6)
    assert region.area_px == 66
    inside = block(*place) > 0
    np.testing.assert_array_equal(found.marks(PIXEL), inside)
    assert region.peak == float(found.anomaly_map[inside].max()) < PIXEL
    assert found.soft is not None and found.soft.dtype == np.float32
    np.testing.assert_array_equal(found.soft, block(*place))


def test_the_map_is_the_refined_one(tmp_path: Path) -> None:
    path = grey(tmp_path, "a.png", 0.4)
    soft = block(slice(8, 14), slice(20, 31))
    (found,) = inspect([path], everywhere(soft))
    np.testing.assert_allclose(found.anomaly_map, 0.4 * (1 + soft), atol=1e-6)
    assert found.score == pytest.approx(0.4)


def test_region_rules_hold_for_refined_regions(tmp_path: Path) -> None:
    path = grey(tmp_path, "a.png", 0.4)
    soft = block(slice(8, 14), slice(20, 31))
    soft[40:42, 2:4] = 1
    rules = RegionRules(min_area_px=5, mm_per_pixel=0.5)
    (found,) = inspect([path], everywhere(soft), rules=rules)
    assert [(region.area_px, region.area_mm2) for region in found.regions] == [(66, 16.5)]


def test_where_a_mask_does_not_speak_the_threshold_does(tmp_path: Path) -> None:
    """Two defects of one grey value: one is refined, the other was refused."""
    path = grey(
        tmp_path,
        "a.png",
        0.1,
        one=(slice(8, 20), slice(8, 20), 0.8),
        other=(slice(30, 40), slice(40, 60), 0.8),
    )
    soft = block(slice(10, 14), slice(10, 14))
    speaks = np.ones((HEIGHT, WIDTH), bool)
    speaks[:, 32:] = False
    (found,) = inspect([path], Stub(lambda base: Known(soft, speaks)))
    expected = soft > 0
    expected[30:40, 40:60] = True
    np.testing.assert_array_equal(found.marks(PIXEL), expected)
    assert sorted(region.area_px for region in found.regions) == [16, 200]
    assert found.regions == find_regions(found.anomaly_map, found.valid, np.inf, marked=expected)


def test_without_a_pixel_threshold_the_mask_alone_marks(tmp_path: Path) -> None:
    path = grey(tmp_path, "a.png", 0.1, other=(slice(30, 40), slice(40, 60), 0.8))
    own = calibration(pixel_threshold=None)
    (plain,) = inspect([path], None, own=own)
    (found,) = inspect([path], everywhere(block(slice(8, 14), slice(20, 31))), own=own)
    assert plain.regions == ()
    assert [region.area_px for region in found.regions] == [66]
    speaks = np.zeros((HEIGHT, WIDTH), bool)
    speaks[:20] = True
    soft = block(slice(8, 14), slice(20, 31))
    (silent,) = inspect([path], Stub(lambda base: Known(soft, speaks)), own=own)
    assert [region.area_px for region in silent.regions] == [66]


def test_where_nothing_was_applied_the_base_stands_bit_for_bit(three: list[Path]) -> None:
    plain = inspect(three, None)
    found = inspect(three, Stub(lambda base: None))
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        assert other.soft is None and one.regions == other.regions
        np.testing.assert_array_equal(one.marks(PIXEL), other.marks(PIXEL))


def test_the_record_is_json_with_the_refiners_name(three: list[Path]) -> None:
    found = inspect(three, everywhere(block(slice(8, 14), slice(20, 31))))
    for one in found:
        again = json.loads(json.dumps(one.refinement, allow_nan=False))
        assert again["refiner"] == "f2pad"
    assert isinstance(found[1].refinement, Mapping)
    assert {name: found[1].refinement[name] for name in ("refined", "applied", "roi_pixels")} == {
        "refined": "yes",
        "applied": True,
        "roi_pixels": 7,
    }


def test_the_time_of_a_refinement_is_told(three: list[Path]) -> None:
    found = inspect(three, everywhere(block(slice(8, 14), slice(20, 31))))
    assert [one.seconds.get("refine") for one in found] == [None, 0.25, 0.25]
    refused = inspect(three, Stub(lambda base: None))
    assert [one.seconds.get("refine") for one in refused] == [None, 0.125, 0.125]


# --- frames


def test_a_padded_frames_mask_comes_back_to_the_picture(tmp_path: Path) -> None:
    """48 x 96 px shown at half size in the middle of 64 x 48, and nothing of the padding comes along."""
    path = grey_of(tmp_path, "a.png", np.full((48, 96), 0.4))
    soft = np.random.default_rng(0).random((64, 48)).astype(np.float32)
    frame = Frame(mode="pad", height=64, width=48)
    (found,) = inspect([path], everywhere(soft), frame=frame)
    expected = resize_map(np.ascontiguousarray(soft[20:44]), 48, 96)
    np.testing.assert_allclose(found.soft, expected, atol=1e-6)
    np.testing.assert_array_equal(found.marks(PIXEL), expected > 0.5)
    assert sum(region.area_px for region in found.regions) == int((expected > 0.5).sum())


def test_nothing_is_marked_outside_the_region_of_interest(tmp_path: Path) -> None:
    frame = FRAME.model_copy(update={"roi": (0.0, 0.0, 0.5, 1.0)})
    path = grey(tmp_path, "a.png", 0.4)
    (found,) = inspect([path], everywhere(np.ones((HEIGHT, WIDTH), np.float32)), frame=frame)
    marks = found.marks(PIXEL)
    assert marks[:, :32].all() and not marks[:, 32:].any()
    assert found.soft is not None and not found.soft[:, 32:].any()
    assert sum(region.area_px for region in found.regions) == HEIGHT * 32


def test_tiles_masks_join_to_the_pictures(tmp_path: Path) -> None:
    """Every tile gives its part of one mask: blended where tiles overlap, it is that mask."""
    path = grey_of(tmp_path, "a.png", np.random.default_rng(0).uniform(0.2, 0.9, (64, 96)))
    whole = block(slice(10, 40), slice(20, 70), (64, 96))
    frame = Frame(mode="tile", height=32, width=32, overlap=8)
    shown = np.asarray(Image.open(path), np.float32)[..., 0] / 255

    def part(base: NDArray[np.float32]) -> Known:
        views = np.lib.stride_tricks.sliding_window_view(shown, (32, 32))
        top, left = np.argwhere(np.abs(views - base).max(axis=(2, 3)) < 1e-4)[0]
        return Known(whole[top : top + 32, left : left + 32].copy(), np.ones((32, 32), bool))

    stub = Stub(part)
    (found,) = inspect([path], stub, frame=frame)
    assert len(stub.chosen) == 12 and all(stub.chosen) and stub.pictures == [0] * 12
    np.testing.assert_allclose(found.soft, whole, atol=1e-6)
    np.testing.assert_array_equal(found.marks(PIXEL), whole > 0)
    assert [region.area_px for region in found.regions] == [1500]
    assert found.seconds["refine"] == 12 * 0.25


def test_a_tile_that_was_not_refined_keeps_the_threshold(tmp_path: Path) -> None:
    """Two tiles side by side, each with a defect; only the left one's is refined."""
    path = grey_of(tmp_path, "a.png", np.full((32, 64), 0.1))
    values = np.asarray(Image.open(path), np.float32)[..., 0] / 255
    values[4:10, 4:10], values[20:28, 40:56] = 0.7, 0.8
    grey_of(tmp_path, "a.png", values)
    soft = block(slice(5, 8), slice(5, 8), (32, 32))
    frame = Frame(mode="tile", height=32, width=32, overlap=0)
    stub = Stub(lambda base: Known(soft, np.ones((32, 32), bool)) if base.max() < 0.75 else None)
    (found,) = inspect([path], stub, frame=frame)
    expected = np.zeros((32, 64), bool)
    expected[5:8, 5:8] = expected[20:28, 40:56] = True
    np.testing.assert_array_equal(found.marks(PIXEL), expected)
    assert found.refinement is not None
    assert (found.refinement["refined"], found.refinement["applied"]) == ("yes", True)
    assert found.refinement["notes"] == ["1 of 2 tiles were refined."]
    assert found.refinement["seconds"] == found.seconds["refine"] == 0.375


def test_a_mask_is_whole_where_a_tile_beside_it_was_not_refined(tmp_path: Path) -> None:
    """Two tiles that share 16 columns, with a defect across all of them: only the left one's is refined."""
    values = np.full((32, 48), 0.1)
    values[8:16, 12:34] = 0.8  # and the left tile, columns 0 to 31, marks what it has of that
    values[20:24, 40:44] = 0.9  # seen by the right tile only
    path = grey_of(tmp_path, "a.png", values)
    soft = block(slice(8, 16), slice(12, 32), (32, 32), value=0.6)
    frame = Frame(mode="tile", height=32, width=32, overlap=16)
    stub = Stub(lambda base: Known(soft, np.ones((32, 32), bool)) if base.max() < 0.85 else None)
    (found,) = inspect([path], stub, frame=frame)
    expected = values > 0.5
    np.testing.assert_array_equal(found.marks(PIXEL), expected)
    assert sorted(region.area_px for region in found.regions) == [16, 176]
