"""The pixel statistic and its threshold."""

from __future__ import annotations

import numpy as np
import pytest

from fettle.calibration import calibrate, pixel_statistic, pixel_threshold
from fettle.errors import CalibrationError, UsageError


@pytest.mark.parametrize(("beta", "most"), [(0.0, 0), (0.001, 1), (0.01, 10), (0.0015, 1), (0.3, 300)])
def test_at_most_a_share_beta_exceeds_the_statistic(beta: float, most: int) -> None:
    values = np.random.default_rng(0).random((20, 50), dtype=np.float32)
    statistic = pixel_statistic(values, np.ones((20, 50), bool), beta)
    assert (values > statistic).sum() == most  # and one more would be reached by the next lower value


def test_ties_keep_the_share() -> None:
    values = np.round(np.random.default_rng(0).random((20, 50)), 1).astype(np.float32)
    assert (values > pixel_statistic(values, np.ones((20, 50), bool), 0.03)).sum() <= 30


def test_pixels_outside_the_region_of_interest_do_not_count() -> None:
    values = np.zeros((4, 4), np.float32)
    values[0, 0] = 9
    valid = np.ones((4, 4), bool)
    valid[0, 0] = False
    assert pixel_statistic(values, valid, 0.0) == 0.0


def test_wrong_input_is_refused() -> None:
    good, valid = np.zeros((2, 2), np.float32), np.ones((2, 2), bool)
    with pytest.raises(CalibrationError, match="valid pixel"):
        pixel_statistic(good, ~valid)
    with pytest.raises(CalibrationError, match="NaN"):
        pixel_statistic(np.full((2, 2), np.nan, np.float32), valid)
    with pytest.raises(UsageError, match="differ"):
        pixel_statistic(good, np.ones((2, 3), bool))
    with pytest.raises(UsageError, match="share"):
        pixel_statistic(good, valid, 1.0)
    with pytest.raises(CalibrationError):
        pixel_threshold([], 0.01)


def test_threshold_takes_the_lowest_rate_that_the_count_allows() -> None:
    statistics = [float(value) for value in range(99)]
    assert pixel_threshold(statistics, 0.05) == (94.0, 0.05)
    assert pixel_threshold(statistics, 0.01) == (98.0, 0.01)
    assert pixel_threshold(statistics[:9], 0.01) == (8.0, 0.1)


def test_calibration_records_the_pixel_rate() -> None:
    scores = [float(value) for value in range(20)]
    calibration = calibrate(scores, mode="holdout", pixel_statistics=scores, pixel_beta=0.002)
    assert (calibration.pixel_threshold, calibration.pixel_beta) == (19.0, 0.002)
    assert calibration.pixel_alpha == pytest.approx(1 / 21)
    assert calibration.sentences()[-1].endswith("have more than 0.2 % of their pixels marked.")
    assert calibrate(scores, mode="holdout").pixel_threshold is None
