"""Metrics of a labelled run from inspections."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from fettle.errors import MetricError
from fettle.evaluation import Evaluation, Promise
from fettle.inspection import Inspection, Verdict
from fettle.protocols import Json

NO_PROMISE = Promise(None, None, 0, None)
ON_REJECT = Promise(0.01, "reject", 99, 99)
NUMBERS = itertools.count()
ON_REVIEW = Promise(0.05, "review", 24, 24)


def inspection(
    score: float,
    verdict: Verdict = Verdict.OK,
    anomaly_map: NDArray[np.float32] | None = None,
    valid: NDArray[np.bool_] | None = None,
    path: str = "",
) -> Inspection:
    """One answer; each with a path of its own, unless it is named."""
    own = np.full((16, 16), score, np.float32) if anomaly_map is None else anomaly_map
    seen = np.ones(own.shape, bool) if valid is None else valid
    return Inspection(path or f"{next(NUMBERS)}.png", score, verdict, (), own, seen)


def a_mask(rows: slice = slice(4, 8)) -> NDArray[np.bool_]:
    mask = np.zeros((16, 16), bool)
    mask[rows, 2:10] = True
    return mask


def test_image_and_pixel_metrics_agree_with_another_library() -> None:
    rng = np.random.default_rng(0)
    evaluation = Evaluation(NO_PROMISE)
    scores, labels, pixels, truth = [], [], [], []
    for i in range(30):
        bad = i % 3 == 0
        mask = a_mask() if bad else np.zeros((16, 16), bool)
        own = (rng.normal(size=(16, 16)) + 2 * mask).astype(np.float32)
        evaluation.update(inspection(float(own.max()), anomaly_map=own), "dent" if bad else "good", mask)
        scores.append(float(own.max()))
        labels.append(bad)
        pixels.append(own.ravel())
        truth.append(mask.ravel())
    result = evaluation.compute(3.0)
    flat, marked = np.concatenate(pixels), np.concatenate(truth)
    assert result["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["image_ap"] == pytest.approx(average_precision_score(labels, scores))
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(marked, flat))
    assert result["pixel_ap"] == pytest.approx(average_precision_score(marked, flat))
    assert (result["num_good"], result["num_defective"]) == (20, 10)
    assert result["seconds_per_image"] == pytest.approx(0.1)


def test_result_is_json_without_nan() -> None:
    evaluation = Evaluation(ON_REJECT)
    for verdict in Verdict:
        evaluation.update(inspection(0.5, verdict), "good", None)
        evaluation.update(inspection(0.7, verdict), "dent", a_mask())
    text = json.dumps(evaluation.compute(1.0), allow_nan=False)
    assert json.loads(text)["per_defect"]["dent"]["num_defective"] == 3


def run(promise: Promise, good: list[Verdict], bad: list[Verdict]) -> dict[str, Json]:
    evaluation = Evaluation(promise)
    for verdict in good:
        evaluation.update(inspection(0.1, verdict), "good", None)
    for i, verdict in enumerate(bad):
        evaluation.update(inspection(0.9, verdict), ("dent", "stain")[i % 2], a_mask())
    return evaluation.compute(1.0)


OK, REVIEW, REJECT = Verdict.OK, Verdict.REVIEW, Verdict.REJECT
GOOD = [OK] * 6 + [REVIEW] * 3 + [REJECT]


@pytest.mark.parametrize(("promise", "rate"), [(ON_REJECT, 0.1), (ON_REVIEW, 0.4), (NO_PROMISE, 0.1)])
def test_false_rejects_are_of_the_verdict_that_the_promise_is_on(promise: Promise, rate: float) -> None:
    result = run(promise, GOOD, [REJECT])
    assert result["frr_measured"] == pytest.approx(rate)
    assert result["frr_promised"] == promise.frr and result["promise_on"] == promise.on
    assert result["review_rate_good"] == pytest.approx(0.3)
    low, high = cast("list[float]", result["frr_interval"])
    assert 0 <= low < rate < high <= 1


def test_p_value_tells_a_kept_promise_from_a_broken_one() -> None:
    kept, broken = run(ON_REJECT, [OK] * 100, []), run(ON_REJECT, [REJECT] * 30 + [OK] * 70, [])
    assert cast(float, kept["frr_p_value"]) > 0.3
    assert cast(float, broken["frr_p_value"]) < 1e-6
    assert run(NO_PROMISE, GOOD, [])["frr_p_value"] is None


def test_escapes_are_defects_passed_as_ok() -> None:
    result = run(ON_REJECT, [OK], [OK, REVIEW, REJECT, OK, REJECT, REJECT])  # dent, stain, dent, ...
    assert result["escape_rate"] == pytest.approx(2 / 6)
    per_defect = cast("dict[str, dict[str, Json]]", result["per_defect"])
    assert per_defect["dent"]["escape_rate"] == pytest.approx(1 / 3)
    assert per_defect["stain"]["escape_rate"] == pytest.approx(1 / 3)
    assert (per_defect["dent"]["num_defective"], result["num_defective"]) == (3, 6)


def test_what_is_undefined_is_null() -> None:
    nothing = Evaluation(ON_REJECT).compute(0.0)
    assert nothing["seconds_per_image"] is None and nothing["frr_measured"] is None
    assert nothing["image_auroc"] is None and nothing["escape_rate"] is None
    only_good = run(ON_REJECT, GOOD, [])
    assert only_good["image_auroc"] is None and only_good["escape_rate"] is None
    assert only_good["per_defect"] == {} and only_good["num_defective"] == 0
    only_bad = run(ON_REJECT, [], [REJECT])
    assert only_bad["image_auroc"] is None and only_bad["frr_measured"] is None
    assert only_bad["review_rate_good"] is None


def test_defect_without_a_mask_counts_for_the_picture_and_not_for_pixels() -> None:
    evaluation = Evaluation(ON_REJECT)
    evaluation.update(inspection(0.1), "good", None)
    evaluation.update(inspection(0.9, REJECT), "dent", None)
    result = evaluation.compute(1.0)
    assert result["image_auroc"] == 1.0 and result["pixel_auroc"] is None
    assert result["pictures_without_mask"] == 1


def test_pixels_outside_the_region_of_interest_are_in_no_count() -> None:
    valid = np.ones((16, 16), bool)
    valid[:, 12:] = False
    own = a_mask().astype(np.float32)
    own[:, 12:] = 5.0  # would outrank every defect pixel
    evaluation = Evaluation(NO_PROMISE)
    evaluation.update(inspection(1.0, anomaly_map=own, valid=valid), "dent", a_mask())
    assert evaluation.compute(1.0)["pixel_auroc"] == 1.0


@pytest.mark.parametrize(
    ("defect", "mask"),
    [("dent", np.ones((8, 8), bool)), ("good", a_mask()), ("", a_mask())],
)
def test_refused_picture_changes_no_metric(defect: str, mask: NDArray[np.bool_]) -> None:
    evaluation, plain = Evaluation(ON_REJECT), Evaluation(ON_REJECT)
    for one in (evaluation, plain):
        one.update(inspection(0.2), "good", None)
        one.update(inspection(0.9, REJECT), "dent", a_mask())
    with pytest.raises(MetricError, match=r"wrong\.png"):
        evaluation.update(inspection(0.5, path="wrong.png"), defect, mask)
    assert evaluation.compute(1.0) == plain.compute(1.0)


@pytest.mark.parametrize(("defect", "mask"), [("good", None), ("dent", a_mask()), ("dent", None)])
def test_picture_that_comes_twice_is_refused_and_changes_no_metric(
    defect: str, mask: NDArray[np.bool_] | None
) -> None:
    evaluation = Evaluation(ON_REJECT)
    evaluation.update(inspection(0.2, path="a.png"), "good", None)
    evaluation.update(inspection(0.9, REJECT, path="b.png"), "dent", a_mask())
    before = evaluation.compute(1.0)
    with pytest.raises(MetricError, match=r"b\.png' came twice"):
        evaluation.update(inspection(0.5, path="b.png"), defect, mask)
    assert evaluation.compute(1.0) == before


def test_map_that_is_nan_is_refused() -> None:
    own = np.full((16, 16), np.nan, np.float32)
    with pytest.raises(MetricError):
        Evaluation(NO_PROMISE).update(inspection(0.5, anomaly_map=own), "good", None)


# --- boundaries


BOUNDARY_KEYS = ("iou", "iou_pooled", "boundary_f", "hd95", "hd95_median", "empty_predictions")
ADDED = {*BOUNDARY_KEYS, "pixel_threshold", "seconds_per_refined_image"}


def in_64(rows: slice, columns: slice, value: float = 1.0) -> NDArray[np.float32]:
    own = np.zeros((64, 64), np.float32)
    own[rows, columns] = value
    return own


SQUARE = in_64(slice(20, 30), slice(20, 30)) > 0
SHIFTED = in_64(slice(20, 30), slice(23, 33))  # IoU 7 / 13, boundary F 0.6111, Hausdorff 3


def with_boundaries(pixel_threshold: float | None = 0.5) -> Evaluation:
    return Evaluation(NO_PROMISE, boundaries=True, pixel_threshold=pixel_threshold)


def test_boundaries_are_measured_where_the_map_is_above_the_threshold() -> None:
    """Golden values of one square and its shifted twin, and of a prediction that is empty."""
    evaluation = with_boundaries()
    evaluation.update(inspection(1.0, anomaly_map=0.7 * SHIFTED), "dent", SQUARE)
    evaluation.update(inspection(1.0, anomaly_map=0.4 * SHIFTED), "stain", SQUARE)
    evaluation.update(inspection(0.1, anomaly_map=0.7 * SHIFTED), "good", None)
    result = evaluation.compute(1.0)
    diagonal = 64 * 2**0.5
    assert result["iou"] == pytest.approx(7 / 13 / 2)
    assert result["iou_pooled"] == pytest.approx(70 / 230)
    assert result["boundary_f"] == pytest.approx(0.6111111 / 2)
    assert result["hd95"] == result["hd95_median"] == pytest.approx((3 + diagonal) / 2)
    assert (result["empty_predictions"], result["pixel_threshold"]) == (1, 0.5)
    assert result["seconds_per_refined_image"] is None
    per_defect = cast("dict[str, dict[str, Json]]", result["per_defect"])
    assert [per_defect[name]["iou"] for name in ("dent", "stain")] == [pytest.approx(7 / 13), 0.0]
    assert [per_defect[name]["hd95"] for name in ("dent", "stain")] == [3.0, pytest.approx(diagonal)]
    json.dumps(result, allow_nan=False)


def test_a_refiners_mask_is_measured_instead() -> None:
    """It is the labelled square, and the map says otherwise; with no threshold at all, too."""
    for threshold in (0.5, None):
        evaluation = with_boundaries(threshold)
        one = replace(inspection(1.0, anomaly_map=SHIFTED), soft=0.6 * SQUARE.astype(np.float32))
        evaluation.update(one, "dent", SQUARE)
        result = evaluation.compute(1.0)
        assert (result["iou"], result["boundary_f"], result["hd95"]) == (1.0, 1.0, 0.0)
        assert result["pixel_threshold"] == threshold


def test_without_a_threshold_nothing_is_marked() -> None:
    evaluation = with_boundaries(None)
    evaluation.update(inspection(1.0, anomaly_map=SHIFTED), "dent", SQUARE)
    result = evaluation.compute(1.0)
    assert (result["iou"], result["empty_predictions"], result["pixel_threshold"]) == (0.0, 1, None)


def test_boundaries_are_cut_by_the_region_of_interest() -> None:
    valid = np.ones((64, 64), bool)
    valid[:, 30:] = False
    evaluation = with_boundaries()
    evaluation.update(inspection(1.0, anomaly_map=SHIFTED, valid=valid), "dent", SQUARE)
    outside = inspection(1.0, anomaly_map=SHIFTED, valid=~SQUARE & valid)
    evaluation.update(outside, "dent", SQUARE)  # a defect outside is no defect
    result = evaluation.compute(1.0)
    assert result["iou"] == result["iou_pooled"] == pytest.approx(0.7)
    assert result["num_defective"] == 2


def test_refined_pictures_alone_are_in_their_mean_time() -> None:
    evaluation = with_boundaries()
    for i, seconds in enumerate((None, 0.25, 0.75)):
        times = {"compute": 9.0} if seconds is None else {"compute": 9.0, "refine": seconds}
        one = replace(inspection(1.0, anomaly_map=SHIFTED), seconds=times)
        evaluation.update(one, "good" if i == 1 else "dent", None if i == 1 else SQUARE)
    assert evaluation.compute(1.0)["seconds_per_refined_image"] == pytest.approx(0.5)


def test_what_no_picture_gives_is_null() -> None:
    evaluation = with_boundaries()
    evaluation.update(inspection(0.1), "good", None)
    evaluation.update(inspection(0.9), "dent", None)
    result = evaluation.compute(1.0)
    per_defect = cast("dict[str, dict[str, Json]]", result["per_defect"])
    for values in (result, per_defect["dent"]):
        assert [values[key] for key in BOUNDARY_KEYS[:-1]] == [None] * 5


def test_boundaries_come_only_where_they_are_asked_for() -> None:
    plain, more = Evaluation(NO_PROMISE), with_boundaries()
    for evaluation in (plain, more):
        evaluation.update(inspection(1.0, anomaly_map=SHIFTED, path="a.png"), "dent", SQUARE)
    without, found = plain.compute(1.0), more.compute(1.0)
    assert set(found) - set(without) == ADDED
    assert {key: found[key] for key in without if key != "per_defect"} == {
        key: value for key, value in without.items() if key != "per_defect"
    }


def test_a_refused_picture_changes_no_boundary() -> None:
    evaluation, plain = with_boundaries(), with_boundaries()
    for one in (evaluation, plain):
        one.update(inspection(1.0, anomaly_map=SHIFTED), "dent", SQUARE)
    with pytest.raises(MetricError, match=r"wrong\.png"):
        evaluation.update(inspection(1.0, anomaly_map=SHIFTED, path="wrong.png"), "dent", SQUARE[:32])
    assert evaluation.compute(1.0) == plain.compute(1.0)
