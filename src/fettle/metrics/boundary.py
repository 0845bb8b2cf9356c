"""How well a predicted mask follows the true one: IoU, boundary F, Hausdorff-95.

For defective pictures with a mask, at a threshold fixed beforehand from good pictures. Boundary
figures depend on the resolution and have many variants in the literature: compare ours with ours only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from fettle.errors import MetricError, UsageError
from fettle.metrics.region import bounding_box
from fettle.protocols import Json

TAU = 2.0
"""The boundary F's tolerance, px."""


@dataclass(frozen=True, order=True)
class BoundaryRow:
    """One picture's figures.

    Attributes:
        path: the picture.
        defect: the defect's name.
        iou: |M and G| / |M or G|.
        true_positive, false_positive, false_negative: pixels.
        boundary_f: harmonic mean of the shares of boundary pixels within tau of the other boundary.
        hd95: the larger of the two directed 95th percentiles of boundary distances, px.
        empty: nothing was predicted.
    """

    path: str
    defect: str
    iou: float
    true_positive: int
    false_positive: int
    false_negative: int
    boundary_f: float
    hd95: float
    empty: bool


@dataclass(frozen=True)
class BoundaryScores:
    """Means over pictures; None where there is no picture.

    Attributes:
        iou, boundary_f, hd95: plain means; hd95 in px.
        iou_pooled: from the summed pixel counts.
        hd95_median: px; the mean is ruled by misses.
        num_pictures: defective pictures with a usable mask.
        empty_predictions: pictures where nothing was predicted.
    """

    iou: float | None
    iou_pooled: float | None
    boundary_f: float | None
    hd95: float | None
    hd95_median: float | None
    num_pictures: int
    empty_predictions: int


@dataclass(frozen=True)
class BoundaryResult(BoundaryScores):
    """The means over all pictures, and by defect name in `per_defect`. tau in px."""

    tau: float
    per_defect: dict[str, BoundaryScores]


class BoundaryMetrics:
    """Collects one row a picture; merging is concatenation.

    Args:
        tau: tolerance of the boundary F, px.
    """

    def __init__(self, tau: float = TAU) -> None:
        if not tau >= 0:
            raise UsageError(f"tau is {tau}.", "Give a tolerance of 0 px or more.")
        self.tau = tau
        self.rows: list[BoundaryRow] = []

    def reset(self) -> None:
        """Forget every picture."""
        self.rows = []

    def update(
        self,
        predicted: NDArray[np.bool_],
        truth: NDArray[np.bool_],
        *,
        defect: str,
        path: str,
        valid: NDArray[np.bool_] | None = None,
    ) -> None:
        """Take in one defective picture: two masks (H, W), both cut by `valid` (H, W).

        Raises:
            MetricError: sizes differ, or the true mask is empty inside `valid`.
        """
        self.rows.append(compare_masks(predicted, truth, self.tau, valid=valid, defect=defect, path=path))

    def merge_state(self, other: BoundaryMetrics) -> None:
        """Take in what `other` has seen; `other` stays as it is.

        Raises:
            MetricError: the two have different tau.
        """
        if other.tau != self.tau:
            raise MetricError(
                f"Boundary metrics at tau {self.tau} and {other.tau} px.", "Use one tau for both."
            )
        self.rows.extend(list(other.rows))

    def compute(self) -> BoundaryResult:
        """The means, summed in the order of the paths, so that no order of updates matters."""
        rows = sorted(self.rows)
        names = sorted({row.defect for row in rows})
        return BoundaryResult(
            **vars(_means(rows)),
            tau=self.tau,
            per_defect={name: _means([row for row in rows if row.defect == name]) for name in names},
        )

    def state_dict(self) -> dict[str, Json]:
        """All rows as JSON-able data."""
        rows: list[Json] = [asdict(row) for row in sorted(self.rows)]
        return {"tau": self.tau, "rows": rows}

    @classmethod
    def from_state_dict(cls, state: dict[str, Json]) -> BoundaryMetrics:
        """The metrics that `state_dict` described.

        Raises:
            MetricError: the state is damaged.
        """
        tau, rows = state.get("tau"), state.get("rows")
        if isinstance(tau, bool) or not isinstance(tau, int | float) or not tau >= 0:
            raise MetricError("The boundary state has no tau of 0 px or more.", "Compute it again.")
        metrics = cls(float(tau))
        kinds = {
            "path": str, "defect": str, "iou": float, "true_positive": int, "false_positive": int,
            "false_negative": int, "boundary_f": float, "hd95": float, "empty": bool,
        }  # fmt: skip
        for row in rows if isinstance(rows, list) else [None]:
            sound = isinstance(row, dict) and row.keys() == kinds.keys()
            if not isinstance(row, dict) or not sound:
                raise MetricError("The boundary state is damaged.", "Compute it again.")
            if any(type(row[name]) is not kind for name, kind in kinds.items()):
                raise MetricError("The boundary state has a field of a wrong type.", "Compute it again.")
            metrics.rows.append(BoundaryRow(**row))  # type: ignore[arg-type]  # checked field by field above
        return metrics


def compare_masks(
    predicted: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    tau: float = TAU,
    *,
    valid: NDArray[np.bool_] | None = None,
    defect: str = "",
    path: str = "",
) -> BoundaryRow:
    """IoU, boundary F and Hausdorff-95 of two masks (H, W), both cut by `valid` (H, W).

    An empty prediction has IoU and F of 0 and the picture's diagonal as distance.

    Raises:
        MetricError: sizes differ, or `truth` is empty inside `valid`.
    """
    sizes = {predicted.shape, truth.shape} | ({valid.shape} if valid is not None else set())
    if len(sizes) > 1 or truth.ndim != 2:
        raise MetricError(
            f"Picture '{path}' has masks of sizes {sorted(sizes)}.", "Give masks of one size (H, W)."
        )
    if valid is not None:
        predicted, truth = predicted & valid, truth & valid
    box = bounding_box(predicted | truth)
    if box is None or not truth[box].any():
        raise MetricError(
            f"Picture '{path}' has an empty true mask.", "Leave good pictures out of boundary metrics."
        )
    true_positive = int(np.count_nonzero(predicted[box] & truth[box]))
    false_positive = int(np.count_nonzero(predicted[box])) - true_positive
    false_negative = int(np.count_nonzero(truth[box])) - true_positive
    empty = true_positive + false_positive == 0
    if empty:
        boundary_f, hd95 = 0.0, float(np.hypot(*truth.shape))
    else:
        boundary_f, hd95 = _boundary_distances(predicted, truth, box, tau)
    iou = true_positive / (true_positive + false_positive + false_negative)
    return BoundaryRow(
        path, defect, iou, true_positive, false_positive, false_negative, boundary_f, hd95, empty
    )


def mask_boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a mask (H, W) that have a 4-neighbour outside it.

    The picture's edge is not "outside". A mask that fills the picture is its own boundary.
    """
    if mask.all():
        return mask.copy()
    padded = np.pad(mask, 1, constant_values=True)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline: NDArray[np.bool_] = mask & ~inner
    return outline


def _boundary_distances(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], box: tuple[slice, slice], tau: float
) -> tuple[float, float]:
    """Boundary F and Hausdorff-95 of two masks that are not empty, inside the box that holds both."""
    from scipy import ndimage

    # One pixel more on each side, where the picture has it, so that the crop's edge is no picture's edge.
    rows, columns = (slice(max(side.start - 1, 0), side.stop + 1) for side in box)
    ours, theirs = mask_boundary(predicted[rows, columns]), mask_boundary(truth[rows, columns])
    to_truth = ndimage.distance_transform_edt(~theirs)[ours]
    to_predicted = ndimage.distance_transform_edt(~ours)[theirs]
    precision, recall = float(np.mean(to_truth <= tau)), float(np.mean(to_predicted <= tau))
    both = precision + recall
    boundary_f = 2 * precision * recall / both if both else 0.0
    return boundary_f, float(max(np.percentile(to_truth, 95), np.percentile(to_predicted, 95)))


def _means(rows: Sequence[BoundaryRow]) -> BoundaryScores:
    if not rows:
        return BoundaryScores(None, None, None, None, None, 0, 0)
    true_positive = sum(row.true_positive for row in rows)
    union = sum(row.true_positive + row.false_positive + row.false_negative for row in rows)
    distances = [row.hd95 for row in rows]
    return BoundaryScores(
        iou=sum(row.iou for row in rows) / len(rows),
        iou_pooled=true_positive / union,
        boundary_f=sum(row.boundary_f for row in rows) / len(rows),
        hd95=sum(distances) / len(rows),
        hd95_median=float(np.median(distances)),
        num_pictures=len(rows),
        empty_predictions=sum(row.empty for row in rows),
    )
