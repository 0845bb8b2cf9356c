"""Verdicts, promises and their words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fettle.calibration import Calibration, calibrate, escape_rates
from fettle.errors import CalibrationError, UsageError
from fettle.inspection import Verdict

OK, REVIEW, REJECT = Verdict.OK, Verdict.REVIEW, Verdict.REJECT


def _scores(n: int) -> list[float]:
    """0, 1, ... n - 1 in a shuffled order."""
    return [float(score) for score in np.random.default_rng(n).permutation(n)]


def test_three_zones() -> None:
    calibration = calibrate(_scores(99), mode="holdout")
    assert (calibration.t_review, calibration.t_reject) == (94.0, 98.0)  # k = 95 and 99
    assert [calibration.verdict(score) for score in (-math.inf, 94, 94.1, 98, 98.1, math.inf)] == [
        OK,
        OK,
        REVIEW,
        REVIEW,
        REJECT,
        REJECT,
    ]
    assert (calibration.promise_on, calibration.frr_promised, calibration.needed) == ("reject", 0.01, 99)
    assert calibration.upper_reject_95 == pytest.approx(0.02981, abs=5e-6)


def test_without_a_reject_promise_nothing_is_rejected() -> None:
    calibration = calibrate(_scores(98), mode="holdout")
    assert (calibration.t_review, calibration.t_reject) == (94.0, None)  # k = ceil(99 * 0.95) = 95
    assert [calibration.verdict(score) for score in (94, 94.1, math.inf)] == [OK, REVIEW, REVIEW]
    assert (calibration.promise_on, calibration.frr_promised, calibration.needed) == ("review", 0.05, 99)
    assert any("99" in sentence and "98" in sentence for sentence in calibration.sentences())


@pytest.mark.parametrize("n", [0, 1, 18])
def test_too_few_pictures_leave_everything_to_review(n: int) -> None:
    calibration = calibrate(_scores(n), mode="holdout")
    assert {calibration.verdict(score) for score in (-math.inf, 0.0, math.inf)} == {REVIEW}
    assert (calibration.promise_on, calibration.frr_promised) == (None, None)
    assert any("19" in sentence for sentence in calibration.sentences())
    assert any("99" in sentence for sentence in calibration.sentences())


def test_strict_refuses_what_lenient_leaves_out() -> None:
    with pytest.raises(CalibrationError, match="99"):
        calibrate(_scores(98), mode="holdout", strict=True)
    assert calibrate(_scores(99), mode="holdout", strict=True).promise_on == "reject"


def test_nan_scores_are_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(_scores(99), mode="holdout").verdict(math.nan)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_calibration_scores_must_be_finite(wrong: float) -> None:
    with pytest.raises(CalibrationError, match="picture 2"):
        calibrate([0.0, 1.0, wrong], mode="holdout")


@pytest.mark.parametrize(
    ("target", "review", "wanted"),
    [(0.01, None, 0.05), (0.07, None, 0.2), (0.3, None, 0.3), (0.003, None, 0.015), (0.01, 0.1, 0.1)],
)
def test_review_rate(target: float, review: float | None, wanted: float) -> None:
    calibration = calibrate(_scores(400), mode="holdout", target_frr=target, review_frr=review)
    assert calibration.alpha_review == wanted


def test_review_rate_below_the_reject_rate_is_refused() -> None:
    with pytest.raises(UsageError, match="below"):
        calibrate(_scores(99), mode="holdout", target_frr=0.05, review_frr=0.01)


def test_a_group_counts_once_with_its_largest_score() -> None:
    scores = [1.0, 5.0, 2.0, 3.0]
    calibration = calibrate(scores, mode="leave_one_out", target_frr=0.3, groups=["a", "a", "b", "c"])
    assert calibration.scores == (2.0, 3.0, 5.0)
    assert (calibration.num_pictures, calibration.num_groups, calibration.num_scores) == (4, 3, 3)


def test_confidence_mode_moves_the_threshold_up() -> None:
    scores = _scores(500)
    average = calibrate(scores, mode="holdout")
    confident = calibrate(scores, mode="holdout", confidence=0.95)
    assert (average.t_reject, confident.t_reject) == (495.0, 498.0)  # k = 496 and 499
    assert confident.upper_reject_95 is not None and confident.upper_reject_95 <= 0.01
    assert calibrate(_scores(298), mode="holdout", confidence=0.95).needed == 299


@pytest.mark.parametrize(("mode", "exact"), [("holdout", True), ("kfold", False), ("leave_one_out", False)])
def test_only_the_holdout_is_called_exact(mode: str, exact: bool) -> None:
    calibration = Calibration.model_validate(
        calibrate(_scores(99), mode="holdout").model_dump() | {"mode": mode, "exact": exact}
    )
    assert calibrate(_scores(99), mode=calibration.mode).exact is exact
    words = " ".join(calibration.sentences())
    assert ("approximate" in words or "rather than exact" in words) is not exact


def test_sentences_say_the_promise() -> None:
    words = calibrate(_scores(99), mode="holdout").sentences()
    assert words[0] == (
        "Of good parts at most 5 % leave ok on average; with 95 % confidence at most 9.1 % "
        "(99 good pictures)."
    )
    assert words[1] == (
        "Of good parts at most 1 % are rejected on average; with 95 % confidence at most 3.0 % "
        "(99 good pictures)."
    )


def test_another_rate_from_the_stored_scores() -> None:
    scores, groups = _scores(200), [str(place // 2) for place in range(200)]
    first = calibrate(scores, mode="kfold", groups=groups, pixel_statistics=scores)
    assert first.at(0.05) == calibrate(
        scores, mode="kfold", groups=groups, pixel_statistics=scores, target_frr=0.05
    )


@given(
    scores=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), max_size=130),
    target=st.sampled_from([0.01, 0.05, 0.1, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_json_round_trip_keeps_every_bit(scores: list[float], target: float) -> None:
    calibration = calibrate(scores, mode="kfold", target_frr=target, pixel_statistics=scores)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


@given(scores=st.lists(st.integers(0, 9), min_size=20, max_size=150), target=st.sampled_from([0.01, 0.05]))
@settings(max_examples=60, deadline=None)
def test_verdicts_never_soften_as_the_score_grows(scores: list[int], target: float) -> None:
    calibration = calibrate([float(score) for score in scores], mode="holdout", target_frr=target)
    severity = [[OK, REVIEW, REJECT].index(calibration.verdict(float(score))) for score in range(-1, 11)]
    assert severity == sorted(severity)


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"t_reject": math.nan},
        {"t_reject": math.inf},
        {"t_reject": None},
        {"t_reject": -1.0},
        {"frr_promised": None},
        {"alpha_reject": 0.0},
        {"alpha_review": 0.001},
        {"num_scores": 5},
        {"scores": tuple(range(98, -1, -1))},
        {"mode": "guess"},
        {"mode": "cross"},
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, object]) -> None:
    stored = calibrate(_scores(99), mode="holdout").model_dump()
    with pytest.raises(ValidationError):
        Calibration.model_validate(stored | change)


def test_cross_judges_by_every_fold() -> None:
    scores = _scores(99)
    calibration = calibrate(scores, mode="cross", folds=[place % 3 for place in range(99)])
    assert calibration.cross_verdict([98.5] * 3) is REJECT  # p = 1 / 100
    assert calibration.cross_verdict([98.0] * 3) is REVIEW  # p = 2 / 100
    assert calibration.cross_verdict([94.0] * 3) is OK  # p = 6 / 100
    assert calibration.frr_promised == 0.02
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration
    with pytest.raises(UsageError, match="cross_verdict"):
        calibration.verdict(1.0)
    with pytest.raises(UsageError, match="3 folds"):
        calibration.cross_verdict([1.0])


def test_cross_keeps_each_score_with_its_fold() -> None:
    calibration = calibrate([3.0, 1.0, 2.0], mode="cross", folds=[0, 1, 2])
    assert (calibration.scores, calibration.folds) == ((1.0, 2.0, 3.0), (1, 2, 0))


def test_folds_belong_to_cross_and_do_not_cut_groups() -> None:
    with pytest.raises(UsageError, match="folds"):
        calibrate([1.0, 2.0], mode="kfold", folds=[0, 1])
    with pytest.raises(UsageError, match="folds"):
        calibrate([1.0, 2.0], mode="cross")
    with pytest.raises(UsageError, match="several folds"):
        calibrate([1.0, 2.0], mode="cross", folds=[0, 1], groups=["a", "a"])


def test_lengths_must_agree() -> None:
    with pytest.raises(UsageError, match="pixel_statistics"):
        calibrate([1.0, 2.0], mode="holdout", pixel_statistics=[1.0])


@pytest.mark.parametrize(
    ("escapes", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.308497),
        (0, 30, 0.0, 0.115703),
        (1, 30, 0.000844, 0.172169),
        (3, 30, 0.021117, 0.265288),
        (2, 41, 0.005963, 0.165333),
        (10, 119, 0.041034, 0.149113),
    ],
)
def test_escapes_carry_their_interval(escapes: int, total: int, low: float, high: float) -> None:
    rates = escape_rates([REVIEW] * escapes + [REJECT] * (total - escapes))
    assert rates.not_rejected.interval == pytest.approx((low, high), abs=5e-7)
    assert (rates.not_rejected.events, rates.not_reviewed.events) == (escapes, 0)


@pytest.mark.parametrize(("n", "rank"), [(18, None), (98, 95), (99, 99), (500, 496)])
def test_rank_is_that_of_the_promised_threshold(n: int, rank: int | None) -> None:
    calibration = calibrate(_scores(n), mode="holdout")
    threshold = calibration.t_reject if calibration.t_reject is not None else calibration.t_review
    assert calibration.rank == rank
    assert threshold == (None if rank is None else calibration.scores[rank - 1])
