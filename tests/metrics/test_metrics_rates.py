"""Rates, their intervals, and the consistency of a measured rate with a promise."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fettle.errors import CalibrationError, UsageError
from fettle.metrics import (
    clopper_pearson,
    conformal_rank,
    consistency_p_value,
    measured_rate,
    needed_pictures,
    needed_pictures_confident,
    promise_confidence,
)


@pytest.mark.parametrize(
    ("events", "trials", "low", "high"),
    [
        (0, 1, 0, 0.975),
        (0, 10, 0, 0.308497),
        (0, 20, 0, 0.168433),
        (0, 100, 0, 0.036217),
        (1, 20, 0.001265, 0.248733),
        (1, 100, 0.000253, 0.054459),
        (3, 100, 0.006230, 0.085176),
        (2, 300, 0.000808, 0.023873),
        (5, 5, 0.478176, 1),
        (10, 10, 0.691503, 1),
    ],
)
def test_golden_intervals(events, trials, low, high):
    assert clopper_pearson(events, trials) == pytest.approx((low, high), abs=6e-7)


trials_and_events = st.integers(1, 400).flatmap(
    lambda trials: st.tuples(st.just(trials), st.integers(0, trials))
)


@given(trials_and_events, st.sampled_from([0.8, 0.95, 0.999]))
def test_an_interval_holds_its_rate_mirrors_and_narrows(counts, confidence):
    trials, events = counts
    low, high = clopper_pearson(events, trials, confidence)
    assert 0 <= low <= events / trials <= high <= 1
    assert clopper_pearson(trials - events, trials, confidence) == pytest.approx(
        (1 - high, 1 - low), abs=1e-12
    )
    narrow_low, narrow_high = clopper_pearson(2 * events, 2 * trials, confidence)
    assert narrow_high - narrow_low < high - low


@given(trials_and_events)
def test_the_bounds_are_where_the_binomial_tails_equal_their_share(counts):
    trials, events = counts
    low, _ = clopper_pearson(events, trials, 0.9, "lower")
    _, high = clopper_pearson(events, trials, 0.9, "upper")
    if events:
        assert stats.binom.sf(events - 1, trials, low) == pytest.approx(0.1, abs=1e-9)
    if events < trials:
        assert stats.binom.cdf(events, trials, high) == pytest.approx(0.1, abs=1e-9)


def test_one_sided_bounds_at_97_5_are_the_two_sided_ones_at_95():
    both = clopper_pearson(3, 100)
    assert clopper_pearson(3, 100, 0.975, "upper") == (0, pytest.approx(both[1], abs=1e-14))
    assert clopper_pearson(3, 100, 0.975, "lower") == (pytest.approx(both[0], abs=1e-14), 1)


def test_no_trials_no_rate():
    assert clopper_pearson(0, 0) is None
    rate = measured_rate(0, 0)
    assert rate.value is rate.interval is None
    assert measured_rate(1, 20).interval == clopper_pearson(1, 20)
    assert measured_rate(1, 20).value == 0.05


def test_arguments_are_checked():
    for wrong in ((2, 1), (-1, 4)):
        with pytest.raises(UsageError, match="events"):
            clopper_pearson(*wrong)
    with pytest.raises(UsageError, match="confidence"):
        clopper_pearson(1, 2, 95)
    with pytest.raises(UsageError, match="side"):
        clopper_pearson(1, 2, 0.95, "left")
    with pytest.raises(UsageError, match="rank"):
        consistency_p_value(10, 11, 5, 1)
    for alpha in (0, 1, -0.1, float("nan")):
        with pytest.raises(UsageError, match="rate"):
            needed_pictures(alpha)


@pytest.mark.parametrize(
    ("alpha", "needed"), [(0.1, 9), (0.05, 19), (0.02, 49), (0.01, 99), (0.005, 199), (0.001, 999)]
)
def test_needed_pictures(alpha, needed):
    assert needed_pictures(alpha) == needed
    assert conformal_rank(needed, alpha) == needed
    with pytest.raises(CalibrationError, match=f"at least {needed} good"):
        conformal_rank(needed - 1, alpha)


@pytest.mark.parametrize("alpha", ["0.1", "0.05", "0.07", "0.3", "0.001"])
def test_the_rank_is_that_of_exact_fractions(alpha):
    for number in range(1000, 1100):
        expected = math.ceil((number + 1) * (1 - Fraction(alpha)))
        assert conformal_rank(number, float(alpha)) == expected


@pytest.mark.parametrize(
    ("alpha", "delta", "needed"), [(0.01, 0.05, 299), (0.05, 0.05, 59), (0.001, 0.05, 2995), (0.5, 0.25, 2)]
)
def test_pictures_needed_for_confidence(alpha, delta, needed):
    assert needed_pictures_confident(alpha, delta) == needed
    assert promise_confidence(needed, needed, alpha) >= 1 - delta - 1e-12
    assert promise_confidence(needed - 1, needed - 1, alpha) < 1 - delta


def test_golden_consistency():
    assert consistency_p_value(100, 100, 50, 3) == pytest.approx(0.0355523, abs=5e-8)


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_consistency_is_the_beta_binomial_tail(number, trials, data):
    rank = data.draw(st.integers(1, number))
    events = data.draw(st.integers(0, trials))
    expected = stats.betabinom.sf(events - 1, trials, number + 1 - rank, rank)
    assert consistency_p_value(number, rank, trials, events) == pytest.approx(expected, abs=1e-9)


def test_consistency_on_large_sets():
    p = consistency_p_value(3000, 2971, 4000, 60)
    assert p == pytest.approx(stats.betabinom.sf(59, 4000, 30, 2971), rel=1e-8)
    assert consistency_p_value(3000, 2971, 4000, 0) == 1


def test_a_true_promise_is_rarely_called_broken():
    """At a nominal 5 % the alarm rate stays below it, where a plain binomial test's is far above."""
    rng = np.random.default_rng(7)
    number, trials, alpha = 100, 300, 0.05
    rank = conformal_rank(number, alpha)
    draws = 4000
    threshold = np.sort(rng.random((draws, number)), axis=1)[:, rank - 1]
    rejects = rng.binomial(trials, 1 - threshold)
    p_of = {x: consistency_p_value(number, rank, trials, int(x)) for x in np.unique(rejects)}
    alarm = np.mean([p_of[x] < 0.05 for x in rejects])
    plain = np.mean(stats.binom.sf(rejects - 1, trials, alpha) < 0.05)
    assert 0.03 < alarm < 0.055
    assert plain > 0.15
