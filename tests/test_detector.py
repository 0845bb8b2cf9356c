"""The detector: fit, inspect, evaluate, recalibrate."""

from __future__ import annotations

import csv
import hashlib
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from conftest import textured, write_good
from fettle.calibration import find_regions
from fettle.calibration.regions import RegionRules
from fettle.datasets.open import open_dataset
from fettle.datasets.records import Record
from fettle.detector import Detector, Inspected
from fettle.errors import CalibrationError, DataError, FettleError, UsageError
from fettle.inspection import Inspection, Refusal, Verdict
from fettle.protocols import Json

KEYS = {
    *("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max"),
    *("aupro", "aupro_005", "frr_promised", "frr_measured", "escape_rate"),
    *("num_good", "num_defective", "seconds_per_image", "per_defect"),
}
TINY: dict[str, object] = {
    "backbone": "tiny",
    "weights": "random",
    "size": 64,
    "settings": {"bank_rows": 300},
}


def fit(good: Path | Sequence[Path], **more: object) -> Detector:
    return Detector.fit(good, **{**TINY, **more})


def scratched(seed: int, height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    pixels = textured(seed, height, width)
    pixels[height // 3 : height // 2, 8 : width - 8] = 255 - pixels[height // 3 : height // 2, 8 : width - 8]
    return cast("NDArray[np.uint8]", pixels)


def write_manifest(file: Path, rows: Sequence[Sequence[str]], *more: str) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label", "mask", "split", "product", *more), *rows])
    return file


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("module") / "good", 24)


@pytest.fixture(scope="module")
def detector(good: Path) -> Detector:
    """24 good pictures: enough to promise reviews, too few to promise rejects."""
    return fit(good)


@pytest.fixture(scope="module")
def strict_detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """99 tiny good pictures: a promise on rejects."""
    return fit(write_good(tmp_path_factory.mktemp("many"), 99, height=32, width=32), size=32)


# --- fit


def test_folder_layout_manifest_and_paths_learn_the_same(labelled_folder: Path, tmp_path: Path) -> None:
    train = labelled_folder / "train" / "good"
    paths = sorted(train.iterdir())
    test = sorted((labelled_folder / "test").rglob("*.png"))
    manifest = write_manifest(
        tmp_path / "list.csv",
        [(str(path), "good", "", "train", "plate") for path in paths]
        + [(str(path), "bad", "", "test", "plate") for path in test],
    )
    sources: list[Path | str | list[Path]] = [train, labelled_folder, str(manifest), paths, paths[::-1]]
    detectors = [Detector.fit(source, **TINY) for source in sources]
    picture = labelled_folder / "test" / "scratch" / "000.png"
    scores = set()
    for one in detectors:
        (answer,) = one.inspect([picture])
        assert isinstance(answer, Inspection)
        scores.add(answer.score)
        assert one.num_fit == 24 and one.calibration == detectors[0].calibration
    assert len(scores) == 1


def test_card_says_what_was_learnt(detector: Detector, good: Path) -> None:
    told = detector.describe()
    assert told["name"] == "patchcore on tiny" and told["seed"] == 0 and told["preset"] == "compact"
    data = cast("dict[str, Json]", told["data"])
    assert (data["pictures"], data["layout"], data["source"]) == (24, "folder", good.name)
    assert data["refused"] == [] and data["duplicates_left_out"] == 0
    assert cast("dict[str, Json]", told["backbone"])["sha256"] == "random"
    assert cast("dict[str, Json]", told["frame"])["reason"]
    assert "picture_keys" not in told
    assert told["promise"] == " ".join(detector.calibration.sentences())


def test_unreadable_good_picture_costs_itself_only(good: Path, detector: Detector, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    shutil.copytree(good, folder)
    (folder / "010a.png").write_bytes(b"no picture at all")
    whole = (good / "000.png").read_bytes()
    (folder / "010b.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    broken = fit(folder)
    assert broken.calibration == detector.calibration and broken.num_fit == 24
    refused = cast("list[dict[str, str]]", cast("dict[str, Json]", broken.card["data"])["refused"])
    assert sorted(Path(one["path"]).name for one in refused) == ["010a.png", "010b.png"]
    assert all(one["reason"] for one in refused)


def test_folder_of_broken_pictures_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"no good picture.*a\.png"):
        fit(tmp_path)


def test_unknown_setting_suggests_the_nearest(good: Path) -> None:
    with pytest.raises(UsageError, match=r"no setting 'metod'\. Did you mean 'method'\?"):
        fit(good, metod="padim")
    with pytest.raises(UsageError, match=r"no method 'patchcor'\. Did you mean 'patchcore'\?"):
        fit(good, method="patchcor")
    with pytest.raises(UsageError, match=r"no field 'bank'\. Did you mean 'bank_ro"):
        fit(good, settings={"bank": 3})
    with pytest.raises(UsageError, match=r"no preset 'smal'"):
        fit(good, preset="smal")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_frr", 0),
        ("target_frr", 1.5),
        ("seed", -1),
        ("size", 0),
        ("frame", "oval"),
        ("calibration", "no"),
    ],
)
def test_value_that_a_setting_does_not_take_is_named(good: Path, name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"setting '{name}' cannot be"):
        fit(good, **{name: value})


def test_size_that_is_no_multiple_names_the_nearest(good: Path) -> None:
    with pytest.raises(UsageError, match=r"Size 100 is no multiple of 32\. Use --size 96"):
        fit(good, size=100)


def test_group_column_makes_the_promise_count_groups(good: Path, tmp_path: Path) -> None:
    paths = sorted(good.iterdir())
    rows = [(str(path), "good", "", "", "", f"lot {i // 3}") for i, path in enumerate(paths)]
    manifest = write_manifest(tmp_path / "lots.csv", rows, "lot")
    found, asked = fit(manifest), fit(manifest, group="lot")
    assert found.calibration == asked.calibration
    assert (found.calibration.num_pictures, found.calibration.num_groups) == (24, 8)
    assert found.calibration.promise_on is None  # 8 lots are too few
    with pytest.raises(UsageError, match="no column 'lots'"):
        fit(manifest, group="lots")


def test_recalibration_groups_as_the_fit_did(good: Path, tmp_path: Path) -> None:
    def manifest(folder: Path, name: str) -> Path:
        rows = [
            (str(p), "good", "", "", "", f"tray {i // 5}") for i, p in enumerate(sorted(folder.iterdir()))
        ]
        return write_manifest(tmp_path / name, rows, "tray")

    detector = fit(manifest(good, "fit.csv"), group="tray")
    fresh = write_good(tmp_path / "fresh", 20, first_seed=6000)
    moved = detector.recalibrated(manifest(fresh, "fresh.csv"))
    assert (moved.calibration.num_pictures, moved.calibration.num_groups) == (20, 4)
    assert moved.calibration.promise_on is None and not moved.card["calibration_notes"]
    plain = detector.recalibrated(fresh)
    assert plain.calibration.num_groups is None
    assert any("fitted by 'tray', which these pictures lack" in warning for warning in plain.warnings())
    with pytest.raises(CalibrationError, match="4 groups of good pictures cannot promise"):
        detector.recalibrated(manifest(fresh, "fresh.csv"), strict=True)


def test_wrong_arguments_are_refused_at_once(detector: Detector, good: Path, tmp_path: Path) -> None:
    picture = good / "000.png"
    for one in (str(picture), picture):
        with pytest.raises(UsageError, match="One path is given"):
            detector.inspect(one)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="A batch of 0"):
        detector.inspect([picture], batch_size=0)
    with pytest.raises(UsageError, match="no refiner"):
        detector.inspect([picture], refine="nonsense")
    detector.save(tmp_path / "model")
    for call in (lambda: fit(good, device="gpu"), lambda: Detector.load(tmp_path / "model", device="gpu")):
        with pytest.raises(UsageError, match="The device 'gpu' cannot be used here"):
            call()


@pytest.mark.parametrize("mode", ["leave_one_out", "holdout", "kfold", "cross"])
def test_every_way_of_calibration_promises_and_finds_the_defect(
    good: Path, tmp_path: Path, mode: str
) -> None:
    detector = fit(good, calibration=mode, target_frr=0.2)
    assert detector.calibration.mode == mode
    assert detector.calibration.num_scores == (5 if mode == "holdout" else 24)  # a fifth is held out
    assert detector.num_fit == (19 if mode == "holdout" else 24)
    assert detector.calibration.promise_on == "reject"
    Image.fromarray(scratched(500)).save(tmp_path / "bad.png")
    Image.fromarray(textured(501)).save(tmp_path / "fine.png")
    detector.save(tmp_path / "model")
    for one in (detector, Detector.load(tmp_path / "model")):
        bad, fine = one.inspect([tmp_path / "bad.png", tmp_path / "fine.png"])
        assert isinstance(bad, Inspection) and isinstance(fine, Inspection)
        assert bad.verdict is Verdict.REJECT and bad.score > fine.score


def test_models_of_many_folds_keep_their_places_when_saved(tmp_path: Path) -> None:
    """Twelve folds: by name, fold10 would come before fold2."""
    detector = fit(write_good(tmp_path / "good", 12), calibration="cross", target_frr=0.1)
    assert len(detector.fold_methods) == 12
    detector.save(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model")
    for one, other in zip(detector.fold_methods, loaded.fold_methods, strict=True):
        first, second = one.state_dict(), other.state_dict()
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_strict_fit_fails_and_names_the_needed_count(good: Path) -> None:
    with pytest.raises(CalibrationError, match="at least 99 good pictures"):
        fit(good, strict=True)


def test_ninety_nine_good_pictures_promise_rejects(strict_detector: Detector) -> None:
    calibration = strict_detector.calibration
    assert calibration.promise_on == "reject" and calibration.frr_promised == 0.01
    assert calibration.t_reject is not None and calibration.t_review is not None
    assert calibration.t_reject >= calibration.t_review
    assert calibration.num_scores == calibration.needed == 99


def test_fresh_good_pictures_keep_the_promise(strict_detector: Detector, tmp_path: Path) -> None:
    """200 more of the same kind. A rank of 99 of 99 rejects at most 11 of them, 99 times in 100."""
    fresh = sorted(write_good(tmp_path / "fresh", 200, first_seed=5000, height=32, width=32).iterdir())
    answers = [a for a in strict_detector.inspect(fresh) if isinstance(a, Inspection)]
    assert len(answers) == 200
    assert sum(answer.verdict is Verdict.REJECT for answer in answers) <= 11
    assert sum(answer.verdict is not Verdict.OK for answer in answers) <= 30  # 5 % asked for reviews


def test_tiles_need_a_method_without_a_grid(good: Path) -> None:
    with pytest.raises(UsageError, match="cannot take tiles"):
        fit(good, frame="tile", method="padim", settings={"channels": 10})


def test_memory_bound_changes_speed_and_not_the_model(good: Path, detector: Detector) -> None:
    """Features that are not kept are computed again, and are the same."""
    small = fit(good, memory_mib=32, cache_mib=0)
    assert small.calibration.scores == pytest.approx(detector.calibration.scores, rel=1e-5)


def test_progress_counts_up_to_the_whole(good: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    fit(good, progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)))
    assert {"reading", "learning", "calibrating"} <= set(seen)
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] <= steps[-1][1]
    assert seen["learning"][-1] == seen["calibrating"][-1] == (24, 24)


# --- inspect


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Good, broken, defective, missing, empty, good, folder, tiny: in this order."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.fromarray(textured(600)).save(folder / "z_good.png")
    whole = (folder / "z_good.png").read_bytes()
    (folder / "y_broken.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(scratched(601)).save(folder / "x_bad.png")
    (folder / "v_empty.png").touch()
    Image.fromarray(textured(602)).save(folder / "u_good.png")
    (folder / "t_folder.png").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "s_tiny.png")
    names = ("z_good", "y_broken", "x_bad", "w_missing", "v_empty", "u_good", "t_folder", "s_tiny")
    return [folder / f"{name}.png" for name in names]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_come_in_order_and_broken_pictures_stop_nothing(
    detector: Detector, mixed: list[Path], batch_size: int
) -> None:
    answers = list(detector.inspect(mixed, batch_size=batch_size))
    assert [answer.path for answer in answers] == [str(path) for path in mixed]
    kinds = [type(answer) for answer in answers]
    assert kinds == [Inspection, Refusal, Inspection, Refusal, Refusal, Inspection, Refusal, Refusal]
    for answer in answers:
        if isinstance(answer, Refusal):
            assert Path(answer.path).name in answer.reason and answer.reason.endswith(".")


def test_only_refusals_and_nothing_at_all(detector: Detector, tmp_path: Path) -> None:
    assert list(detector.inspect([])) == []
    (answer,) = detector.inspect([tmp_path / "absent.png"])
    assert isinstance(answer, Refusal)


def test_inspection_is_lazy(detector: Detector, good: Path) -> None:
    """An endless list of pictures is no trouble: nobody asks how long it is."""
    endless = itertools.cycle(sorted(good.iterdir())[:5])
    answers = list(itertools.islice(detector.inspect(endless, batch_size=2), 20))
    assert len(answers) == 20 and answers[0].path == answers[15].path


def test_same_picture_scores_the_same_anywhere_in_a_run(detector: Detector, mixed: list[Path]) -> None:
    alone = next(iter(detector.inspect([mixed[2]])))
    among = list(detector.inspect([*mixed, *mixed[::-1]], batch_size=3))
    assert isinstance(alone, Inspection)
    found = [a for a in among if isinstance(a, Inspection) and a.path == alone.path]
    assert len(found) == 2
    for answer in found:
        assert answer.score == pytest.approx(alone.score, rel=1e-5)
        np.testing.assert_allclose(answer.anomaly_map, alone.anomaly_map, rtol=1e-5, atol=1e-6)


def test_verdict_follows_the_thresholds(strict_detector: Detector, good: Path, tmp_path: Path) -> None:
    calibration = strict_detector.calibration
    assert calibration.t_reject is not None and calibration.t_review is not None
    paths = []
    for i, depth in enumerate(np.linspace(0, 60, 40)):  # from no scratch to a clear one
        pixels = textured(700 + i, 32, 32).astype(float)
        pixels[10:14, 6:26] -= depth
        paths.append(tmp_path / f"{i:02d}.png")
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(paths[-1])
    seen = set()
    for answer in strict_detector.inspect(paths):
        assert isinstance(answer, Inspection)
        if answer.score > calibration.t_reject:
            expected = Verdict.REJECT
        else:
            expected = Verdict.REVIEW if answer.score > calibration.t_review else Verdict.OK
        assert answer.verdict is expected
        seen.add(expected)
    assert {Verdict.OK, Verdict.REJECT} <= seen


def test_regions_are_the_map_above_the_threshold(detector: Detector, mixed: list[Path]) -> None:
    threshold = detector.calibration.pixel_threshold
    assert threshold is not None
    bad = next(iter(detector.inspect([mixed[2]])))
    assert isinstance(bad, Inspection) and bad.regions
    above = bad.anomaly_map > threshold
    assert sum(region.area_px for region in bad.regions) == int(above.sum())
    assert bad.regions == find_regions(bad.anomaly_map, bad.valid, threshold)
    assert bad.regions[0].peak == float(bad.anomaly_map.max())
    peaks = [region.peak for region in bad.regions]
    assert peaks == sorted(peaks, reverse=True)
    largest = bad.regions[0]
    inside = bad.anomaly_map[
        largest.top : largest.top + largest.height, largest.left : largest.left + largest.width
    ]
    assert float(inside.max()) == largest.peak
    rows = np.flatnonzero(above.any(axis=1))
    assert rows.min() < 64 // 2 and rows.max() >= 64 // 3  # where the scratch is


def test_region_rules_are_obeyed(detector: Detector, mixed: list[Path]) -> None:
    rules = RegionRules(min_area_px=10_000, mm_per_pixel=0.1)
    (answer,) = detector.inspect_items([mixed[2]], lambda path: path, rules=rules)
    assert isinstance(answer, Inspected) and answer.inspection.regions == ()
    (answer,) = detector.inspect_items([mixed[2]], lambda path: path, rules=RegionRules(mm_per_pixel=0.1))
    assert isinstance(answer, Inspected)
    region = answer.inspection.regions[0]
    assert region.area_mm2 == pytest.approx(region.area_px * 0.01)


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (200, 90), (8, 8), (301, 64), (64, 301)])
def test_map_has_the_size_of_its_picture(detector: Detector, tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "any.png"
    Image.fromarray(textured(1, *size)).save(path)
    (answer,) = detector.inspect([path])
    assert isinstance(answer, Inspection)
    assert answer.anomaly_map.shape == answer.valid.shape == size
    assert answer.anomaly_map.dtype == np.float32 and answer.valid.dtype == np.bool_
    assert np.isfinite(answer.anomaly_map).all() and answer.valid.all()


@pytest.mark.parametrize("frame", ["auto", "square", "pad", "crop", "native", "tile"])
def test_every_frame_gives_a_map_of_the_picture(tmp_path: Path, frame: str) -> None:
    good = write_good(tmp_path / "good", 6, height=80, width=110)
    detector = fit(good, frame=frame)
    path = tmp_path / "bad.png"
    Image.fromarray(scratched(900, 80, 110)).save(path)
    (answer,) = detector.inspect([path])
    (plain,) = detector.inspect([good / "000.png"])
    assert isinstance(answer, Inspection) and isinstance(plain, Inspection)
    assert answer.anomaly_map.shape == (80, 110) and answer.score > plain.score
    assert not answer.anomaly_map[~answer.valid].any()
    assert bool(answer.valid.all()) == (frame != "crop")
    row = int(np.unravel_index(int(answer.anomaly_map.argmax()), (80, 110))[0])
    assert 80 // 3 - 12 <= row <= 80 // 2 + 12  # at the scratch, whatever the frame did


def test_inspection_carries_times_hash_product_and_notes(detector: Detector, good: Path) -> None:
    path = good / "003.png"
    (answer,) = detector.inspect([str(path)], product="plate")
    assert isinstance(answer, Inspection)
    assert answer.product == "plate" and answer.path == str(path)
    assert answer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(answer.seconds) == {"decode", "compute", "regions"}
    assert all(seconds >= 0 for seconds in answer.seconds.values())


# --- evaluate


def test_evaluation_gives_every_key(labelled_folder: Path) -> None:
    result = Detector.fit(labelled_folder, **TINY).evaluate(labelled_folder)
    assert set(result) >= KEYS
    assert (result["num_good"], result["num_defective"], result["num_refused"]) == (6, 6, 0)
    assert result["image_auroc"] == 1.0 and cast(float, result["pixel_auroc"]) > 0.9
    for key in KEYS - {"num_good", "num_defective", "per_defect", "seconds_per_image"}:
        assert 0 <= cast(float, result[key]) <= 1, key
    assert cast(float, result["seconds_per_image"]) > 0
    per_defect = cast("dict[str, dict[str, Json]]", result["per_defect"])
    assert set(per_defect) == {"scratch"} and per_defect["scratch"]["image_auroc"] == 1.0
    assert result["num_seen_in_fit"] == 0


def test_product_chooses_test_pictures(labelled_folder: Path) -> None:
    detector = Detector.fit(labelled_folder, **TINY)
    assert detector.evaluate(labelled_folder, product="plate")["num_good"] == 6
    with pytest.raises(UsageError, match="no test picture of product 'cup'"):
        detector.evaluate(labelled_folder, product="cup")


def test_mask_of_another_size_costs_its_record_only(labelled_folder: Path) -> None:
    wrong = labelled_folder / "ground_truth" / "scratch" / "002_mask.png"
    Image.new("L", (50, 40), 255).save(wrong)
    refused: list[tuple[Record, Refusal]] = []
    seen: list[str] = []
    result = Detector.fit(labelled_folder, **TINY).evaluate(
        labelled_folder,
        refused=lambda record, refusal: refused.append((record, refusal)),
        each=lambda answer, mask: seen.append(answer.item.path.name),
    )
    assert (result["num_refused"], result["num_defective"], result["num_good"]) == (1, 5, 6)
    ((record, refusal),) = refused
    assert record.path.name == "002.png" and len(seen) == 11
    assert "002_mask.png" in refusal.reason
    for size in (50, 40, 64):
        assert str(size) in refusal.reason


def test_unreadable_test_picture_costs_its_record_only(labelled_folder: Path) -> None:
    (labelled_folder / "test" / "good" / "003.png").write_bytes(b"broken")
    refused: list[str] = []
    result = Detector.fit(labelled_folder, **TINY).evaluate(
        labelled_folder, refused=lambda record, refusal: refused.append(record.path.name)
    )
    assert refused == ["003.png"]
    assert (result["num_refused"], result["num_good"], result["num_defective"]) == (1, 5, 6)


def test_test_pictures_that_were_learnt_from_are_counted(labelled_folder: Path) -> None:
    for i in range(3):  # renamed copies: content counts, not the name
        shutil.copy(
            labelled_folder / "train" / "good" / f"00{i}.png",
            labelled_folder / "test" / "good" / f"copy{i}.png",
        )
    result = Detector.fit(labelled_folder, **TINY).evaluate(labelled_folder)
    assert (result["num_seen_in_fit"], result["num_good"]) == (3, 9)


def test_evaluation_reports_each_picture_and_its_progress(labelled_folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    masks: dict[str, bool] = {}

    def note(answer: Inspected[Record], mask: NDArray[np.bool_] | None) -> None:
        masks[f"{answer.item.defect}/{answer.item.path.name}"] = mask is None

    Detector.fit(labelled_folder, **TINY).evaluate(
        open_dataset(labelled_folder),
        progress=lambda what, done, total: steps.append((done, total)),
        each=note,
    )
    assert steps == [(i, 12) for i in range(1, 13)]
    assert len(masks) == 12
    assert all(without == name.startswith("good/") for name, without in masks.items())


def test_evaluation_is_the_same_after_load(labelled_folder: Path, tmp_path: Path) -> None:
    detector = Detector.fit(labelled_folder, **TINY)
    detector.save(tmp_path / "model")
    before, after = (one.evaluate(labelled_folder) for one in (detector, Detector.load(tmp_path / "model")))
    assert {k: v for k, v in before.items() if k != "seconds_per_image"} == {
        k: v for k, v in after.items() if k != "seconds_per_image"
    }


# --- recalibrate


def test_fresh_pictures_give_an_exact_promise(detector: Detector, tmp_path: Path) -> None:
    fresh = write_good(tmp_path / "fresh", 30, first_seed=2000)
    moved = detector.recalibrated(fresh, target_frr=0.05)
    calibration = moved.calibration
    assert calibration.mode == "holdout" and calibration.exact
    assert (calibration.num_pictures, calibration.promise_on, calibration.frr_promised) == (
        30,
        "reject",
        0.05,
    )
    scores = sorted(a.score for a in moved.inspect(sorted(fresh.iterdir())) if isinstance(a, Inspection))
    assert calibration.scores == pytest.approx(scores, rel=1e-5)
    assert moved.card["promise"] == " ".join(calibration.sentences())
    assert detector.calibration.mode == "leave_one_out"  # the old one is as it was


def test_recalibration_leaves_out_what_was_learnt(detector: Detector, good: Path, tmp_path: Path) -> None:
    both = write_good(tmp_path / "both", 10, first_seed=3000)
    for i in range(4):
        shutil.copy(good / f"00{i}.png", both / f"known{i}.png")
    moved = detector.recalibrated(both)
    assert moved.calibration.num_pictures == 10
    assert moved.calibration.alpha_reject == detector.calibration.alpha_reject
    assert any("4 calibration pictures were learnt from" in warning for warning in moved.warnings())
    assert not any("learnt from" in warning for warning in detector.warnings())


def test_recalibration_without_fresh_pictures_is_refused(detector: Detector, good: Path) -> None:
    with pytest.raises(DataError, match="learnt from all 24 pictures given"):
        detector.recalibrated(good)


def test_strict_recalibration_names_the_needed_count(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="at least 99 good pictures"):
        detector.recalibrated(write_good(tmp_path / "few", 5, first_seed=4000), strict=True)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_recalibration_refuses_a_rate_that_is_none(detector: Detector, tmp_path: Path, rate: float) -> None:
    with pytest.raises(FettleError, match="not between 0 and 1"):
        detector.recalibrated(write_good(tmp_path / "few", 5, first_seed=4000), target_frr=rate)


def test_recalibrated_model_of_folds_judges_by_its_own_score(good: Path, tmp_path: Path) -> None:
    crossed = fit(good, calibration="cross")
    moved = crossed.recalibrated(write_good(tmp_path / "fresh", 20, first_seed=2000))
    moved.save(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model")
    assert loaded.fold_methods == () and loaded.calibration.mode == "holdout"
    assert all(isinstance(answer, Inspection) for answer in loaded.inspect([good / "000.png"]))


# --- the default backbone, real features


def test_default_backbone_fits_saves_and_answers_the_same(labelled_folder: Path, tmp_path: Path) -> None:
    """Four pictures of the default network, its weights from the installed package."""
    paths = sorted((labelled_folder / "train" / "good").iterdir())[:4]
    detector = Detector.fit(paths, size=64)
    assert "package" in detector.method.backbone.spec.source
    detector.save(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model")
    pictures = [*paths[:1], labelled_folder / "test" / "scratch" / "000.png"]
    learnt, bad = (a for a in detector.inspect(pictures) if isinstance(a, Inspection))
    again = [a for a in loaded.inspect(pictures) if isinstance(a, Inspection)]
    assert [a.score for a in again] == [learnt.score, bad.score]
    assert bad.score > 10 * max(learnt.score, 1e-6)


def test_real_pictures_fit_and_are_inspected(real_data: Path, tmp_path: Path) -> None:
    """A handful of real pictures of whatever sizes they have, at a small size."""
    paths = _some_pictures(real_data, 6)
    detector = Detector.fit(paths[:4], size=64, frame="pad")
    answers = list(detector.inspect(paths))
    assert len(answers) == 6
    for path, answer in zip(paths, answers, strict=True):
        assert isinstance(answer, Inspection)
        with Image.open(path) as picture:
            assert answer.anomaly_map.shape == (picture.height, picture.width)
        assert answer.verdict is Verdict.REVIEW


def _some_pictures(root: Path, count: int) -> list[Path]:
    """A few distinct good pictures from each of the folders of good ones."""
    folders = sorted(folder for folder in root.rglob("good") if folder.is_dir())
    pictures = [path for folder in folders for path in sorted(folder.iterdir())[:2]]
    return [path for path in pictures if path.suffix.lower() in (".png", ".jpg", ".bmp")][:count]
