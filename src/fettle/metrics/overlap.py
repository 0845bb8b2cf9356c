"""Per-image overlap: how much of each defect is found while good pictures stay almost clean.

AUPIMO (Bertoldo et al., arXiv 2401.01984): for each defective picture the recall of its defect pixels is
taken over the false-positive rate of *good pictures alone*, averaged over these pictures, and integrated on
a logarithmic axis from 1e-5 to 1e-4. A picture's value is 1 when its whole defect is found at one false
pixel in a hundred thousand, 0 when nothing of it is found at one in ten thousand.

The recall at a rate f is the largest that a threshold reaches whose rate does not exceed f: a step
function, integrated exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fettle.errors import MetricError

LOW, HIGH = 1e-5, 1e-4
_TAIL = 0.01  # share of each good picture's pixels that is kept: enough for 100 pictures whatever they hold


@dataclass(frozen=True)
class OverlapResult:
    """AUPIMO of each defective picture.

    Attributes:
        per_picture: by path, in 0..1.
        reason: why there is none; empty otherwise.
    """

    per_picture: dict[str, float]
    reason: str = ""

    def mean(self, paths: set[str] | None = None) -> float | None:
        """Mean over all pictures, or over these; None without any."""
        values = [value for path, value in self.per_picture.items() if paths is None or path in paths]
        return float(np.mean(values)) if values else None


class PerImageOverlap:
    """Takes pictures one at a time; keeps a good picture's highest 1 % and a defective one's defect pixels.

    Args:
        low, high: false-positive rates between which recall is integrated.
    """

    def __init__(self, low: float = LOW, high: float = HIGH) -> None:
        self._low, self._high = low, high
        self._tails: list[NDArray[np.float32]] = []  # highest scores of each good picture, ascending
        self._sizes: list[int] = []
        self._defects: dict[str, NDArray[np.float32]] = {}

    def add_good(self, anomaly_map: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
        """A good picture's map (H, W)."""
        scores = anomaly_map[valid]
        if not scores.size:
            return
        kept = min(max(math.ceil(_TAIL * scores.size), 1), scores.size)
        tail = np.partition(scores, scores.size - kept)[scores.size - kept :]
        self._tails.append(np.sort(tail))
        self._sizes.append(scores.size)

    def add_defective(
        self,
        path: str,
        anomaly_map: NDArray[np.float32],
        mask: NDArray[np.bool_],
        valid: NDArray[np.bool_],
    ) -> None:
        """A defective picture's map and mask (H, W). One without a defect pixel inside `valid` is left out.

        Raises:
            MetricError: the path was seen before.
        """
        if path in self._defects:
            raise MetricError(f"The picture '{path}' came twice.", "List each picture once.")
        scores = anomaly_map[mask & valid]
        if scores.size:
            self._defects[path] = np.sort(scores)

    def merge_state(self, other: PerImageOverlap) -> None:
        """Take in all that `other` has seen."""
        self._tails += other._tails
        self._sizes += other._sizes
        self._defects |= other._defects

    def compute(self) -> OverlapResult:
        """The values of all defective pictures seen."""
        if not self._tails:
            return OverlapResult({}, "There is no good picture.")
        scores = np.concatenate(self._tails)
        weights = np.repeat(
            1 / (len(self._sizes) * np.array(self._sizes)), [len(tail) for tail in self._tails]
        )
        order = np.argsort(-scores, kind="stable")
        scores, rates = scores[order], np.cumsum(weights[order])
        last_of_tie = np.append(scores[1:] != scores[:-1], True)
        thresholds, rates = scores[last_of_tie], rates[last_of_tie]  # rate of pixels at or above each
        within = int(np.searchsorted(rates, self._high, side="right"))
        cut = max(
            (tail[0] for tail, size in zip(self._tails, self._sizes, strict=True) if len(tail) < size),
            default=-np.inf,
        )
        if within >= len(thresholds) or thresholds[within] < cut:
            return OverlapResult(
                {}, "A good picture has so many high scores that its kept tail is too short."
            )
        # Between rates[k - 1] and rates[k] the threshold may fall to just above thresholds[k].
        thresholds = thresholds[: within + 1]
        edges = np.clip(np.concatenate([[0.0], rates[: within + 1]]), self._low, self._high)
        widths = np.diff(np.log(edges)) / math.log(self._high / self._low)
        values = {
            path: float(np.dot(widths, 1 - np.searchsorted(defect, thresholds, side="right") / len(defect)))
            for path, defect in self._defects.items()
        }
        return OverlapResult(values)
