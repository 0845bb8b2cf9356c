"""Ranking metrics: AUROC, average precision, F1-max.

One set of formulas serves pictures and pixels. They need each distinct defect score with the number
of good items above it and at or above it; a score is called a defect where `score >= threshold`.
Fawcett, "An introduction to ROC analysis", 2006; ties count one half, as in the Mann-Whitney statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fettle.errors import MetricError, UsageError

GOOD = "good"


@dataclass(frozen=True)
class DefectPoints:
    """The distinct scores of defect items, highest first, and the good items that they outrank.

    Attributes:
        count: (points,) int64, defect items with this score.
        above: (points,) int64, good items with a larger score.
        at_or_above: (points,) int64, good items with this score or a larger one.
        num_good: number of good items.
    """

    count: NDArray[np.int64]
    above: NDArray[np.int64]
    at_or_above: NDArray[np.int64]
    num_good: int

    @property
    def num_defect(self) -> int:
        return int(self.count.sum())


def auroc_of(points: DefectPoints) -> float:
    """Area under the ROC: 1 - sum (A + G) / (2 N P), with A, G good items above and at or above."""
    beaten_by = np.dot(
        points.count.astype(np.float64), (points.above + points.at_or_above).astype(np.float64)
    )
    return float(max(0.0, 1 - beaten_by / (2 * points.num_good * points.num_defect)))


def average_precision_of(points: DefectPoints) -> float:
    """Step-wise average precision: precision after each whole tie, weighted by the tie's recall."""
    true_positive = np.cumsum(points.count)
    precision = true_positive / (true_positive + points.at_or_above)
    return float(min(1.0, np.dot(points.count / points.num_defect, precision)))


def f1_max_of(points: DefectPoints) -> tuple[float, int]:
    """The best F1 over all thresholds and the index of its point; of equal ones the highest score."""
    true_positive = np.cumsum(points.count)
    f1 = 2 * true_positive / (true_positive + points.at_or_above + points.num_defect)
    best = int(np.argmax(f1))
    return float(f1[best]), best


def image_auroc(scores: ArrayLike, is_defect: ArrayLike) -> float | None:
    """Area under the ROC of pictures; None when there is no good or no defective picture.

    Args:
        scores: (n,) finite; larger is more anomalous.
        is_defect: (n,) bool, or integers 0 and 1.

    Raises:
        MetricError: a score is not finite, or the lengths differ.
    """
    points, _ = _image_points(scores, is_defect)
    return auroc_of(points) if _defined(points) else None


def average_precision(scores: ArrayLike, is_defect: ArrayLike) -> float | None:
    """Step-wise average precision of pictures, as `image_auroc` in arguments and errors."""
    points, _ = _image_points(scores, is_defect)
    return average_precision_of(points) if _defined(points) else None


def f1_max(scores: ArrayLike, is_defect: ArrayLike) -> tuple[float, float] | None:
    """The best F1 and its threshold, as `image_auroc` in arguments and errors.

    The threshold is an oracle: it is chosen on the test labels. Among equal maxima the highest wins.
    """
    points, levels = _image_points(scores, is_defect)
    if not _defined(points):
        return None
    value, best = f1_max_of(points)
    return value, float(levels[best])


@dataclass(frozen=True)
class ImageScores:
    """Image-level metrics of one group of defective pictures against all good ones.

    Attributes:
        image_auroc, image_ap, image_f1max: in 0..1; None where undefined.
        f1max_threshold_oracle: the threshold of image_f1max, chosen on the test labels.
        num_good, num_defective: pictures.
        reason: why the metrics are None; empty when they are not.
    """

    image_auroc: float | None
    image_ap: float | None
    image_f1max: float | None
    f1max_threshold_oracle: float | None
    num_good: int
    num_defective: int
    reason: str = ""


@dataclass(frozen=True)
class ImageResult:
    """Image-level metrics of all pictures, and by defect name."""

    overall: ImageScores
    per_defect: dict[str, ImageScores]


def image_metrics(scores: ArrayLike, defects: Sequence[str]) -> ImageResult:
    """All image-level metrics. A defect name's pictures are held against all good pictures.

    Args:
        scores: (n,) finite; larger is more anomalous.
        defects: n names; "good" for good pictures.

    Raises:
        MetricError: a score is not finite, or the lengths differ.
    """
    values = _finite(scores)
    names = np.array(defects, dtype=object)
    if values.shape != names.shape:
        raise MetricError(
            f"There are {values.size} scores and {names.size} defect names.", "Give one name a score."
        )
    good = names == GOOD
    per_defect = {
        name: _image_scores(values[good | (names == name)], names[good | (names == name)] == name)
        for name in sorted(set(defects) - {GOOD})
    }
    return ImageResult(_image_scores(values, ~good), per_defect)


def undefined_reason(num_good: int, num_defect: int, noun: str) -> str:
    """Why a ranking metric is undefined, in one sentence; empty when it is defined."""
    missing = [kind for kind, number in (("good", num_good), ("defect", num_defect)) if not number]
    return f"There is no {' and no '.join(missing)} {noun}." if missing else ""


def _image_scores(scores: NDArray[np.float64], is_defect: NDArray[np.bool_]) -> ImageScores:
    points, levels = _image_points(scores, is_defect)
    reason = undefined_reason(points.num_good, points.num_defect, "picture")
    if reason:
        return ImageScores(None, None, None, None, points.num_good, points.num_defect, reason)
    best_f1, best = f1_max_of(points)
    return ImageScores(
        image_auroc=auroc_of(points),
        image_ap=average_precision_of(points),
        image_f1max=best_f1,
        f1max_threshold_oracle=float(levels[best]),
        num_good=points.num_good,
        num_defective=points.num_defect,
    )


def _image_points(scores: ArrayLike, is_defect: ArrayLike) -> tuple[DefectPoints, NDArray[np.float64]]:
    """The points of float64 scores, and the distinct defect scores, highest first."""
    values = _finite(scores)
    labels = np.asarray(is_defect)
    if labels.shape != values.shape:
        raise MetricError(
            f"There are {values.size} scores and {labels.size} labels.", "Give one label a score."
        )
    if labels.size and labels.dtype != np.bool_ and not np.isin(labels, (0, 1)).all():
        raise UsageError("A label is neither 0 nor 1.", "Give 1 (or True) for a defect, 0 for good.")
    defect = labels.astype(bool)
    good = np.sort(values[~defect])
    levels, count = np.unique(values[defect], return_counts=True)
    levels, count = levels[::-1], count[::-1].astype(np.int64)
    above = good.size - np.searchsorted(good, levels, side="right")
    at_or_above = good.size - np.searchsorted(good, levels, side="left")
    return DefectPoints(count, above, at_or_above, int(good.size)), levels


def _finite(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise MetricError(f"The scores have {values.ndim} dimensions.", "Give one score a picture.")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise MetricError(
            f"{bad.size} of {values.size} image scores are NaN or infinite, the first at index {bad[0]}.",
            "Find the picture and the step that made it; no metric is computed from such a score.",
        )
    return values


def _defined(points: DefectPoints) -> bool:
    return points.num_good > 0 and points.num_defect > 0
