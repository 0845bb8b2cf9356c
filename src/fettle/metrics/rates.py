"""Rates with their intervals, and whether a measured rate agrees with a promised one.

Clopper and Pearson, Biometrika 26, 1934, for the intervals. The law of a conformal threshold given its
calibration set is Beta(n + 1 - k, k) (Vovk, "Conditional validity of inductive conformal predictors",
2012), so the number of rejects among m further good pictures is beta-binomial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from fettle.errors import CalibrationError, UsageError

Side: TypeAlias = Literal["both", "lower", "upper"]


@dataclass(frozen=True)
class Rate:
    """A measured rate, never without its interval.

    Attributes:
        events, trials: X of m.
        value: X / m; None when m is 0.
        interval: two-sided Clopper-Pearson interval (low, high); None when m is 0.
        confidence: of the interval.
    """

    events: int
    trials: int
    value: float | None
    interval: tuple[float, float] | None
    confidence: float


def measured_rate(events: int, trials: int, confidence: float = 0.95) -> Rate:
    """The rate `events / trials` with its two-sided interval."""
    interval = clopper_pearson(events, trials, confidence)
    return Rate(events, trials, events / trials if trials else None, interval, confidence)


def clopper_pearson(
    events: int, trials: int, confidence: float = 0.95, side: Side = "both"
) -> tuple[float, float] | None:
    """The exact binomial confidence interval (low, high) of a rate; None without trials.

    Args:
        events: X, in 0..m.
        trials: m, 0 or more.
        confidence: in (0, 1).
        side: "both" cuts (1 - confidence) / 2 on each side; "upper" gives (0, high) and "lower"
            (low, 1), each with all of 1 - confidence on its side.

    Raises:
        UsageError: an argument out of its range.
    """
    from scipy import special

    _check_counts(events, trials)
    if not 0 < confidence < 1:
        raise UsageError(f"The confidence is {confidence}.", "Give a number between 0 and 1.")
    if side not in ("both", "lower", "upper"):
        raise UsageError(f"The side is '{side}'.", "Give 'both', 'lower' or 'upper'.")
    if trials == 0:
        return None
    outside = 1 - Fraction(str(confidence))
    tail = float(outside / 2 if side == "both" else outside)
    low, high = 0.0, 1.0
    if events > 0 and side != "upper":
        low = float(special.betaincinv(events, trials - events + 1, tail))
    if events < trials and side != "lower":
        high = float(special.betainccinv(events + 1, trials - events, tail))
    return low, high


def conformal_rank(num_calibration: int, alpha: float) -> int:
    """k = ceil((n + 1) (1 - alpha)): the threshold is the k-th smallest of n calibration scores.

    Raises:
        UsageError: alpha is not in (0, 1).
        CalibrationError: n is too small to promise alpha; the needed count is named.
    """
    needed = needed_pictures(alpha)
    if num_calibration < needed:
        raise CalibrationError(
            f"{num_calibration} calibration pictures cannot promise a rate of {alpha}.",
            f"Give at least {needed} good pictures, or promise a larger rate.",
        )
    return math.ceil((num_calibration + 1) * (1 - _exact(alpha)))


def needed_pictures(alpha: float) -> int:
    """The fewest calibration pictures that can promise a rate of `alpha`: ceil(1 / alpha) - 1.

    Raises:
        UsageError: alpha is not in (0, 1).
    """
    return math.ceil(1 / _exact(alpha)) - 1


def needed_pictures_confident(alpha: float, delta: float) -> int:
    """The fewest n whose maximum as threshold has a true rate of at most `alpha`, with confidence 1 - delta.

    The smallest n with (1 - alpha)^n <= delta.

    Raises:
        UsageError: alpha or delta is not in (0, 1).
    """
    pass_rate, risk = 1 - _exact(alpha), _exact(delta)
    number = max(1, math.ceil(math.log(delta) / math.log1p(-alpha)) - 1)
    while pass_rate**number > risk:  # exact; the logarithm may be one off
        number += 1
    return number


def promise_confidence(num_calibration: int, rank: int, alpha: float) -> float:
    """P(true rate <= alpha) when the threshold is the `rank`-th smallest of n calibration scores.

    The true rate is Beta(n + 1 - k, k) distributed (continuous scores; ties make it smaller).
    """
    from scipy import special

    _check_rank(num_calibration, rank)
    return float(special.betainc(num_calibration + 1 - rank, rank, float(_exact(alpha))))


def consistency_p_value(num_calibration: int, rank: int, trials: int, events: int) -> float:
    """P(X' >= events) if the promise holds: X' ~ Beta-Binomial(trials, n + 1 - k, k). Exact, then rounded.

    It allows for the threshold being itself an estimate, which a binomial test does not. For k-fold
    calibration the law is approximate. With S sets raise an alarm below 0.05 / S (Bonferroni).

    Args:
        num_calibration: n, the good pictures that the threshold came from.
        rank: k, the threshold's rank among them, ascending, in 1..n.
        trials: m, further good pictures.
        events: X, those of them above the threshold.

    Raises:
        UsageError: an argument out of its range.
    """
    _check_rank(num_calibration, rank)
    _check_counts(events, trials)
    above = num_calibration + 1 - rank
    total = math.comb(num_calibration + trials, trials)
    # Orders of all n + m scores with x of the m above the threshold: C(x+a-1, x) C(m-x+k-1, m-x).
    higher, lower, tail = 1, math.comb(trials + rank - 1, trials), 0
    for x in range(events):  # the orders with fewer than `events`
        tail += higher * lower
        higher = higher * (x + above) // (x + 1)
        lower = lower * (trials - x) // (trials - x + rank - 1)
    return (total - tail) / total


def _exact(rate: float) -> Fraction:
    """The rate as it was written: 0.1 is one tenth, not the nearest binary number."""
    if not 0 < rate < 1:
        raise UsageError(f"The rate is {rate}.", "Give a number between 0 and 1.")
    return Fraction(str(rate))


def _check_counts(events: int, trials: int) -> None:
    if not 0 <= events <= trials:
        raise UsageError(f"There are {events} events in {trials} trials.", "Give 0 <= events <= trials.")


def _check_rank(num_calibration: int, rank: int) -> None:
    if not 1 <= rank <= num_calibration:
        raise UsageError(f"The rank is {rank} of {num_calibration} scores.", "Give 1 <= rank <= n.")
