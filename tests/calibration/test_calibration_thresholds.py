"""Order statistics, needed counts and tolerance bounds against the specification's tables."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from fettle.calibration.thresholds import (
    cross_p_value,
    lowest_rate,
    needed_pictures,
    order_statistic,
    upper_bound,
)
from fettle.errors import CalibrationError, UsageError
from fettle.metrics.rates import promise_confidence


@pytest.mark.parametrize(
    ("alpha", "average", "with_95", "with_90"),
    [
        (0.10, 9, 29, 22),
        (0.05, 19, 59, 45),
        (0.02, 49, 149, 114),
        (0.01, 99, 299, 230),
        (0.005, 199, 598, 460),
        (0.001, 999, 2995, 2302),
    ],
)
def test_needed_pictures(alpha: float, average: int, with_95: int, with_90: int) -> None:
    assert (needed_pictures(alpha), needed_pictures(alpha, 0.95), needed_pictures(alpha, 0.9)) == (
        average,
        with_95,
        with_90,
    )
    for confidence, needed in ((None, average), (0.95, with_95), (0.9, with_90)):
        assert order_statistic(needed, alpha, confidence) == needed
        with pytest.raises(CalibrationError, match=f"at least {needed} good"):
            order_statistic(needed - 1, alpha, confidence)


@pytest.mark.parametrize(
    ("n", "alpha", "k", "expected", "upper", "kept"),
    [
        (19, 0.05, 19, 0.05000, 0.14587, 0.6226),
        (50, 0.05, 49, 0.03922, 0.09140, 0.7206),
        (60, 0.05, 58, 0.04918, 0.10124, 0.5826),
        (99, 0.01, 99, 0.01000, 0.02981, 0.6303),
        (100, 0.05, 96, 0.04950, 0.08920, 0.5640),
        (200, 0.01, 199, 0.00995, 0.02350, 0.5954),
        (299, 0.01, 297, 0.01000, 0.02091, 0.5757),
        (320, 0.01, 318, 0.00935, 0.01954, 0.6214),
        (500, 0.01, 496, 0.00998, 0.01821, 0.5604),
        (1000, 0.01, 991, 0.00999, 0.01565, 0.5427),
    ],
)
def test_order_statistic_and_bound(
    n: int, alpha: float, k: int, expected: float, upper: float, kept: float
) -> None:
    assert order_statistic(n, alpha) == k
    assert (n + 1 - k) / (n + 1) == pytest.approx(expected, abs=5e-6)
    assert upper_bound(n, k) == pytest.approx(upper, abs=5e-6)
    assert promise_confidence(n, k, alpha) == pytest.approx(kept, abs=5e-5)


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [
        (59, 0.05, 59),
        (93, 0.05, 92),
        (100, 0.05, 99),
        (124, 0.05, 122),
        (200, 0.05, 196),
        (500, 0.05, 484),
        (299, 0.01, 299),
        (500, 0.01, 499),
        (1000, 0.01, 996),
    ],
)
def test_order_statistic_with_confidence(n: int, alpha: float, k: int) -> None:
    assert order_statistic(n, alpha, 0.95) == k
    assert promise_confidence(n, k, alpha) >= 0.95
    assert upper_bound(n, k) <= alpha


@pytest.mark.parametrize(
    ("n", "alpha", "k"), [(9, 0.1, 9), (10, 0.1, 10), (19, 0.05, 19), (99, 0.01, 99), (100, 0.01, 100)]
)
def test_small_counts(n: int, alpha: float, k: int) -> None:
    assert order_statistic(n, alpha) == k


@pytest.mark.parametrize("n", [98, 50])
def test_too_few_names_the_needed_count(n: int) -> None:
    with pytest.raises(CalibrationError, match="99"):
        order_statistic(n, 0.01)


def test_refusal_names_the_lowest_promise() -> None:
    with pytest.raises(CalibrationError, match=r"0\.019608"):
        order_statistic(50, 0.01)
    assert lowest_rate(50) == pytest.approx(0.019608, abs=5e-7)
    assert lowest_rate(299, 0.95) == pytest.approx(0.01, abs=5e-5)


def test_upper_bound_of_the_maximum_is_closed() -> None:
    assert upper_bound(99, 99) == pytest.approx(1 - 0.05 ** (1 / 99), abs=1e-12)


def test_order_statistic_is_exact_for_decimal_rates() -> None:
    for n in range(1, 400):
        for alpha in (0.01, 0.03, 0.07, 0.1, 0.29):
            wanted = -((-(n + 1) * (1 - Fraction(str(alpha)))) // 1)
            if wanted <= n:
                assert order_statistic(n, alpha) == wanted


@pytest.mark.parametrize(("alpha", "confidence"), [(0.0, None), (1.0, None), (0.1, 0.0), (0.1, 1.0)])
def test_rates_outside_0_to_1_are_refused(alpha: float, confidence: float | None) -> None:
    with pytest.raises(UsageError):
        order_statistic(100, alpha, confidence)


def _false_reject_rates(decimals: int | None) -> np.ndarray:
    """Rates of 20,000 calibrations on 99 uniform scores, by the law of the scores."""
    draws = np.random.default_rng(7).random((20_000, 99))
    if decimals is None:
        return 1 - np.sort(draws, axis=1)[:, order_statistic(99, 0.01) - 1]
    threshold = np.sort(np.round(draws, decimals), axis=1)[:, order_statistic(99, 0.01) - 1]
    unit = 10.0**-decimals
    return np.clip(1 - threshold - unit / 2, 0, 1)  # a score rounds above t from t + half a unit on


def test_average_false_reject_rate_is_alpha() -> None:
    assert _false_reject_rates(None).mean() == pytest.approx(0.01, abs=3e-4)


def test_ties_only_lower_the_rate() -> None:
    assert _false_reject_rates(1).mean() < 0.0097


def test_cross_p_value_counts_each_fold_by_its_own_model() -> None:
    scores, folds = [1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1]
    # Fold 0 sees 2.5: only 3 is as large. Fold 1 sees 4: 4 itself is as large.
    assert cross_p_value([2.5, 4.0], scores, folds) == pytest.approx(3 / 5)
