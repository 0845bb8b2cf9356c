"""The pixel threshold. Pixels of one picture are not exchangeable; pictures are, so each gives one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fettle.calibration.thresholds import lowest_rate, needed_pictures, order_statistic
from fettle.errors import CalibrationError, UsageError

BETA = 0.001


def pixel_statistic(anomaly_map: NDArray[np.float32], valid: NDArray[np.bool_], beta: float = BETA) -> float:
    """The least map value that at most a share `beta` of the valid pixels exceeds.

    Args:
        anomaly_map: (H, W) map of a good picture.
        valid: (H, W), False outside the region of interest.
        beta: share of pixels, 0 <= beta < 1; 0 gives the maximum.

    Raises:
        UsageError: beta or shapes that do not fit.
        CalibrationError: no valid pixel, or a value that is NaN or infinite.
    """
    if not 0 <= beta < 1:
        raise UsageError(f"A share of pixels of {beta} is not in 0..1.", "Give a share such as 0.001.")
    if anomaly_map.shape != valid.shape:
        raise UsageError(
            f"Map {anomaly_map.shape} and valid {valid.shape} differ.", "Give one size for both."
        )
    values = anomaly_map[valid]
    if not values.size:
        raise CalibrationError("A good picture has no valid pixel.", "Check the region of interest.")
    if not np.isfinite(values).all():
        raise CalibrationError("An anomaly map holds NaN or infinity.", "Check the model's weights.")
    above = math.floor(values.size * Fraction(str(float(beta))))  # may exceed the statistic
    place = values.size - 1 - above
    return float(np.partition(values, place)[place])


def pixel_threshold(statistics: Sequence[float], alpha: float) -> tuple[float, float]:
    """(threshold, promised rate): of good pictures at most that share marks more pixels than beta.

    The rate is `alpha`, or the lowest that so few pictures can promise.

    Args:
        statistics: (n,) `pixel_statistic` of good pictures that the model has not learnt from, n >= 1.
        alpha: rate wished for.

    Raises:
        CalibrationError: no statistic, or one that is not finite.
    """
    ordered = sorted(statistics)
    if not ordered or not np.isfinite(ordered).all():
        raise CalibrationError(
            "The pixel threshold has no good picture, or one whose map is not finite.",
            "Calibrate on good pictures.",
        )
    n = len(ordered)
    if n < needed_pictures(alpha):
        return ordered[-1], lowest_rate(n)
    return ordered[order_statistic(n, alpha) - 1], alpha
