"""Run folders as the commands open them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fettle.detector import Detector
    from fettle.report.run_folder import RunWriter


def open_run(detector: Detector, out: Path, *, overlays: bool = False) -> RunWriter:
    """A writer for the run folder `out`, with the model's card and thresholds."""
    from fettle.report.run_folder import RunWriter, Thresholds

    calibration = detector.calibration
    thresholds = Thresholds(calibration.t_review, calibration.t_reject, calibration.pixel_threshold)
    return RunWriter(out, card=detector.describe(), thresholds=thresholds, overlays=overlays)
