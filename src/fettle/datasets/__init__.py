"""Data sets: every layout is read into one `Dataset` of `Record`s."""

from __future__ import annotations

from fettle.datasets.open import LAYOUTS, open_dataset
from fettle.datasets.records import GOOD, Dataset, Record

__all__ = ["GOOD", "LAYOUTS", "Dataset", "Record", "open_dataset"]
