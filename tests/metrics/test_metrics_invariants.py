"""What must hold of pixel metrics whatever the scores: exact, and compacted hard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from metric_oracles import five

from fettle.metrics import PixelMetrics

TIGHT = {"max_pixels_exact": 24, "max_defect_pixels_exact": 8, "rank_resolution": 4}
SHAPE = (3, 6, 7)
scores = arrays(np.float32, SHAPE, elements=st.integers(-12, 12).map(float) | st.floats(-1, 1, width=32))
masks = arrays(np.bool_, SHAPE, elements=st.booleans()).filter(lambda mask: mask.any() and not mask.all())
quick = settings(max_examples=40, deadline=None)


def judge(maps, truth, **config):
    metrics = PixelMetrics(**config)
    for one, mask in zip(maps, truth, strict=True):
        metrics.update(one, mask, defect="any" if mask.any() else "good")
    return metrics


def values(maps, truth, **config):
    return five(judge(maps, truth, **config).compute())


def clean(maps):
    return np.where(np.abs(maps) < np.finfo(np.float32).tiny, np.float32(0), maps)


@quick
@given(scores, masks, st.sampled_from([{}, TIGHT]))
def test_relabelling_scores_in_order_changes_no_bit(maps, truth, config):
    rank = np.unique(clean(maps), return_inverse=True)[1].reshape(SHAPE)
    assert np.array_equal(values(maps, truth, **config), values(rank.astype(np.float32), truth, **config))


@quick
@given(scores, masks, st.permutations(range(3)))
def test_order_flips_and_turns_change_no_bit(maps, truth, order):
    expected = values(maps, truth)
    assert np.array_equal(values(maps[order], truth[order]), expected)
    assert np.array_equal(values(maps[:, ::-1], truth[:, ::-1]), expected)
    assert np.array_equal(values(np.rot90(maps, axes=(1, 2)), np.rot90(truth, axes=(1, 2))), expected)


@quick
@given(scores, masks)
def test_merging_is_associative_commutative_and_has_a_zero(maps, truth):
    def parts():
        return [judge(maps[i : i + 1], truth[i : i + 1]) for i in range(3)]

    whole = judge(maps, truth).compute()
    left, middle, right = parts()
    middle.merge_state(right)
    left.merge_state(middle)
    left.merge_state(PixelMetrics())
    first, second, third = parts()
    third.merge_state(first)
    third.merge_state(second)
    assert left.compute() == third.compute() == whole


@quick
@given(scores, masks, st.sampled_from([{}, TIGHT]))
def test_values_are_in_0_to_1(maps, truth, config):
    result = values(maps, truth, **config)
    assert ((result >= 0) & (result <= 1)).all()


@quick
@given(masks, st.floats(-(2.0**100), 2.0**100, width=32), st.sampled_from([{}, TIGHT]))
def test_a_constant_map_is_chance(truth, constant, config):
    share = truth.mean()
    expected = [0.5, share, 2 * share / (1 + share), 0.15, 0.025]
    assert values(np.full(SHAPE, constant), truth, **config) == pytest.approx(expected, abs=1e-12)


@quick
@given(scores, masks)
def test_negating_mirrors_auroc_and_swapping_labels_too_restores_it(maps, truth):
    auroc = values(maps, truth)[0]
    assert values(-maps, truth)[0] == pytest.approx(1 - auroc, abs=1e-12)
    assert values(-maps, ~truth)[0] == pytest.approx(auroc, abs=1e-12)


@quick
@given(
    arrays(np.float32, (6, 7), elements=st.integers(0, 9).map(float)), st.integers(1, 5), st.integers(1, 6)
)
def test_with_one_region_aupro_up_to_1_is_auroc(one, height, width):
    mask = np.zeros((6, 7), bool)
    mask[:height, :width] = True
    metrics = judge([one], [mask])
    assert metrics.aupro(1) == pytest.approx(metrics.compute().pixel_auroc, abs=1e-12)


@quick
@given(scores, masks)
def test_seeing_the_set_twice_changes_nothing(maps, truth):
    twice = values(np.concatenate([maps, maps]), np.concatenate([truth, truth]))
    assert twice == pytest.approx(values(maps, truth), abs=1e-12)


@quick
@given(scores, masks)
def test_a_good_picture_at_the_minimum_never_lowers_auroc_or_aupro(maps, truth):
    quiet = np.full((1, 6, 7), maps.min())
    before = values(maps, truth)
    after = values(np.concatenate([maps, quiet]), np.concatenate([truth, np.zeros((1, 6, 7), bool)]))
    assert (after[[0, 3, 4]] >= before[[0, 3, 4]] - 1e-12).all()


@quick
@given(scores, masks, st.integers(0, 10_000), st.floats(0, 30, width=32))
def test_raising_one_score_moves_the_metrics_the_right_way(maps, truth, pick, rise):
    before = values(maps, truth)
    for kind, sign, kept in ((truth, 1, [0, 3, 4]), (~truth, -1, [0, 1, 3, 4])):
        index = tuple(np.argwhere(kind)[pick % kind.sum()])
        raised = maps.copy()
        raised[index] += np.float32(rise)
        change = values(raised, truth) - before
        assert (sign * change[kept] >= -1e-12).all()


@quick
@given(
    arrays(np.float32, SHAPE, elements=st.integers(-99, 99).map(float), unique=True),
    masks,
    st.integers(0, 999),
)
def test_raising_a_defect_never_lowers_ap_where_scores_are_distinct(maps, truth, pick):
    index = tuple(np.argwhere(truth)[pick % truth.sum()])
    raised = maps.copy()
    raised[index] = 200
    assert values(raised, truth)[1] >= values(maps, truth)[1] - 1e-12


def test_ap_may_fall_when_a_defect_rises_out_of_a_tie():
    truth = np.array([[[True, True, False]]])
    assert values(np.array([[[0.0, 0, 2]]]), truth)[1] == pytest.approx(2 / 3)
    assert values(np.array([[[0.0, 2, 2]]]), truth)[1] == pytest.approx(7 / 12)


@quick
@given(scores, masks, st.integers(-12, 12))
def test_f1_max_is_at_least_the_f1_at_any_threshold(maps, truth, threshold):
    predicted = clean(maps) >= threshold
    f1 = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    result = judge(maps, truth).compute()
    assert result.pixel_f1max >= f1 - 1e-12
    best = clean(maps) >= np.float32(result.f1max_threshold_oracle)
    assert 2 * (best & truth).sum() / (best.sum() + truth.sum()) == pytest.approx(result.pixel_f1max)


@quick
@given(scores, masks)
def test_compaction_keeps_every_count_and_says_what_it_did(maps, truth):
    result = judge(maps, truth, **TIGHT).compute()
    assert result.num_good_pixels == (~truth).sum()
    assert result.num_defect_pixels == truth.sum()
    assert result.state.exact == (result.state.guarantee == 0)
    if result.state.exact:
        assert np.array_equal(five(result), values(maps, truth))
