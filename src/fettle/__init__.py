"""Fettle: visual anomaly detection on manufactured parts, learnt from good pictures alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fettle.detector import Detector
    from fettle.inspection import Inspection, Refusal, Region, Verdict

__version__ = "0.1.0"
__all__ = ["Detector", "Inspection", "Refusal", "Region", "Verdict", "__version__"]

_HOME = {
    "Detector": "fettle.detector",
    "Inspection": "fettle.inspection",
    "Refusal": "fettle.inspection",
    "Region": "fettle.inspection",
    "Verdict": "fettle.inspection",
}


def __getattr__(name: str) -> object:
    """Public names are imported when first used, so that `import fettle` loads no torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fettle' has no attribute '{name}'")
