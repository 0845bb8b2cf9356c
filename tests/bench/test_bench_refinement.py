"""One walk gives a refiner's figures in both ways that it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from fettle.bench.refinement import refine_and_measure
from fettle.calibration import Calibration, calibrate
from fettle.datasets.records import Record
from fettle.detector import Detector
from fettle.inspection import Inspection, Verdict

SIDE = 16
TRUTH = np.zeros((SIDE, SIDE), bool)
TRUTH[4:8, 4:8] = True


class StubDetector:
    """Its base map marks half of the truth too much; "f2pad" marks the truth itself."""

    calibration = calibrate([0.1] * 100, target_frr=0.05, mode="holdout", pixel_statistics=[0.5] * 100)
    of_coarse = calibrate([0.1] * 100, target_frr=0.05, mode="holdout", pixel_statistics=[0.95] * 100)

    def __init__(self, verdicts: dict[str, Verdict]) -> None:
        self.verdicts = verdicts
        self.products: set[str] = set()

    def refiner(self, name: str, *, everything: bool, settings: Any) -> str:
        assert everything
        return name

    def calibration_of(self, product: str) -> Calibration:
        return {"": self.calibration, "coarse": self.of_coarse}[product]

    def inspect(self, paths: list[Path], *, product: str, refine: str) -> Iterator[Inspection]:
        self.products.add(product)
        (path,) = paths
        values = np.zeros((SIDE, SIDE), np.float32)
        good = path.stem.startswith("good")
        if not good:
            values[4:8, 4:12] = 0.9
        plain = Inspection(
            str(path), 0.1 if good else 0.9, self.verdicts[path.stem], (), values, np.ones((SIDE, SIDE), bool)
        )
        if refine == "none" or good:
            yield plain
            return
        yield replace(
            plain, soft=TRUTH.astype(np.float32), refinement={"refined": "yes"}, seconds={"refine": 2.0}
        )


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    Image.fromarray(np.where(TRUTH, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    found = [Record(tmp_path / f"good{i}.png") for i in range(2)]
    return found + [Record(tmp_path / f"bad{i}.png", "dent", tmp_path / "mask.png") for i in range(2)]


def test_gated_takes_the_base_where_the_verdict_is_ok(records: list[Record]) -> None:
    detector = StubDetector(
        {"good0": Verdict.OK, "good1": Verdict.OK, "bad0": Verdict.REJECT, "bad1": Verdict.OK}
    )
    arms: dict[str, tuple[str, dict[str, object]]] = {"none": ("none", {}), "f2pad": ("f2pad", {"iters": 3})}
    parts = {"whole": records, "half": records[:3]}
    measured = refine_and_measure(cast(Detector, detector), parts, arms)
    half, found = (cast("dict[str, dict[str, dict[str, Any]]]", measured[name]) for name in ("half", "whole"))
    assert half["f2pad"]["gated"]["iou"] == pytest.approx(1.0)
    assert found["none"]["all"]["iou"] == pytest.approx(0.5)
    assert found["none"]["gated"]["iou"] == pytest.approx(0.5)
    assert found["f2pad"]["all"]["iou"] == pytest.approx(1.0)
    assert found["f2pad"]["gated"]["iou"] == pytest.approx(0.75)
    assert found["f2pad"]["all"]["states"] == {"yes": 2}
    assert found["f2pad"]["all"]["seconds_per_refined_image"] == 2.0
    assert found["f2pad"]["all"]["per_defect"]["dent"]["num_defective"] == 2


def test_a_products_thresholds_are_taken(records: list[Record]) -> None:
    """Its pixel threshold lies above the base map, which then marks nothing."""
    detector = StubDetector(dict.fromkeys(("good0", "good1", "bad0", "bad1"), Verdict.REVIEW))
    arms: dict[str, tuple[str, dict[str, object]]] = {"none": ("none", {})}
    measured = refine_and_measure(cast(Detector, detector), {"all": records}, arms, "coarse")
    assert cast("dict[str, dict[str, dict[str, Any]]]", measured["all"])["none"]["all"]["iou"] == 0
    assert detector.products == {"coarse"}
