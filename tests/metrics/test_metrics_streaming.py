"""Pixel metrics beyond the buffers: accuracy of the rank compaction on every shape of scores."""

import itertools

import numpy as np
import pytest
from metric_oracles import feed, five, region_weights, smooth_pictures, sorted_oracle

from fettle.metrics import PixelMetrics
from fettle.metrics.compaction import (
    compact,
    compact_sorted,
    good_measure,
    num_distinct,
    run_of_sorted,
)
from fettle.metrics.keys import key_scores, score_keys
from fettle.metrics.streaming import GoodPixels

FORCED = {"max_pixels_exact": 1 << 18, "max_defect_pixels_exact": 1 << 13}


def mixed(z):
    """5 % log-uniform over 230 octaves, 95 % in 1 +- 1e-5."""
    rng = np.random.default_rng(11)
    wide = np.exp2(rng.uniform(-115, 115, z.shape))
    return np.where(rng.random(z.shape) < 0.05, wide, 1 + 1e-5 * np.tanh(z))


SHAPES = {
    "plain": lambda z: z - z.min(),
    "negative": lambda z: z - 3 - z.max(),
    "both signs": lambda z: z,
    "8-bit": lambda z: np.round(np.clip((z + 4) / 12, 0, 1) * 255) / 255,
    "two values": lambda z: z > 1.5,
    "all equal": lambda z: np.ones_like(z),
    "large offset": lambda z: 1e6 + 0.5 * z,
    "offset": lambda z: 1e6 + 100 * z,
    "many zeros": lambda z: np.maximum(z - np.quantile(z, 0.7), 0),
    "100 octaves": lambda z: np.exp2(100 * (z - z.min()) / (z.max() - z.min()) - 50),
    "crowd at 1": lambda z: 1 / (1 + np.exp(-8 * z)),
    "noise": lambda z: np.random.default_rng(12).normal(size=z.shape),
    "mixed scales": mixed,
    "subnormals": lambda z: z * 1e-40,
}


@pytest.fixture(scope="module")
def field():
    """40 maps of 256 px, their masks, and the masks' region weights."""
    maps, masks = smooth_pictures(40, 256)
    assert 0.002 < masks.mean() < 0.02
    return maps, masks, region_weights(masks).ravel()


@pytest.mark.parametrize("shape", SHAPES)
def test_compacted_metrics_are_within_1e_5_of_the_truth(field, shape):
    maps, masks, weights = field
    scores = SHAPES[shape](maps.astype(np.float64)).astype(np.float32)
    result = feed(PixelMetrics(**FORCED), scores, masks).compute()
    scores = np.where(np.abs(scores) < np.finfo(np.float32).tiny, np.float32(0), scores)
    truth = sorted_oracle(scores.ravel(), weights)
    few = np.unique(scores).size <= 1 << 16
    assert result.state.exact == few
    tolerance = 1e-9 if few else 1e-5
    assert np.abs(five(result) - five(truth)).max() < tolerance
    if few:
        assert result.f1max_threshold_oracle == truth.threshold


def test_an_unbounded_buffer_is_exact(field):
    maps, masks, weights = field
    result = feed(PixelMetrics(None), maps, masks).compute()
    assert five(result) == pytest.approx(five(sorted_oracle(maps.ravel(), weights)), abs=1e-9)
    assert result.state.exact


def imbalanced(kind):
    rng = np.random.default_rng(21)
    if kind == "one defect pixel":
        scores = rng.standard_normal((25, 512, 512), np.float32)
        masks = np.zeros(scores.shape, bool)
        masks[7, 100, 100] = True
        scores[7, 100, 100] = 2.5
    elif kind == "one good pixel":
        scores, masks = rng.normal(size=(10, 256, 256)), np.ones((10, 256, 256), bool)
        masks[3, 50, 60] = False
    else:
        tiles = np.kron(rng.random((10, 64, 64)) < 0.5, np.ones((1, 4, 4)))
        scores, masks = rng.normal(size=tiles.shape) + tiles, tiles.astype(bool)
    return scores.astype(np.float32), masks


@pytest.mark.parametrize("kind", ["one defect pixel", "one good pixel", "half defects"])
def test_extreme_imbalance_stays_within_2e_4(kind):
    scores, masks = imbalanced(kind)
    result = feed(PixelMetrics(**FORCED), scores, masks).compute()
    truth = sorted_oracle(scores.ravel(), region_weights(masks).ravel())
    assert not result.state.exact
    assert np.abs(five(result) - five(truth)).max() < 2e-4


def test_a_monotone_transform_changes_no_bit_of_compacted_values(field):
    maps, masks, _ = field
    plain = feed(PixelMetrics(**FORCED), maps[:20], masks[:20]).compute()
    ranks = np.unique(maps[:20], return_inverse=True)[1].reshape(maps[:20].shape)
    for scores in (4 * maps[:20], ranks.astype(np.float32)):
        assert np.array_equal(five(feed(PixelMetrics(**FORCED), scores, masks[:20]).compute()), five(plain))
    assert not plain.state.exact


def test_merging_compacted_parts_in_every_order_stays_within_1e_5(field):
    maps, masks, _ = field
    whole = five(feed(PixelMetrics(**FORCED), maps, masks).compute())
    for order in itertools.permutations([slice(0, 7), slice(7, 24), slice(24, 40)]):
        merged = PixelMetrics(**FORCED)
        for part in order:
            merged.merge_state(feed(PixelMetrics(**FORCED), maps[part], masks[part]))
        assert np.abs(five(merged.compute()) - whole).max() < 1e-5


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_false_positives_stay_within_the_guarantee_at_every_threshold(order):
    resolution, number = 256, 200_000
    scores = np.random.default_rng(31).normal(size=number).astype(np.float32)
    if order != "random":
        scores.sort()
    keys = score_keys(scores if order != "descending" else scores[::-1])
    good = GoodPixels(1 << 12, resolution)
    for part in np.array_split(keys, 37):
        good.add(part)
    thresholds = np.unique(keys)
    true = number - np.searchsorted(np.sort(keys), thresholds, side="left")
    _, found = good.tally(thresholds)
    error = np.abs(found - true) / true
    assert good.levels.steps > 1
    assert error.max() <= good.levels.steps / resolution
    assert good.levels.steps <= good.levels.depth + 1
    assert error[true < resolution].max() == 0


@pytest.mark.parametrize("spread", [3e1, 3e3, 1e6])
def test_compacting_sorted_keys_is_compacting_their_run(spread):
    rng = np.random.default_rng(41)
    keys = np.sort((np.abs(rng.normal(size=60_000)) * spread).astype(np.uint32))
    short, long = compact_sorted(keys, 512), compact(run_of_sorted(keys), good_measure(512))
    assert np.array_equal(short.keys, long.keys)
    assert np.array_equal(short.mass, long.mass)
    assert short.total == 60_000
    assert num_distinct(keys) == np.unique(keys).size


def test_compaction_keeps_runs_short():
    keys = score_keys(np.random.default_rng(51).normal(size=1 << 20).astype(np.float32))
    good = GoodPixels(1 << 15, 1 << 10)
    good.add(keys)
    units = (1 << 10) * (1 + np.log((1 << 20) / (1 << 10)))
    for run in good.levels.runs.values():
        assert run.num_points <= 1.05 * units  # a lone point may split a unit
    assert good.total == 1 << 20
    assert len(good.levels.runs) <= np.log2(1 << 5) + 1


def test_keys_keep_order_and_come_back():
    scores = np.array([-3.4e38, -1.5, -1.2e-38, 0, 1.2e-38, 1, np.float32(1) + 2**-23, 3.4e38], np.float32)
    keys = score_keys(scores)
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert np.array_equal(key_scores(keys), scores)


@pytest.mark.slow
def test_20_large_maps_compacted_agree_with_the_unbounded_buffer():
    compacted, unbounded = PixelMetrics(1 << 21), PixelMetrics(None)
    for seed in range(20):
        maps, masks = smooth_pictures(1, 1024, seed)
        maps += np.float32(0.1 * seed)
        for metrics in (compacted, unbounded):
            feed(metrics, maps, masks)
    result = compacted.compute()
    assert not result.state.exact
    assert np.abs(five(result) - five(unbounded.compute())).max() < 1e-5
