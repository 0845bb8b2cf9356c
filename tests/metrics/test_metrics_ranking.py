"""Image-level ranking metrics."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from fettle.errors import MetricError, UsageError
from fettle.metrics import average_precision, f1_max, image_auroc, image_metrics

GOLDEN = [
    ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75, 0.8333333, 0.8, 0.35),
    ([1, 2, 2, 3], [0, 0, 1, 1], 0.875, 0.8333333, 0.8, 2),
    ([5, 5, 5, 5, 5], [0, 0, 0, 1, 1], 0.5, 0.4, 0.5714286, 5),
    ([4, 3, 2, 1], [0, 0, 1, 1], 0, 0.4166667, 0.6666667, 1),
    ([1, 2, 3, 4], [0, 0, 1, 1], 1, 1, 1, 3),
    ([1, 1, 1, 2, 2, 3], [0, 1, 0, 1, 0, 1], 0.7222222, 0.7222222, 0.6666667, 2),
]


@pytest.mark.parametrize(("scores", "labels", "auroc", "precision", "f1", "threshold"), GOLDEN)
def test_golden_values(scores, labels, auroc, precision, f1, threshold):
    assert image_auroc(scores, labels) == pytest.approx(auroc, abs=5e-8)
    assert average_precision(scores, labels) == pytest.approx(precision, abs=5e-8)
    best = f1_max(scores, labels)
    assert best is not None
    assert best == (pytest.approx(f1, abs=5e-8), threshold)


@pytest.mark.parametrize("decimals", [0, 1, 12])
def test_agrees_with_scikit_learn(decimals):
    rng = np.random.default_rng(decimals)
    labels = rng.random(500) < 0.2
    scores = np.round(rng.normal(size=500) + labels, decimals)
    precision, recall, _ = precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):
        f1 = np.nanmax(2 * precision * recall / (precision + recall))
    assert image_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(
        average_precision_score(labels, scores), abs=1e-12
    )
    best = f1_max(scores, labels)
    assert best is not None
    assert best[0] == pytest.approx(f1, abs=1e-12)


def test_float64_scores_are_not_rounded():
    assert image_auroc([1.0, 1.0 + 1e-15], [0, 1]) == 1.0


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_undefined_without_both_classes(labels):
    scores = [0.1, 0.2]
    assert image_auroc(scores, labels) is None
    assert average_precision(scores, labels) is None
    assert f1_max(scores, labels) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", [image_auroc, average_precision, f1_max])
def test_scores_that_are_not_finite_are_refused(metric, bad):
    with pytest.raises(MetricError, match=r"1 of 3 image scores .* index 1"):
        metric([0.1, bad, 0.3], [0, 1, 1])


def test_lengths_and_labels_are_checked():
    with pytest.raises(MetricError, match="2 scores and 3 labels"):
        image_auroc([1, 2], [0, 1, 1])
    with pytest.raises(UsageError, match="neither 0 nor 1"):
        image_auroc([1, 2], [0, 255])
    with pytest.raises(MetricError, match="2 scores and 1 defect names"):
        image_metrics([1, 2], ["good"])


def test_image_auroc_is_the_weighted_mean_over_defects():
    rng = np.random.default_rng(3)
    names = rng.choice(["good", "crack", "stain", "dent"], 300).tolist()
    result = image_metrics(np.round(rng.normal(size=300) + [name == "crack" for name in names], 1), names)
    assert sorted(result.per_defect) == ["crack", "dent", "stain"]
    mean = sum(one.num_defective * one.image_auroc for one in result.per_defect.values())
    assert mean / result.overall.num_defective == pytest.approx(result.overall.image_auroc, abs=1e-12)
    assert {one.num_good for one in result.per_defect.values()} == {names.count("good")}


def test_image_metrics_say_why_they_are_undefined():
    result = image_metrics([0.1, 0.2], ["crack", "crack"])
    assert result.overall.image_auroc is None
    assert result.per_defect["crack"].reason == "There is no good picture."
