"""Pixel metrics where they are exact: golden values, rules of inputs, breakdown, state."""

import itertools
import json

import numpy as np
import pytest
from metric_oracles import feed, five, loop_aupro, region_weights, smooth_pictures, sorted_oracle
from sklearn.metrics import average_precision_score, roc_auc_score

from fettle.errors import FettleError, MetricError, UsageError
from fettle.metrics import PixelMetrics, PixelState

G2_MAP = np.array([[5, 5, 1, 1, 9], [5, 5, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 7]], np.float32)
G2_MASK = np.zeros((4, 5), bool)
G2_MASK[:2, :2] = G2_MASK[3, 4] = True


def judged(*pictures, valid=None):
    metrics = PixelMetrics()
    for one, mask in pictures:
        metrics.update(one, mask, defect="good" if mask is None else "scratch", valid=valid)
    return metrics


def g1():
    row = np.array([[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 8.5, 6.5]], np.float32)
    return judged((row, np.arange(12)[None] >= 10))


def g3():
    return judged((np.diag([3.0, 1.0, 2.0]).astype(np.float32), np.eye(3, dtype=bool)))


def g6():
    inside = np.ones((4, 5), bool)
    inside[0] = False
    return judged((G2_MAP, G2_MASK), valid=inside)


GOLDEN = {
    "G1": (g1, 0.8, 0.45, 4 / 7, 6.5, 1 / 3, 0, 0.8),
    "G2": (lambda: judged((G2_MAP, G2_MASK)), 14 / 15, 23 / 30, 10 / 11, 5, 7 / 9, 0, 14 / 15),
    "G3": (g3, 1, 1, 1, 1, 1, 1, 1),
    "G4": (lambda: judged((np.ones((4, 5)), G2_MASK)), 0.5, 0.25, 0.4, 1, 0.15, 0.025, 0.5),
    "G5": (
        lambda: judged((G2_MAP, G2_MASK), (np.full((4, 5), 6.0), None)),
        *(18 / 35, 0.2538462, 10 / 31, 5, 0.4523810, 0.2142857, 0.6857143),
    ),
    "G6": (g6, 1, 1, 1, 5, 1, 1, 1),
    "G7": (lambda: judged((-G2_MAP, G2_MASK)), 1 / 15, 0.2304094, 5 / 12, -7, 0, 0, 1 / 15),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values(case):
    build, auroc, precision, f1, threshold, aupro, aupro_005, aupro_1 = GOLDEN[case]
    metrics = build()
    result = metrics.compute()
    assert five(result) == pytest.approx([auroc, precision, f1, aupro, aupro_005], abs=5e-8)
    assert result.f1max_threshold_oracle == threshold
    assert metrics.aupro(1) == pytest.approx(aupro_1, abs=5e-8)
    assert result.state.exact


def test_diagonal_pixels_are_one_region():
    assert g3().compute().num_regions == 1


def test_a_region_cut_in_two_by_the_roi_stays_one():
    mask = np.zeros((3, 7), bool)
    mask[1, 1:6] = True
    valid = np.ones((3, 7), bool)
    valid[:, 3] = False
    result = judged((np.ones((3, 7)), mask), valid=valid).compute()
    assert (result.num_regions, result.num_defect_pixels) == (1, 4)


def test_a_defect_outside_the_roi_leaves_its_pictures_other_pixels_good():
    valid = np.ones((4, 5), bool)
    valid[:2] = False
    mask = np.zeros((4, 5), bool)
    mask[0, 0] = True
    result = judged((G2_MAP, mask), valid=valid).compute()
    assert (result.num_regions, result.num_good_pixels, result.pixel_auroc) == (0, 10, None)


@pytest.mark.parametrize("seed", range(12))
def test_aupro_agrees_with_the_loop_over_thresholds(seed):
    rng = np.random.default_rng(seed)
    maps = [rng.integers(0, 6 + 20 * (seed % 3), (7, 9)).astype(np.float32) for _ in range(3)]
    masks = [rng.random((7, 9)) < 0.25, rng.random((7, 9)) < 0.1, np.zeros((7, 9), bool)]
    metrics = feed(PixelMetrics(), maps, masks)
    for limit in (0.05, 0.3, 1.0):
        assert metrics.aupro(limit) == pytest.approx(loop_aupro(maps, masks, limit), abs=1e-10)


def test_agrees_with_scikit_learn_and_the_sorted_oracle():
    maps, masks = smooth_pictures(12, 64)
    result = feed(PixelMetrics(), maps, masks).compute()
    truth = sorted_oracle(maps.ravel(), region_weights(masks).ravel())
    assert result.pixel_auroc == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert result.pixel_ap == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert five(result) == pytest.approx(five(truth), abs=1e-9)
    assert result.f1max_threshold_oracle == truth.threshold


def test_the_two_oracles_agree():
    rng = np.random.default_rng(5)
    maps, masks = rng.integers(0, 30, (4, 8, 8)).astype(np.float32), rng.random((4, 8, 8)) < 0.2
    truth = sorted_oracle(maps.ravel(), region_weights(masks).ravel())
    assert truth.aupro == pytest.approx(loop_aupro(list(maps), list(masks), 0.3), abs=1e-12)
    assert truth.aupro_005 == pytest.approx(loop_aupro(list(maps), list(masks), 0.05), abs=1e-12)


def test_a_map_is_rounded_to_float32():
    metrics = judged((np.array([[1.0, 1.0 + 1e-12]]), np.array([[False, True]])))
    assert metrics.compute().pixel_auroc == 0.5


def test_minus_zero_and_subnormals_are_zero():
    row = np.array([[-0.0, 1e-39, 0.0, -1e-45]], np.float32)
    assert judged((row, np.array([[False, True, False, True]]))).compute().pixel_auroc == 0.5


def test_no_scores_are_transformed():
    """Values outside 0..1 in one picture must not change how another is ranked."""
    pictures = [(np.array([[0.2, 0.9]]), np.array([[False, True]])), (np.array([[0.3, 1.5]]),) * 2]
    metrics = judged(pictures[0], (pictures[1][0], np.array([[False, True]])))
    assert metrics.compute().pixel_auroc == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite_are_refused_and_nothing_is_added(bad):
    metrics = judged((G2_MAP, G2_MASK))
    before = metrics.compute()
    spoilt = G2_MAP.astype(np.float64)
    spoilt[2, 2] = spoilt[2, 3] = bad
    for mask, defect in ((None, "good"), (G2_MASK, "scratch"), (None, "scratch")):
        with pytest.raises(MetricError, match=r"'part\.png' has 2 NaN or infinite"):
            metrics.update(spoilt, mask, defect=defect, path="part.png")
    assert metrics.compute() == before


def test_pixels_outside_the_roi_may_hold_anything():
    valid = np.ones((4, 5), bool)
    valid[0] = valid[3, 0] = False
    clean = judged((G2_MAP, G2_MASK), (G2_MAP, None), valid=valid).compute()
    spoilt = np.where(valid, G2_MAP, np.nan)
    assert judged((spoilt, G2_MASK), (spoilt, None), valid=valid).compute() == clean


def test_a_defective_picture_without_a_usable_mask_enters_no_pixel_metric():
    metrics = judged((G2_MAP, G2_MASK))
    before = metrics.compute()
    metrics.update(np.full((4, 5), 8.0), None, defect="dent")
    with pytest.warns(UserWarning, match=r"'p\.png' is labelled 'dent' but its mask is empty"):
        metrics.update(np.full((4, 5), 8.0), np.zeros((4, 5), bool), defect="dent", path="p.png")
    after = metrics.compute()
    assert np.array_equal(five(after), five(before))
    assert (after.pictures_without_mask, after.empty_masks) == (1, 1)
    assert (after.num_good, after.num_defective, after.num_good_pixels) == (0, 3, 15)
    assert after.per_defect["dent"].pixel_auroc is None
    assert after.per_defect["dent"].reason == "There is no defect pixel."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": G2_MASK}, "labelled good but its mask marks a defect"),
        ({"mask": G2_MASK.T, "defect": "dent"}, r"\(4, 5\) and a mask of size \(5, 4\)"),
        ({"mask": None, "valid": G2_MASK.T}, r"\(4, 5\) and a region of interest of size \(5, 4\)"),
        ({"mask": G2_MASK.astype(np.uint8), "defect": "dent"}, "mask of type uint8"),
        ({"mask": G2_MASK, "defect": ""}, "empty defect name"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_added(arguments, message):
    metrics = PixelMetrics()
    with pytest.raises(MetricError, match=message):
        metrics.update(G2_MAP, **arguments)
    assert metrics.compute() == PixelMetrics().compute()


def test_maps_that_are_no_float_pictures_are_refused():
    for wrong in (np.zeros((2, 2), np.uint8), np.zeros((1, 2, 2), np.float32)):
        with pytest.raises(MetricError, match="float map"):
            PixelMetrics().update(wrong, None)


def test_nothing_seen_gives_none_and_a_reason():
    result = PixelMetrics().compute()
    assert result.pixel_auroc is result.aupro is None
    assert result.reason == "There is no good and no defect pixel."
    assert PixelMetrics().aupro(0.3) is None


def test_settings_and_limits_are_checked():
    with pytest.raises(UsageError, match="max_pixels_exact is 0"):
        PixelMetrics(0)
    for limit in (0, 1.1, float("nan")):
        with pytest.raises(UsageError, match="FPR limit"):
            judged((G2_MAP, G2_MASK)).aupro(limit)


def named_pictures(number=12, side=32, seed=1):
    """Pictures of several defect names with scores in coarse steps."""
    maps, masks = smooth_pictures(number, side, seed)
    names = ["good" if not mask.any() else ("crack", "dent", "stain")[i % 3] for i, mask in enumerate(masks)]
    return list(zip(np.round(maps, 2), masks, names, strict=True))


def take(pictures, **settings):
    metrics = PixelMetrics(**settings)
    for one, mask, name in pictures:
        metrics.update(one, mask, defect=name)
    return metrics


def test_overall_is_the_weighted_mean_over_defects():
    result = take(named_pictures()).compute()
    groups = result.per_defect.values()
    assert len(result.per_defect) == 3
    pixels, regions = result.num_defect_pixels, result.num_regions
    auroc = sum(one.num_defect_pixels * one.pixel_auroc for one in groups) / pixels
    assert auroc == pytest.approx(result.pixel_auroc, abs=1e-12)
    for name in ("aupro", "aupro_005"):
        mean = sum(one.num_regions * getattr(one, name) for one in groups) / regions
        assert mean == pytest.approx(getattr(result, name), abs=1e-12)
    assert sum(one.num_defective for one in groups) == result.num_defective


def test_a_defect_is_held_against_the_good_pixels_of_all_pictures():
    pictures = named_pictures()
    good = np.concatenate([one[~mask] for one, mask, _ in pictures])
    crack = np.concatenate([one[mask] for one, mask, name in pictures if name == "crack"])
    labels = np.repeat([0, 1], [good.size, crack.size])
    expected = average_precision_score(labels, np.concatenate([good, crack]))
    assert take(pictures).compute().per_defect["crack"].pixel_ap == pytest.approx(expected, abs=1e-12)


def test_merging_parts_in_every_order_gives_the_same_bits():
    pictures = named_pictures()
    whole = take(pictures).compute()
    parts = [pictures[:3], pictures[3:8], pictures[8:]]
    for first, second, third in itertools.permutations(parts):
        left = take(first)
        left.merge_state(take(second))
        left.merge_state(take(third))
        assert left.compute() == whole
        tail = take(second)
        tail.merge_state(take(third))
        right = take(first)
        right.merge_state(tail)
        assert right.compute() == whole


def test_merging_with_nothing_or_oneself():
    pictures = named_pictures()
    metrics, empty = take(pictures), PixelMetrics()
    metrics.merge_state(empty)
    empty.merge_state(metrics)
    assert metrics.compute() == empty.compute() == take(pictures).compute()
    metrics.merge_state(metrics)
    twice = metrics.compute()
    assert five(twice) == pytest.approx(five(empty.compute()), abs=1e-12)
    assert twice.num_good_pixels == 2 * empty.compute().num_good_pixels


def test_merging_with_oneself_counts_everything_twice_when_compacted():
    metrics = take(named_pictures(), **COMPACTED)
    once = metrics.compute()
    metrics.merge_state(metrics)
    twice = metrics.compute()
    assert (twice.num_good_pixels, twice.num_defect_pixels) == (
        2 * once.num_good_pixels,
        2 * once.num_defect_pixels,
    )


def test_merging_different_settings_is_refused():
    with pytest.raises(MetricError, match="different settings"):
        PixelMetrics().merge_state(PixelMetrics(rank_resolution=99))


def test_compute_changes_nothing():
    pictures = named_pictures()
    metrics = take(pictures[:6])
    assert metrics.compute() == metrics.compute()
    for one, mask, name in pictures[6:]:
        metrics.update(one, mask, defect=name)
    assert metrics.compute() == take(pictures).compute()


def test_reset_forgets():
    metrics = take(named_pictures())
    metrics.reset()
    assert metrics.compute() == PixelMetrics().compute()


COMPACTED = {"max_pixels_exact": 700, "max_defect_pixels_exact": 50, "rank_resolution": 16}


@pytest.mark.parametrize("settings", [{}, {"max_pixels_exact": None}, COMPACTED])
def test_saved_and_loaded_goes_on_with_the_same_bits(settings):
    pictures = named_pictures()
    metrics = take(pictures[:7], **settings)
    state = metrics.state_dict()
    facts = json.loads(json.dumps(state.facts))
    loaded = PixelMetrics.from_state_dict(PixelState(state.arrays, facts))
    for one in (metrics, loaded):
        for anomaly_map, mask, name in pictures[7:]:
            one.update(anomaly_map, mask, defect=name)
    assert metrics.compute() == loaded.compute()
    assert metrics.compute().state.exact == (settings is not COMPACTED)


def test_every_missing_array_and_fact_is_noticed():
    state = take(named_pictures(), **COMPACTED).state_dict()
    for name in state.arrays:
        rest = {key: array for key, array in state.arrays.items() if key != name}
        with pytest.raises(MetricError, match=name.rsplit(".", 1)[0]):
            PixelMetrics.from_state_dict(PixelState(rest, state.facts))
    for name in state.facts.keys() - {"max_pixels_exact"}:
        facts = {key: value for key, value in state.facts.items() if key != name}
        with pytest.raises(FettleError, match="state"):
            PixelMetrics.from_state_dict(PixelState(state.arrays, facts))


def test_the_result_is_plain_json():
    facts = take(named_pictures()).compute().to_json()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["metric_state"] == {"exact": True, "depth": 0, "guarantee": 0.0}
    assert {"pixel_auroc", "aupro_005", "per_defect", "empty_masks"} <= facts.keys()


def test_too_many_regions_are_refused():
    dots = np.zeros((1200, 1800), bool)
    dots[::2, ::2] = True  # 540,000 regions of one pixel
    with pytest.raises(MetricError, match="524288 defect regions or more"):
        PixelMetrics().update(np.zeros(dots.shape, np.float32), dots, defect="noise")
