"""Inspect labelled pictures and compute every metric: of one product, or of each, the mean and all pooled."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fettle.calibration import Calibration, order_statistic
from fettle.datasets.records import Record
from fettle.errors import FettleError
from fettle.evaluation import Evaluation, Promise
from fettle.images.decode import read_mask
from fettle.inspecting import Inspected, Inspector
from fettle.inspection import Refusal
from fettle.protocols import Json, Progress

Labelled: TypeAlias = "tuple[Inspected[Record], NDArray[np.bool_] | None]"

_AVERAGED = (
    *("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max"),
    *("aupro", "aupro_005", "aupimo", "frr_promised", "frr_measured", "escape_rate", "seconds_per_image"),
)
_REFINED = ("iou", "boundary_f", "hd95", "seconds_per_refined_image")  # where boundaries were measured
_SUMMED = ("num_good", "num_defective")


@dataclass
class LabelledRun:
    """One walk over labelled pictures.

    Attributes:
        inspector: gives the answers.
        known: hashes, 16 digits, of the pictures that the model has learnt from.
        each: called with every answer and its mask. refused: called with every record that could not be used.
        boundaries: with the metrics of boundaries too.
        refused_of, seen_of: by product, pictures that could not be used, and ones that were learnt from.
    """

    inspector: Inspector[Record]
    known: frozenset[str]
    progress: Progress
    each: Callable[[Inspected[Record], NDArray[np.bool_] | None], None] | None = None
    refused: Callable[[Record, Refusal], None] | None = None
    boundaries: bool = False
    refused_of: Counter[str] = field(default_factory=Counter, init=False)
    seen_of: Counter[str] = field(default_factory=Counter, init=False)

    def evaluate(self, records: Sequence[Record], calibration: Calibration) -> dict[str, Json]:
        """The metrics of one product's pictures (keys: docs/metrics.md)."""
        evaluation = self._evaluation(calibration)
        start = time.perf_counter()
        for answer, mask in self._walk(records, evaluation):
            self._take(answer, mask)
        return {**evaluation.compute(time.perf_counter() - start), **self._counts()}

    def evaluate_products(
        self, records: Sequence[Record], shared: Calibration, own: Callable[[str], Calibration]
    ) -> dict[str, Json]:
        """`per_product` by each product's thresholds, their plain `mean`, and all `pooled` by shared ones.

        In `pooled` a defect is named PRODUCT/DEFECT, and verdicts come from the one shared calibration.
        """
        pooled = self._evaluation(shared)
        per_product: dict[str, Evaluation] = {}
        for record in records:
            if record.product not in per_product:
                per_product[record.product] = self._evaluation(own(record.product))
        taken = dict.fromkeys(per_product, 0)
        start = time.perf_counter()
        for answer, mask in self._walk(records, per_product):
            record = answer.item
            taken[record.product] += 1
            label = record.defect if record.is_good else f"{record.product}/{record.defect}"
            verdict = shared.verdict(answer.inspection.score)
            pooled.update(replace(answer.inspection, verdict=verdict), label, mask)
            self._take(answer, mask)
        each = (time.perf_counter() - start) / max(sum(taken.values()), 1)
        results = {
            name: {**own_evaluation.compute(each * taken[name]), **self._counts(name)}
            for name, own_evaluation in per_product.items()
        }
        return {
            "per_product": cast("dict[str, Json]", results),
            "mean": _mean(list(results.values())),
            "pooled": pooled.compute(each * sum(taken.values())),
            **self._counts(),
        }

    def _walk(
        self, records: Sequence[Record], into: Evaluation | Mapping[str, Evaluation]
    ) -> Iterator[Labelled]:
        """Every answer that could be taken into its evaluation, with its mask."""
        for done, answer in enumerate(self.inspector.inspect(records), 1):
            self.progress("inspecting", done, len(records))
            record = answer.item if isinstance(answer, Inspected) else answer[0]
            try:
                if not isinstance(answer, Inspected):
                    raise FettleError(answer[1].reason)
                shape = answer.inspection.anomaly_map.shape
                mask = read_mask(record.mask, shape)[0] if record.mask else None
                evaluation = into if isinstance(into, Evaluation) else into[record.product]
                evaluation.update(answer.inspection, record.defect, mask)
            except FettleError as error:
                self.refused_of[record.product] += 1
                if self.refused is not None:
                    self.refused(record, Refusal(str(record.path), str(error)))
                continue
            yield answer, mask

    def _evaluation(self, calibration: Calibration) -> Evaluation:
        return Evaluation(
            promise_of(calibration), boundaries=self.boundaries, pixel_threshold=calibration.pixel_threshold
        )

    def _take(self, answer: Inspected[Record], mask: NDArray[np.bool_] | None) -> None:
        self.seen_of[answer.item.product] += answer.inspection.sha256[:16] in self.known
        if self.each is not None:
            self.each(answer, mask)

    def _counts(self, product: str | None = None) -> dict[str, Json]:
        """Of one product; None: of all pictures."""
        counted = {"num_refused": self.refused_of, "num_seen_in_fit": self.seen_of}
        return {key: of.total() if product is None else of[product] for key, of in counted.items()}


def promise_of(calibration: Calibration) -> Promise:
    """What a calibration promised, as the metrics need it."""
    rate, count = calibration.frr_promised, calibration.num_scores
    rank = None if rate is None else order_statistic(count, rate, calibration.confidence)
    return Promise(rate, calibration.promise_on, count, rank)


def _mean(results: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Plain means over products of what is defined for each of them; counts are sums.

    The promise has a mean only where all products have it on the same verdict.
    """
    mean: dict[str, Json] = {}
    for key in (*_AVERAGED, *(key for key in _REFINED if all(key in result for result in results))):
        values = [cast("float | None", result[key]) for result in results]
        defined = [value for value in values if value is not None]
        mean[key] = fmean(defined) if defined and len(defined) == len(values) else None
    on = {cast("str | None", result["promise_on"]) for result in results}
    mean["promise_on"] = on.pop() if len(on) == 1 else None
    if mean["promise_on"] is None:
        mean["frr_promised"] = None
    for key in _SUMMED:
        mean[key] = sum(cast(int, result[key]) for result in results)
    return mean
