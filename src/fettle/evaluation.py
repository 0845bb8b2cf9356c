"""Metrics of a labelled run: inspections in, one JSON object out, see docs/metrics.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fettle.errors import MetricError
from fettle.inspection import Inspection, Verdict
from fettle.metrics.boundary import BoundaryMetrics, BoundaryScores
from fettle.metrics.overlap import PerImageOverlap
from fettle.metrics.pixel import PixelMetrics
from fettle.metrics.pixel_scores import PixelScores
from fettle.metrics.ranking import GOOD, ImageScores, image_metrics
from fettle.metrics.rates import consistency_p_value, measured_rate
from fettle.protocols import Json

_BOUNDARY_KEYS = ("iou", "iou_pooled", "boundary_f", "hd95", "hd95_median", "empty_predictions")


@dataclass(frozen=True)
class Promise:
    """What the calibration promised: the rate, the cut that it is on, and its rank k among n scores."""

    frr: float | None
    on: str | None
    num_scores: int
    rank: int | None


class Evaluation:
    """Takes inspections with their truth, one at a time, and computes every metric at the end.

    Args:
        promise: what the calibration promised.
        boundaries: with the metrics of boundaries too.
        pixel_threshold: for these; None: nothing is marked but what a refiner marks.
    """

    def __init__(
        self, promise: Promise, *, boundaries: bool = False, pixel_threshold: float | None = None
    ) -> None:
        self._promise = promise
        self._threshold = pixel_threshold
        self._boundaries = BoundaryMetrics() if boundaries else None
        self._refine_seconds: list[float] = []
        self._scores: list[float] = []
        self._defects: list[str] = []
        self._verdicts: list[Verdict] = []
        self._pixels = PixelMetrics()
        self._overlap = PerImageOverlap()
        self._paths: dict[str, None] = {}  # in their order

    def update(self, inspection: Inspection, defect: str, mask: NDArray[np.bool_] | None) -> None:
        """Take one picture in.

        Args:
            inspection: with its map at the picture's own size.
            defect: the defect's name, or "good".
            mask: (H, W) bool, or None.

        Raises:
            MetricError: map, mask or label that no metric may be computed from; nothing is taken in then.
        """
        if inspection.path in self._paths:
            raise MetricError(f"The picture '{inspection.path}' came twice.", "List each picture once.")
        if not math.isfinite(inspection.score):
            raise MetricError(f"The score of '{inspection.path}' is not finite.", "Look at its pixels.")
        self._pixels.update(
            inspection.anomaly_map, mask, defect=defect, valid=inspection.valid, path=inspection.path
        )
        if defect == GOOD:
            self._overlap.add_good(inspection.anomaly_map, inspection.valid)
        elif mask is not None:
            self._overlap.add_defective(inspection.path, inspection.anomaly_map, mask, inspection.valid)
            if self._boundaries is not None and (mask & inspection.valid).any():
                marks = inspection.marks(math.inf if self._threshold is None else self._threshold)
                self._boundaries.update(
                    marks, mask, defect=defect, path=inspection.path, valid=inspection.valid
                )
        if "refine" in inspection.seconds:
            self._refine_seconds.append(inspection.seconds["refine"])
        self._paths[inspection.path] = None
        self._scores.append(inspection.score)
        self._defects.append(defect)
        self._verdicts.append(inspection.verdict)

    def compute(self, seconds: float) -> dict[str, Json]:
        """Every metric; ratios in 0..1, null where undefined.

        Args:
            seconds: wall time of the whole run.
        """
        images = image_metrics(self._scores, self._defects)
        pixels = self._pixels.compute()
        overlap = self._overlap.compute()
        good = [v for v, d in zip(self._verdicts, self._defects, strict=True) if d == GOOD]
        boundaries = None if self._boundaries is None else self._boundaries.compute()
        per_defect: dict[str, Json] = {
            name: {
                **_image_keys(images.per_defect[name]),
                **_pixel_keys(pixels.per_defect[name]),
                "aupimo": overlap.mean(self._paths_of(name)),
                **self._escapes(name),
                **(_boundary_keys(boundaries.per_defect.get(name)) if boundaries else {}),
            }
            for name in images.per_defect
        }
        return {
            **_image_keys(images.overall),
            **_pixel_keys(pixels),
            "aupimo": overlap.mean(),
            **self._good_rates(good),
            **self._escapes(None),
            **(self._refined_keys(boundaries) if boundaries else {}),
            "num_good": len(good),
            "num_defective": len(self._defects) - len(good),
            "pictures_without_mask": pixels.pictures_without_mask,
            "empty_masks": pixels.empty_masks,
            "resolution": "picture",
            "metric_state": {
                "exact": pixels.state.exact,
                "depth": pixels.state.depth,
                "guarantee": pixels.state.guarantee,
            },
            "seconds_per_image": seconds / len(self._scores) if self._scores else None,
            "per_defect": per_defect,
        }

    def _refined_keys(self, boundaries: BoundaryScores) -> dict[str, Json]:
        times = self._refine_seconds
        return {
            **_boundary_keys(boundaries),
            "pixel_threshold": self._threshold,
            "seconds_per_refined_image": sum(times) / len(times) if times else None,
        }

    def _paths_of(self, name: str) -> set[str]:
        return {path for path, defect in zip(self._paths, self._defects, strict=True) if defect == name}

    def _good_rates(self, good: list[Verdict]) -> dict[str, Json]:
        """The false-reject rate counts the event that the promise is on."""
        promise = self._promise
        if promise.on == "review":
            events = sum(verdict is not Verdict.OK for verdict in good)
        else:
            events = sum(verdict is Verdict.REJECT for verdict in good)
        rate = measured_rate(events, len(good))
        p_value = None
        if promise.rank is not None and good:
            p_value = consistency_p_value(promise.num_scores, promise.rank, len(good), events)
        review = sum(verdict is Verdict.REVIEW for verdict in good)
        return {
            "frr_promised": promise.frr,
            "promise_on": promise.on,
            "frr_measured": rate.value,
            "frr_interval": _pair(rate.interval),
            "frr_p_value": p_value,
            "review_rate_good": review / len(good) if good else None,
        }

    def _escapes(self, name: str | None) -> dict[str, Json]:
        """Defective pictures passed as ok, of one defect name or of all."""
        verdicts = [
            verdict
            for verdict, defect in zip(self._verdicts, self._defects, strict=True)
            if defect != GOOD and name in (None, defect)
        ]
        rate = measured_rate(sum(verdict is Verdict.OK for verdict in verdicts), len(verdicts))
        return {"escape_rate": rate.value, "escape_interval": _pair(rate.interval)}


def _image_keys(scores: ImageScores) -> dict[str, Json]:
    return {
        "image_auroc": scores.image_auroc,
        "image_ap": scores.image_ap,
        "image_f1max": scores.image_f1max,
        "num_defective": scores.num_defective,
    }


def _pixel_keys(scores: PixelScores) -> dict[str, Json]:
    return {
        "pixel_auroc": scores.pixel_auroc,
        "pixel_ap": scores.pixel_ap,
        "pixel_f1max": scores.pixel_f1max,
        "aupro": scores.aupro,
        "aupro_005": scores.aupro_005,
        "num_regions": scores.num_regions,
    }


def _boundary_keys(scores: BoundaryScores | None) -> dict[str, Json]:
    if scores is None:  # none of the pictures has a mask
        return dict.fromkeys(_BOUNDARY_KEYS)
    return {key: getattr(scores, key) for key in _BOUNDARY_KEYS}


def _pair(interval: tuple[float, float] | None) -> Json:
    return None if interval is None else [interval[0], interval[1]]
