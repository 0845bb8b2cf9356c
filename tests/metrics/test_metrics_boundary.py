"""IoU, boundary F and Hausdorff-95."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from fettle.errors import MetricError, UsageError
from fettle.metrics import BoundaryMetrics, PixelMetrics, compare_masks
from fettle.metrics.boundary import mask_boundary


def box(top, left, height=10, width=10, side=64):
    mask = np.zeros((side, side), bool)
    mask[top : top + height, left : left + width] = True
    return mask


TRUTH = box(20, 20)
DOT = box(50, 50, 1, 1)
GOLDEN = {
    "same": (TRUTH, 1, 1, 0),
    "shifted by 2": (box(20, 22), 2 / 3, 1, 2),
    "shifted by 3": (box(20, 23), 0.5384615, 0.6111111, 3),
    "shifted by 5": (box(20, 25), 1 / 3, 0.5, 5),
    "dilated": (ndimage.binary_dilation(TRUTH, iterations=2), 0.5434783, 1, 2),
    "larger square": (box(17, 17, 16, 16), 0.390625, 0, 4.2426407),
    "one pixel more": (TRUTH | DOT, 100 / 101, 0.9863014, 0),
    "a second square": (TRUTH | box(45, 45), 0.5, 2 / 3, 33.9705755),
    "empty": (np.zeros((64, 64), bool), 0, 0, 90.5096680),
    # 168 of 4096 pixels lie within 2 px of the truth's boundary: F = 2 * 168 / (168 + 4096).
    "whole picture": (np.ones((64, 64), bool), 0.0244141, 336 / 4264, 36.6333106),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values(case):
    predicted, iou, boundary_f, hd95 = GOLDEN[case]
    row = compare_masks(predicted, TRUTH)
    assert (row.iou, row.boundary_f, row.hd95) == pytest.approx((iou, boundary_f, hd95), abs=1e-7)
    assert row.empty == (case == "empty")


def test_golden_values_in_the_corner():
    truth = box(0, 0)
    assert mask_boundary(truth).sum() == 19
    assert mask_boundary(TRUTH).sum() == 36
    row = compare_masks(box(0, 0, 12, 12), truth)
    assert row.iou == 25 / 36
    assert (row.boundary_f, row.hd95) == pytest.approx((0.9302326, 2.2360680), abs=5e-8)


def full_distances(predicted, truth):
    """Hausdorff-95 over the whole picture, boundary pixels found one by one."""
    edges = []
    for mask in (predicted, truth):
        height, width = mask.shape
        edges.append([
            (y, x)
            for y, x in np.argwhere(mask)
            if mask.all()
            or any(
                0 <= v < height and 0 <= u < width and not mask[v, u]
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            )
        ])  # fmt: skip
    apart = np.linalg.norm(np.array(edges[0])[:, None] - np.array(edges[1])[None], axis=2)
    return max(np.percentile(apart.min(axis=1), 95), np.percentile(apart.min(axis=0), 95))


masks = arrays(np.bool_, (9, 12), elements=st.booleans())


@settings(max_examples=40, deadline=None)
@given(masks.filter(np.any), masks.filter(np.any))
def test_the_crop_changes_no_distance(predicted, truth):
    assert compare_masks(predicted, truth).hd95 == pytest.approx(full_distances(predicted, truth), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(masks.filter(np.any), masks.filter(np.any))
def test_boundary_f_and_hd95_are_symmetric(one, other):
    there, back = compare_masks(one, other), compare_masks(other, one)
    assert (there.iou, there.hd95) == (back.iou, back.hd95)
    assert there.boundary_f == pytest.approx(back.boundary_f, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(masks.filter(np.any), masks.filter(np.any), st.integers(1, 5), st.integers(1, 5))
def test_moving_both_inside_the_picture_changes_nothing(one, other, down, right):
    def placed(mask, y, x):
        picture = np.zeros((18, 21), bool)
        picture[y : y + 9, x : x + 12] = mask
        return picture

    assert compare_masks(placed(one, 1, 1), placed(other, 1, 1)) == compare_masks(
        placed(one, 1 + down, 1 + right), placed(other, 1 + down, 1 + right)
    )


def test_both_masks_are_cut_by_the_roi():
    valid = box(0, 0, 25, 64)
    row = compare_masks(TRUTH | DOT, TRUTH, valid=valid)
    assert (row.iou, row.true_positive, row.hd95) == (1, 50, 0)
    with pytest.raises(MetricError, match=r"'p\.png' has an empty true mask"):
        compare_masks(TRUTH, DOT, valid=valid, path="p.png")


def test_sizes_are_checked():
    with pytest.raises(MetricError, match="sizes"):
        compare_masks(TRUTH, box(1, 1, side=32))
    with pytest.raises(UsageError, match="tau"):
        BoundaryMetrics(-1)


def collected(cases):
    metrics = BoundaryMetrics()
    for case in cases:
        metrics.update(GOLDEN[case][0], TRUTH, defect="dot" if "pixel" in case else "square", path=case)
    return metrics


def test_means_over_pictures():
    result = collected(GOLDEN).compute()
    assert result.num_pictures == 10
    assert result.empty_predictions == 1
    assert result.iou == pytest.approx(np.mean([case[1] for case in GOLDEN.values()]), abs=1e-7)
    assert result.hd95 == pytest.approx(np.mean([case[3] for case in GOLDEN.values()]), abs=1e-6)
    assert result.hd95_median == pytest.approx(np.median([case[3] for case in GOLDEN.values()]), abs=1e-6)
    assert result.per_defect["dot"].iou == result.per_defect["dot"].iou_pooled == 100 / 101
    assert result.per_defect["square"].num_pictures == 9


def test_order_merging_and_saving_change_no_bit():
    whole = collected(GOLDEN).compute()
    left, right = collected(list(GOLDEN)[6:]), collected(list(GOLDEN)[:6])
    left.merge_state(right)
    assert left.compute() == collected(reversed(GOLDEN)).compute() == whole
    saved = json.loads(json.dumps(left.state_dict()))
    assert BoundaryMetrics.from_state_dict(saved).compute() == whole
    with pytest.raises(MetricError, match="tau"):
        left.merge_state(BoundaryMetrics(1))
    left.reset()
    assert left.compute().iou is None


@pytest.mark.parametrize(
    "spoil",
    [{"tau": None}, {"tau": None, "rows": []}, {"tau": -1}, {"rows": None}, {"rows": [{}]}, {"rows": [3]}],
)
def test_a_damaged_state_is_refused(spoil):
    with pytest.raises(MetricError, match="boundary state"):
        BoundaryMetrics.from_state_dict({**collected(GOLDEN).state_dict(), **spoil})


def test_a_wrong_type_in_a_row_is_refused():
    state = collected(["same"]).state_dict()
    state["rows"][0]["hd95"] = "0"
    with pytest.raises(MetricError, match="wrong type"):
        BoundaryMetrics.from_state_dict(state)


def test_the_best_pooled_iou_follows_from_f1_max():
    rng = np.random.default_rng(1)
    maps, truths = rng.integers(0, 9, (3, 8, 8)).astype(np.float32), rng.random((3, 8, 8)) < 0.3
    pixel = PixelMetrics()
    for one, truth in zip(maps, truths, strict=True):
        pixel.update(one, truth, defect="any")
    best = pixel.compute()
    pooled = {}
    for threshold in range(9):
        metrics = BoundaryMetrics()
        for index, (one, truth) in enumerate(zip(maps, truths, strict=True)):
            metrics.update(one >= threshold, truth, defect="any", path=str(index))
        pooled[float(threshold)] = metrics.compute().iou_pooled
    assert max(pooled.values()) == pytest.approx(best.pixel_f1max / (2 - best.pixel_f1max), abs=1e-12)
    assert pooled[best.f1max_threshold_oracle] == max(pooled.values())
