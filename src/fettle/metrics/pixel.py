"""Pixel metrics of a product, one picture at a time, in bounded memory, mergeable.

Exact on float32 scores while the buffers hold, and beyond as long as few scores are distinct; else
the ranks are compacted with a guaranteed relative error (`compaction`).
"""

from __future__ import annotations

import warnings
from copy import deepcopy

import numpy as np
from numpy.typing import NDArray

from fettle.errors import MetricError, UsageError
from fettle.metrics.compaction import Run
from fettle.metrics.keys import key_scores, score_keys
from fettle.metrics.pixel_scores import MetricState, PixelResult, PixelScores
from fettle.metrics.pixel_state import PixelState, pack_state, unpack_state
from fettle.metrics.ranking import (
    GOOD,
    DefectPoints,
    auroc_of,
    average_precision_of,
    f1_max_of,
    undefined_reason,
)
from fettle.metrics.region import MAX_REGIONS, aupro_of, mask_regions
from fettle.metrics.streaming import DefectPixels, GoodPixels, joined
from fettle.protocols import Json

FPR_LIMIT = 0.3
FPR_LIMIT_STRICT = 0.05
_BLOCK = 1 << 17  # pixels a step


class PixelMetrics:
    """AUROC, AP, F1-max and AUPRO over the pixels of many pictures.

    Args:
        max_pixels_exact: good pixels that the buffer holds (4 bytes each); below it all is exact.
            None keeps every pixel, defects included: exact at any size, memory without bound.
        max_defect_pixels_exact: defect pixels that the buffers hold (12 bytes each).
        rank_resolution: K of the compaction: relative error about 1/K a level.
    """

    def __init__(
        self,
        max_pixels_exact: int | None = 1 << 23,
        *,
        max_defect_pixels_exact: int = 1 << 19,
        rank_resolution: int = 1 << 14,
    ) -> None:
        for name, value in (
            ("max_pixels_exact", max_pixels_exact),
            ("max_defect_pixels_exact", max_defect_pixels_exact),
            ("rank_resolution", rank_resolution),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}.", "Give a whole number of at least 1.")
        self.max_pixels_exact = max_pixels_exact
        self.max_defect_pixels_exact = max_defect_pixels_exact
        self.rank_resolution = rank_resolution
        self.reset()

    def reset(self) -> None:
        """Forget every picture."""
        self._good = GoodPixels(self.max_pixels_exact, self.rank_resolution)
        unbounded = self.max_pixels_exact is None
        self._defects = DefectPixels(
            None if unbounded else self.max_defect_pixels_exact, self.rank_resolution
        )
        self._pictures: dict[str, int] = {}
        self._regions: dict[str, int] = {}
        self._without_mask = 0
        self._empty_masks = 0

    def update(
        self,
        anomaly_map: NDArray[np.floating],
        mask: NDArray[np.bool_] | None,
        *,
        defect: str = GOOD,
        valid: NDArray[np.bool_] | None = None,
        path: str = "",
    ) -> None:
        """Take one picture in.

        A defective picture without a mask, or with an empty one, is counted and enters no pixel
        metric: nobody knows which of its pixels are good. One whose defect lies wholly outside
        `valid` adds its valid pixels as good ones.

        Args:
            anomaly_map: (H, W) float at the mask's own size; larger is more anomalous.
            mask: (H, W) bool, True on defect pixels, or None.
            defect: the defect's name, or "good".
            valid: (H, W) bool, the region of interest; pixels outside are in no count. None: all.
            path: the picture's path, for messages.

        Raises:
            MetricError: NaN or infinity inside `valid`, sizes that differ, a good picture with a
                nonempty mask, or too many regions. Nothing is taken in then.
        """
        picture = f"Picture '{path}'" if path else "A picture"
        _check_shapes(picture, anomaly_map, mask, valid)
        scores = _finite_scores(picture, anomaly_map, valid)
        if defect == GOOD:
            if mask is not None and mask.any():
                raise MetricError(
                    f"{picture} is labelled good but its mask marks a defect.", "Mend its label or its mask."
                )
            self._add(scores.ravel())
        elif not defect:
            raise MetricError(f"{picture} has an empty defect name.", "Give the defect a name, or 'good'.")
        else:
            self._add_defective(picture, scores, mask, defect, valid)
            self._defects.open(defect)  # known even without a usable mask
        self._pictures[defect] = self._pictures.get(defect, 0) + 1

    def merge_state(self, other: PixelMetrics) -> None:
        """Take in all that `other` has seen; `other` stays as it is.

        Raises:
            MetricError: the two were made with different settings, or have too many regions together.
        """
        mine, theirs = self._config(), other._config()
        if mine != theirs:
            raise MetricError(
                f"Metric states with different settings cannot be merged: {mine} and {theirs}.",
                "Make both with the same settings.",
            )
        self._check_regions(sum(other._regions.values()))
        if other is self:
            other = deepcopy(other)
        self._good.merge(other._good)
        self._defects.merge(other._defects)
        for counts, more in ((self._pictures, other._pictures), (self._regions, other._regions)):
            for name, number in list(more.items()):
                counts[name] = counts.get(name, 0) + number
        self._without_mask += other._without_mask
        self._empty_masks += other._empty_masks

    def compute(self) -> PixelResult:
        """All metrics of the pictures seen so far. May be called at any time; the state stays."""
        runs = {name: self._defects.run(name) for name in self._defects.names}
        overall = joined(runs.values())
        above, at_or_above = self._good.tally(overall.keys)
        per_defect = {}
        for name, run in runs.items():
            found = slice(None) if run is overall else np.searchsorted(overall.keys, run.keys)
            per_defect[name] = self._scores(run, above[found], at_or_above[found], [name])
        resolution = self.rank_resolution
        return PixelResult(
            **vars(self._scores(overall, above, at_or_above, list(runs))),
            per_defect=per_defect,
            state=MetricState(
                exact=self._good.levels.steps == 0 and self._defects.steps == 0,
                depth=max(self._good.levels.depth, self._defects.depth),
                guarantee=(self._good.levels.steps + 2 * self._defects.steps) / resolution,
            ),
            num_good=self._pictures.get(GOOD, 0),
            num_good_pixels=self._good.total,
            pictures_without_mask=self._without_mask,
            empty_masks=self._empty_masks,
        )

    def aupro(self, limit: float) -> float | None:
        """AUPRO up to any FPR `limit` in (0, 1]; None where undefined.

        Raises:
            UsageError: `limit` is not in (0, 1].
        """
        run = joined(self._defects.run(name) for name in self._defects.names)
        points = _points(run, *self._good.tally(run.keys), self._good.total)
        defined = points.num_good and points.num_defect
        return aupro_of(points, run.mass[1, ::-1], limit) if defined else None

    def state_dict(self) -> PixelState:
        """All that was seen, as NumPy arrays by name and a JSON-able dict."""
        facts: dict[str, Json] = {
            **self._config(),
            "pictures": {**self._pictures},
            "regions": {**self._regions},
            "pictures_without_mask": self._without_mask,
            "empty_masks": self._empty_masks,
        }
        return pack_state(self._good, self._defects, facts)

    @classmethod
    def from_state_dict(cls, state: PixelState) -> PixelMetrics:
        """The metrics that `state_dict` described; going on from them gives the same bits.

        Raises:
            MetricError: the state is damaged or of another version.
        """
        loaded = unpack_state(state)
        metrics = cls.__new__(cls)
        metrics.max_pixels_exact = loaded.good.capacity
        metrics.max_defect_pixels_exact = loaded.max_defect_pixels_exact
        metrics.rank_resolution = loaded.good.resolution
        metrics._good, metrics._defects = loaded.good, loaded.defects
        metrics._pictures, metrics._regions = loaded.pictures, loaded.regions
        metrics._without_mask, metrics._empty_masks = loaded.pictures_without_mask, loaded.empty_masks
        return metrics

    def _config(self) -> dict[str, Json]:
        return {
            "max_pixels_exact": self.max_pixels_exact,
            "max_defect_pixels_exact": self.max_defect_pixels_exact,
            "rank_resolution": self.rank_resolution,
        }

    def _add_defective(
        self,
        picture: str,
        scores: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        defect: str,
        valid: NDArray[np.bool_] | None,
    ) -> None:
        if mask is None:
            self._without_mask += 1
            return
        regions = mask_regions(mask, valid)
        if not regions.num_regions and not mask.any():
            self._empty_masks += 1
            warnings.warn(
                f"{picture} is labelled '{defect}' but its mask is empty; it enters no pixel metric.",
                stacklevel=3,
            )
            return
        self._check_regions(regions.num_regions)
        is_defect = mask if valid is None else mask[valid]
        self._add(scores.ravel(), is_defect.ravel(), defect, regions.weights)
        self._regions[defect] = self._regions.get(defect, 0) + regions.num_regions

    def _add(
        self,
        scores: NDArray[np.float32],
        is_defect: NDArray[np.bool_] | None = None,
        defect: str = GOOD,
        weights: NDArray[np.int64] | None = None,
    ) -> None:
        """Pour pixels (n,) into the streams, in blocks that keep temporaries small."""
        taken = 0
        for first in range(0, scores.size, _BLOCK):
            block = slice(first, first + _BLOCK)
            keys = score_keys(scores[block])
            if is_defect is None or weights is None or not is_defect[block].any():
                self._good.add(keys)
                continue
            marked = keys[is_defect[block]]
            self._good.add(keys[~is_defect[block]])
            self._defects.add(defect, marked, weights[taken : taken + marked.size])
            taken += marked.size

    def _check_regions(self, more: int) -> None:
        if sum(self._regions.values()) + more >= MAX_REGIONS:
            raise MetricError(
                f"There are {MAX_REGIONS} defect regions or more, too many for one AUPRO.",
                "Evaluate products apart, or check whether the masks are noise.",
            )

    def _scores(
        self, run: Run, above: NDArray[np.int64], at_or_above: NDArray[np.int64], names: list[str]
    ) -> PixelScores:
        points = _points(run, above, at_or_above, self._good.total)
        counts = (
            points.num_defect,
            sum(self._regions.get(name, 0) for name in names),
            sum(self._pictures.get(name, 0) for name in names),
        )
        reason = undefined_reason(points.num_good, points.num_defect, "pixel")
        if reason:
            return PixelScores(None, None, None, None, None, None, *counts, reason)
        f1, best = f1_max_of(points)
        weight = run.mass[1, ::-1]
        return PixelScores(
            auroc_of(points),
            average_precision_of(points),
            f1,
            float(key_scores(run.keys[::-1][best : best + 1])[0]),
            aupro_of(points, weight, FPR_LIMIT),
            aupro_of(points, weight, FPR_LIMIT_STRICT),
            *counts,
            reason,
        )


def _points(
    run: Run, above: NDArray[np.int64], at_or_above: NDArray[np.int64], num_good: int
) -> DefectPoints:
    """The run's points from the highest score down."""
    return DefectPoints(run.mass[0, ::-1], above[::-1], at_or_above[::-1], num_good)


def _check_shapes(
    picture: str,
    anomaly_map: NDArray[np.floating],
    mask: NDArray[np.bool_] | None,
    valid: NDArray[np.bool_] | None,
) -> None:
    if anomaly_map.ndim != 2 or not np.issubdtype(anomaly_map.dtype, np.floating):
        raise MetricError(
            f"{picture} has a map of shape {anomaly_map.shape} and type {anomaly_map.dtype}.",
            "Give a float map (H, W).",
        )
    for name, array in (("mask", mask), ("region of interest", valid)):
        if array is None:
            continue
        if array.dtype != np.bool_:
            raise MetricError(f"{picture} has a {name} of type {array.dtype}.", "Give a bool array.")
        if array.shape != anomaly_map.shape:
            raise MetricError(
                f"{picture} has a map of size {anomaly_map.shape} and a {name} of size {array.shape}.",
                "Bring the map to the picture's own size first.",
            )


def _finite_scores(
    picture: str, anomaly_map: NDArray[np.floating], valid: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """The scores as float32: (H, W), or the valid ones (n,) in row-major order."""
    with np.errstate(over="ignore", invalid="ignore"):
        scores = (anomaly_map if valid is None else anomaly_map[valid]).astype(np.float32, copy=False)
    finite = np.isfinite(scores)
    if not finite.all():
        raise MetricError(
            f"{picture} has {int(scores.size - np.count_nonzero(finite))} NaN or infinite map values.",
            "Find the step that made them; no metric is computed from such a map.",
        )
    return scores
