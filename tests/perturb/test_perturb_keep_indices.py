"""Which tokens stay where the others leave the sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fettle.perturb.token_mask import keep_indices


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_valid(number: int = 4, tokens: int = 256) -> Tensor:
    return torch.ones(number, tokens, dtype=torch.bool)


def keep(valid: Tensor, *ratios: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    ratio = torch.tensor(ratios * (len(valid) // len(ratios)), dtype=torch.float64)
    return keep_indices(valid, ratio, seeded(seed))


@pytest.mark.parametrize(
    ("ratio", "number"), [(0.0, 256), (0.25, 192), (0.4, 153), (0.5, 128), (0.75, 64), (0.9, 25), (0.999, 1)]
)
def test_of_256_tokens_so_many_stay(ratio: float, number: int) -> None:
    kept, counts = keep(all_valid(), ratio)
    assert kept.shape == counts.shape == (4, number) and bool(counts.all())


@pytest.mark.parametrize(
    ("tokens", "ratio", "number"), [(10, 0.8, 2), (50, 0.34, 33), (50, 0.92, 4), (100, 0.34, 66)]
)
def test_a_share_that_binary_fractions_miss_is_not_rounded_down(
    tokens: int, ratio: float, number: int
) -> None:
    assert keep(all_valid(1, tokens), ratio)[0].shape == (1, number)


def test_a_ratio_of_single_precision_is_as_good() -> None:
    kept, _ = keep_indices(all_valid(1), torch.tensor([0.75]), seeded())
    assert kept.shape == (1, 64)


def test_no_token_is_kept_twice() -> None:
    kept, _ = keep(all_valid(), 0.25)
    assert all(len(set(row)) == 192 for row in kept.tolist())


def test_tokens_that_are_not_valid_are_never_kept() -> None:
    valid = torch.rand(8, 64, generator=seeded(3)) < 0.4
    kept, counts = keep(valid, 0.5)
    for own, row, used in zip(valid, kept, counts, strict=True):
        assert int(used.sum()) == int(own.sum()) // 2
        assert bool(own[row[used]].all())


def test_a_shorter_row_is_filled_up_with_what_does_not_count() -> None:
    valid = all_valid(2, 10)
    valid[1, 4:] = False
    kept, counts = keep(valid, 0.5)
    assert kept.shape == (2, 5)
    assert counts.tolist() == [[True] * 5, [True, True, False, False, False]]


def test_one_valid_token_always_stays() -> None:
    valid = torch.zeros(1, 20, dtype=torch.bool)
    valid[0, 13] = True
    kept, counts = keep(valid, 0.95)
    assert kept.tolist() == [[13]] and counts.tolist() == [[True]]


def test_a_picture_without_valid_tokens_keeps_none() -> None:
    kept, counts = keep(torch.zeros(2, 20, dtype=torch.bool), 0.5)
    assert kept.shape == (2, 1) and not bool(counts.any())


def test_pictures_of_a_batch_keep_their_own_number() -> None:
    _, counts = keep(all_valid(2), 0.25, 0.9)
    assert counts.sum(dim=1).tolist() == [192, 25]


def test_pictures_of_a_batch_keep_different_tokens() -> None:
    kept, _ = keep(all_valid(), 0.5)
    assert len({tuple(sorted(row)) for row in kept.tolist()}) == 4


def test_a_seed_repeats_and_another_differs() -> None:
    first, same, other = (keep(all_valid(), 0.5, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_global_generator_has_no_say() -> None:
    before = torch.get_rng_state()
    keep(all_valid(), 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_token_stays_about_equally_often() -> None:
    kept, _ = keep(all_valid(4000, 16), 0.75)
    often = torch.bincount(kept.flatten(), minlength=16) / 4000
    torch.testing.assert_close(often, torch.full((16,), 0.25), atol=0.03, rtol=0)
