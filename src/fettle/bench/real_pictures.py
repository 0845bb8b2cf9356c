"""The real products of the studies, under the folder that FETTLE_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

from fettle.bench.layouts import drawn_layout, pasted_layout, turned_layout
from fettle.datasets.open import open_dataset
from fettle.datasets.products import merge_datasets
from fettle.datasets.records import Dataset
from fettle.errors import UsageError

REAL_PRODUCTS = {
    "screw": "split_screw_mixed.csv",
    "magnetic_tile": "split_magnetic_tile.csv",
    "battery_weld": "battery_weld",
    "fabric": "fabric",
}
ALL = "real"
PASTED = "pasted_"
DRAWN = "drawn_"
TURNED = "turned_"


def open_real(name: str) -> Dataset:
    """A product by name; "real" for all of them; "pasted_NAME" or "drawn_NAME" without a real defect;
    "turned_NAME" in four orientations.

    Raises:
        UsageError: FETTLE_DATA is not set.
    """
    folder = os.environ.get("FETTLE_DATA")
    if folder is None:
        raise UsageError("FETTLE_DATA is not set.", "Name the folder of the real pictures with it.")
    if name == ALL:
        return merge_datasets({product: open_real(product) for product in REAL_PRODUCTS})
    if name.startswith(PASTED):
        product = name.removeprefix(PASTED)
        return open_dataset(pasted_layout([r.path for r in open_real(product).good_for_training()], product))
    if name.startswith(DRAWN):
        product = name.removeprefix(DRAWN)
        return open_dataset(drawn_layout([r.path for r in open_real(product).good_for_training()], product))
    if name.startswith(TURNED):
        product = name.removeprefix(TURNED)
        return open_dataset(turned_layout(open_real(product), product))
    return open_dataset(Path(folder) / REAL_PRODUCTS[name])
