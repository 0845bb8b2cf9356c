"""Metrics of a labelled run from inspections."""

from __future__ import annotations

import itertools
import json
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
