"""What pixel metrics answer: plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fettle.protocols import Json


@dataclass(frozen=True)
class PixelScores:
    """Pixel metrics of one group of defects against the good pixels of all pictures.

    Attributes:
        pixel_auroc, pixel_ap, pixel_f1max: in 0..1; None where undefined.
        f1max_threshold_oracle: the threshold of pixel_f1max, chosen on the test labels.
        aupro, aupro_005: area under the per-region-overlap curve up to FPR 0.3 and 0.05.
        num_defect_pixels, num_regions: inside the region of interest.
        num_defective: defective pictures, those without a usable mask included.
        reason: why the metrics are None; empty when they are not.
    """

    pixel_auroc: float | None
    pixel_ap: float | None
    pixel_f1max: float | None
    f1max_threshold_oracle: float | None
    aupro: float | None
    aupro_005: float | None
    num_defect_pixels: int
    num_regions: int
    num_defective: int
    reason: str


@dataclass(frozen=True)
class MetricState:
    """How exact the figures are.

    Attributes:
        exact: no score was moved by compaction.
        depth: highest level of merged buffers, good or defect.
        guarantee: bound on the relative error of the number of good pixels above any threshold, plus
            the bound on the error of the defects' shares; 0 when exact.
    """

    exact: bool
    depth: int
    guarantee: float


@dataclass(frozen=True)
class PixelResult(PixelScores):
    """What `PixelMetrics.compute` gives: the scores of all defects together, and more.

    Attributes:
        per_defect: the scores by defect name.
        state: how exact the figures are.
        num_good: good pictures.
        num_good_pixels: good pixels, those of defective pictures included.
        pictures_without_mask: defective pictures without a mask; in no pixel metric.
        empty_masks: defective pictures whose mask is empty; in no pixel metric.
    """

    per_defect: dict[str, PixelScores]
    state: MetricState
    num_good: int
    num_good_pixels: int
    pictures_without_mask: int
    empty_masks: int

    def to_json(self) -> dict[str, Json]:
        """Plain data by name; the state is called `metric_state`."""
        facts = asdict(self)
        facts["metric_state"] = facts.pop("state")
        return facts
