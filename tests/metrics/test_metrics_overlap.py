"""Per-image overlap against a slow oracle, and what it must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fettle.errors import MetricError
from fettle.metrics.overlap import HIGH, LOW, PerImageOverlap


def everywhere(shape: tuple[int, int]) -> np.ndarray:
    return np.ones(shape, bool)


def oracle(good: list[np.ndarray], defect: np.ndarray) -> float:
    """Recall at many rates: the best threshold whose mean rate over good pictures stays within each."""
    candidates = np.unique(np.concatenate([g.ravel() for g in good] + [defect]))
    candidates = np.append(candidates, np.inf)
    rates = np.array([np.mean([(g >= t).mean() for g in good]) for t in candidates])
    recalls = np.array([(defect >= t).mean() for t in candidates])
    grid = np.exp(np.linspace(math.log(LOW), math.log(HIGH), 4001))
    middles = np.sqrt(grid[1:] * grid[:-1])
    return float(np.mean([recalls[rates <= f].max() for f in middles]))


def metric(good: list[np.ndarray], defects: dict[str, np.ndarray]) -> dict[str, float]:
    overlap = PerImageOverlap()
    for one in good:
        overlap.add_good(one, everywhere(one.shape))
    for path, scores in defects.items():
        overlap.add_defective(path, scores[None], everywhere((1, scores.size)), everywhere((1, scores.size)))
    return overlap.compute().per_picture


def random_case(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = [(200, 300), (300, 300), (250, 250)]
    good = [rng.gamma(2.0, 1.0, size).astype(np.float32) for size in sizes]
    return good, (rng.gamma(2.0, 1.0, 300) + 8).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_oracle(seed: int) -> None:
    good, defect = random_case(seed)
    tops = [np.sort(one.ravel())[-40:] for one in good]  # the oracle needs the highest scores only ...
    expected_good = [
        np.concatenate([top, np.full(one.size - 40, -1, np.float32)])
        for one, top in zip(good, tops, strict=True)
    ]
    assert metric(good, {"a": defect})["a"] == pytest.approx(oracle(expected_good, defect), abs=2e-3)


def test_perfect_and_blind_maps() -> None:
    good, _ = random_case(0)
    top = max(float(one.max()) for one in good)
    found = metric(good, {"found": np.full(50, top + 1, np.float32), "missed": np.zeros(50, np.float32)})
    assert found == {"found": pytest.approx(1.0), "missed": 0.0}


def test_good_pixels_of_defective_pictures_do_not_count() -> None:
    good, defect = random_case(1)
    overlap = PerImageOverlap()
    for one in good:
        overlap.add_good(one, everywhere(one.shape))
    shown = np.full((2, defect.size), 1e6, np.float32)
    shown[0] = defect
    mask = np.zeros(shown.shape, bool)
    mask[0] = True
    overlap.add_defective("a", shown, mask, everywhere(shown.shape))
    assert overlap.compute().per_picture == metric(good, {"a": defect})


def test_order_and_merging_change_nothing() -> None:
    good, defect = random_case(2)
    first, second = PerImageOverlap(), PerImageOverlap()
    first.add_good(good[2], everywhere(good[2].shape))
    for one in good[:2]:
        second.add_good(one, everywhere(one.shape))
    second.add_defective("a", defect[None], everywhere((1, defect.size)), everywhere((1, defect.size)))
    first.merge_state(second)
    assert first.compute().per_picture["a"] == pytest.approx(metric(good, {"a": defect})["a"], abs=1e-12)


def test_growing_transform_changes_nothing() -> None:
    good, defect = random_case(0)
    grown = metric([4 * one for one in good], {"a": 4 * defect})
    assert grown == metric(good, {"a": defect})


def test_tail_that_is_too_short_is_said_and_no_value_given() -> None:
    """One good picture may be all false alarms: then its 1 % does not reach down to the threshold."""
    rng = np.random.default_rng(0)
    good = [rng.random((100, 100), dtype=np.float32) for _ in range(300)]
    good[0] += 100
    overlap = PerImageOverlap()
    for one in good:
        overlap.add_good(one, everywhere(one.shape))
    result = overlap.compute()
    assert result.per_picture == {} and "too short" in result.reason and result.mean() is None


def test_no_good_picture_gives_a_reason_and_a_picture_twice_is_refused() -> None:
    overlap = PerImageOverlap()
    one = np.ones((2, 2), np.float32)
    overlap.add_defective("a", one, one > 0, one > 0)
    assert overlap.compute().reason
    with pytest.raises(MetricError, match="twice"):
        overlap.add_defective("a", one, one > 0, one > 0)
