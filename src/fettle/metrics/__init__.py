"""Evaluation metrics: exact on few pictures, bounded in memory on many, mergeable. No torch."""

from fettle.metrics.boundary import BoundaryMetrics, BoundaryResult, BoundaryScores, compare_masks
from fettle.metrics.pixel import PixelMetrics
from fettle.metrics.pixel_scores import MetricState, PixelResult, PixelScores
from fettle.metrics.pixel_state import PixelState
from fettle.metrics.ranking import (
    ImageResult,
    ImageScores,
    average_precision,
    f1_max,
    image_auroc,
    image_metrics,
)
from fettle.metrics.rates import (
    Rate,
    clopper_pearson,
    conformal_rank,
    consistency_p_value,
    measured_rate,
    needed_pictures,
    needed_pictures_confident,
    promise_confidence,
)

__all__ = [
    "BoundaryMetrics",
    "BoundaryResult",
    "BoundaryScores",
    "ImageResult",
    "ImageScores",
    "MetricState",
    "PixelMetrics",
    "PixelResult",
    "PixelScores",
    "PixelState",
    "Rate",
    "average_precision",
    "clopper_pearson",
    "compare_masks",
    "conformal_rank",
    "consistency_p_value",
    "f1_max",
    "image_auroc",
    "image_metrics",
    "measured_rate",
    "needed_pictures",
    "needed_pictures_confident",
    "promise_confidence",
]
