"""In which order a few-shot fit takes pictures."""

from __future__ import annotations

import hashlib

import numpy as np

from fettle.datasets.few_shot import few_shot_order

KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(50)]


def test_it_is_the_permutation_of_the_sorted_keys() -> None:
    places = np.random.Generator(np.random.PCG64(7)).permutation(50)
    assert few_shot_order(KEYS, seed=7) == [sorted(KEYS)[place] for place in places]


def test_listing_order_does_not_count() -> None:
    shuffled = list(np.random.default_rng(0).permutation(KEYS))
    assert few_shot_order(shuffled, seed=0) == few_shot_order(KEYS, seed=0)


def test_every_picture_comes_first_about_as_often() -> None:
    """20 of 1,000 seeds, give or take 4.4."""
    first = [few_shot_order(KEYS, seed)[0] for seed in range(1000)]
    counts = [first.count(key) for key in KEYS]
    assert min(counts) >= 4 and max(counts) <= 40
