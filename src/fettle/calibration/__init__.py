"""Thresholds and verdicts with a promise, from good pictures alone. No torch here."""

from fettle.calibration.conformal import Calibration, Escapes, Mode, calibrate, escape_rates
from fettle.calibration.pixels import pixel_statistic, pixel_threshold
from fettle.calibration.regions import RegionRules, find_regions
from fettle.calibration.running_share import RunningShare
from fettle.calibration.thresholds import cross_p_value, needed_pictures, order_statistic, upper_bound

__all__ = [
    "Calibration",
    "Escapes",
    "Mode",
    "RegionRules",
    "RunningShare",
    "calibrate",
    "cross_p_value",
    "escape_rates",
    "find_regions",
    "needed_pictures",
    "order_statistic",
    "pixel_statistic",
    "pixel_threshold",
    "upper_bound",
]
