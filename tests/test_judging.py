"""The four ways of judging good pictures: who learns from what, and what is then promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import write_good
from fettle.detector import Detector
from fettle.errors import UsageError
from fettle.inspection import Inspection, Verdict

TINY = {"backbone": "tiny", "weights": "random", "size": 64, "target_frr": 0.1}
MODES = ("leave_one_out", "holdout", "kfold", "cross")


@pytest.fixture
def forty(tmp_path: Path) -> Path:
    return write_good(tmp_path / "good", 40)


def answers(detector: Detector, folder: Path) -> list[Inspection]:
    found = list(detector.inspect(sorted(folder.iterdir())))
    assert all(isinstance(answer, Inspection) for answer in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["patchcore", "padim"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_fits_saves_and_answers_the_same(
    mode: str, method: str, forty: Path, tmp_path: Path
) -> None:
    settings = {"channels": 12} if method == "padim" else {}
    detector = Detector.fit(forty, method=method, calibration=mode, settings=settings, **TINY)
    assert detector.calibration.mode == mode
    detector.save(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model")
    fresh = write_good(tmp_path / "fresh", 6, first_seed=500)
    for one, other in zip(answers(detector, fresh), answers(loaded, fresh), strict=True):
        assert (one.score, one.verdict) == (other.score, other.verdict)
        assert (one.anomaly_map == other.anomaly_map).all()


def test_only_a_hold_out_takes_pictures_from_the_fit(forty: Path) -> None:
    counts = {}
    for mode in MODES:
        detector = Detector.fit(forty, calibration=mode, **TINY)
        counts[mode] = (detector.num_fit, detector.calibration.num_scores)
    assert counts["leave_one_out"] == counts["kfold"] == counts["cross"] == (40, 40)
    num_fit, num_held = counts["holdout"]
    assert num_fit + num_held == 40
    assert num_held >= 8


def test_hold_out_promise_is_exact_and_leave_one_out_says_that_it_is_close(forty: Path) -> None:
    assert Detector.fit(forty, calibration="holdout", **TINY).calibration.exact
    assert not Detector.fit(forty, calibration="leave_one_out", **TINY).calibration.exact


def test_cross_keeps_its_folds_and_promises_twice_the_rate(forty: Path, tmp_path: Path) -> None:
    detector = Detector.fit(forty, calibration="cross", **TINY)
    assert len(detector.fold_methods) == 5
    assert detector.calibration.frr_promised == pytest.approx(0.2)
    verdicts = [
        answer.verdict for answer in answers(detector, write_good(tmp_path / "new", 20, first_seed=900))
    ]
    assert verdicts.count(Verdict.REJECT) <= 8


def test_judged_pictures_do_not_score_as_if_they_were_known(forty: Path) -> None:
    """Scores of pictures that a model has learnt from are near 0 for PatchCore: none may enter."""
    detector = Detector.fit(forty, settings={"bank_rows": 0}, **TINY)
    known = min(answer.score for answer in answers(detector, forty))
    assert min(detector.calibration.scores) > 2 * known


def test_a_group_is_never_split(tmp_path: Path) -> None:
    folder = write_good(tmp_path / "tiles", 30)
    rows = ["path,label,mask,split,product,tile"]
    rows += [f"tiles/{i:03d}.png,good,,train,p,{i // 3}" for i in range(30)]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    for mode in MODES:
        detector = Detector.fit(manifest, calibration=mode, **TINY)
        calibration = detector.calibration
        assert calibration.num_groups == calibration.num_scores
        assert calibration.num_pictures == 3 * calibration.num_scores
    assert folder.is_dir()


def test_few_pictures_are_left_out_one_by_one(tmp_path: Path) -> None:
    few = write_good(tmp_path / "few", 6)
    detector = Detector.fit(few, calibration="cross", **TINY)
    assert len(detector.fold_methods) == 6


def test_unknown_mode_is_refused(forty: Path) -> None:
    with pytest.raises(UsageError, match="calibration"):
        Detector.fit(forty, calibration="jackknife", **TINY)


def test_a_hold_out_has_groups_enough_for_its_promise(tmp_path: Path) -> None:
    """80 pictures in 40 groups: a fifth of them is 8 groups, and the promise of 5 % on review needs 19."""
    write_good(tmp_path / "tiles", 80)
    rows = ["path,label,mask,split,product,tile"]
    rows += [f"tiles/{i:03d}.png,good,,train,p,{i // 2}" for i in range(80)]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    calibration = Detector.fit(manifest, calibration="holdout", **{**TINY, "target_frr": 0.01}).calibration
    assert calibration.num_scores >= 19 and calibration.promise_on == "review"
