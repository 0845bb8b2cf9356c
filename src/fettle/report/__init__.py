"""The run folder, the overlays and the static HTML report."""

from fettle.report.page import write_report
from fettle.report.run_folder import RunSummary, RunWriter, Thresholds

__all__ = ["RunSummary", "RunWriter", "Thresholds", "write_report"]
