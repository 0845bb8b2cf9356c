"""Which calibration score is the threshold, and what that promises: split conformal prediction.

Scores of n good pictures that the model has not learnt from, exchangeable with future good ones. With
t = the k-th smallest score and k = ceil((n + 1)(1 - alpha)), a good part scores above t with probability
at most alpha (Vovk et al. 2005; Lei et al. 2018). Given the n scores, the rate itself is
Beta(n + 1 - k, k), which is the tolerance bound of Wilks (1941).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fettle.errors import CalibrationError, UsageError
from fettle.metrics import rates


def needed_pictures(alpha: float, confidence: float | None = None) -> int:
    """The fewest good pictures that can promise a false-reject rate of `alpha`.

    Args:
        alpha: between 0 and 1.
        confidence: None for the promise on average over calibrations; else the probability with which
            this one calibration must keep it.

    Raises:
        UsageError: alpha or confidence is not between 0 and 1.
    """
    if confidence is None:
        return rates.needed_pictures(alpha)
    return rates.needed_pictures_confident(alpha, _risk(confidence))


def lowest_rate(n: int, confidence: float | None = None) -> float:
    """The lowest rate that n good pictures can promise: the threshold is then their largest score."""
    return 1 / (n + 1) if confidence is None else float(1 - _risk(confidence) ** (1 / n))


def order_statistic(
    n: int, alpha: float, confidence: float | None = None, counted: str = "good pictures"
) -> int:
    """Which of n scores, sorted ascending and counted from 1, is the threshold. A score above it is rejected.

    Args:
        n: number of calibration scores.
        alpha: false-reject rate promised, between 0 and 1.
        confidence: as in `needed_pictures`. counted: what n is the number of, for the refusal.

    Raises:
        CalibrationError: n is too small; the needed count is named.
        UsageError: alpha or confidence is not between 0 and 1.
    """
    needed = needed_pictures(alpha, confidence)
    if n < needed:
        lowest = f" (the lowest rate that they can is {lowest_rate(n, confidence):.6f})" if n > 0 else ""
        raise CalibrationError(
            f"{n} {counted} cannot promise a false-reject rate of {alpha:g}{lowest}.",
            f"Give at least {needed} {counted}, or promise a higher rate.",
        )
    if confidence is None:
        return rates.conformal_rank(n, alpha)
    ranks = range(1, n)  # the probability grows with the rank, and is enough at n
    return 1 + bisect_left(ranks, confidence, key=lambda k: rates.promise_confidence(n, k, alpha))


def upper_bound(n: int, k: int, confidence: float = 0.95) -> float:
    """The false-reject rate of threshold k of n is at most this, with `confidence` (one-sided)."""
    from scipy import special

    return float(1 - special.betaincinv(k, n + 1 - k, _risk(confidence)))


def cross_p_value(fold_scores: Sequence[float], scores: Sequence[float], folds: Sequence[int]) -> float:
    """Cross-conformal p-value of one picture (Vovk 2015): (1 + #{i: s_i >= s^(fold of i)}) / (n + 1).

    Rejecting at p <= alpha keeps the false-reject rate within 2 alpha, and near alpha in practice.

    Args:
        fold_scores: (K,) the picture's score by each fold's model, which did not learn that fold.
        scores: (n,) out-of-fold scores of the good pictures.
        folds: (n,) each good picture's fold, 0..K-1.
    """
    own = np.asarray(fold_scores, dtype=float)[np.asarray(folds, dtype=int)]
    return float(1 + np.count_nonzero(np.asarray(scores) >= own)) / (len(scores) + 1)


def _risk(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UsageError(f"The confidence is {confidence}.", "Give a number between 0 and 1, such as 0.95.")
    return float(1 - Fraction(str(float(confidence))))
