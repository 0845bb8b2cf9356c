"""What was not rebuilt at each place, and what a template took from where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fettle.layers.template_maps import adoption_maps, difference


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(seed: int = 0) -> Tensor:
    return torch.randn(2, 6, 3, 4, generator=seeded(seed))


# --- differences


def test_distance_is_a_mean_square_and_direction_one_less_the_cosine() -> None:
    fused, rebuilt = features(), features(1)
    distance, direction = difference(fused, rebuilt)
    torch.testing.assert_close(distance, (fused - rebuilt).square().mean(dim=1))
    lengths = fused.norm(dim=1) * rebuilt.norm(dim=1)
    torch.testing.assert_close(direction, 1 - (fused * rebuilt).sum(dim=1) / lengths)


@pytest.mark.parametrize(("factor", "distance", "direction"), [(1, 0, 0), (2, 1, 0), (-1, 4, 2), (0, 1, 1)])
def test_of_a_multiple(factor: float, distance: float, direction: float) -> None:
    found = difference(features(), factor * features())
    torch.testing.assert_close(found.distance, distance * features().square().mean(dim=1))
    torch.testing.assert_close(found.direction, torch.full((2, 3, 4), float(direction)), atol=1e-6, rtol=0)


def test_a_place_without_features_has_no_direction_whatever_is_rebuilt() -> None:
    fused = features()
    fused[0, :, 1, 2] = 0
    fused[1, :, 0, 0] = 1e-7
    for rebuilt in (fused, features(1), -fused):
        direction = difference(fused, rebuilt).direction
        assert float(direction[0, 1, 2]) == float(direction[1, 0, 0]) == 0


def test_direction_stays_within_nought_and_two() -> None:
    fused = 1e3 * torch.randn(4, 512, 8, 8, generator=seeded())
    assert float(difference(fused, fused).direction.min()) >= 0
    assert float(difference(fused, -fused).direction.max()) <= 2


def test_half_precision_is_compared_in_single_and_double_stays_double() -> None:
    small = 1e-3 * features()
    distance, direction = difference(small.half(), torch.zeros_like(small).half())
    assert distance.dtype == direction.dtype == torch.float32
    assert float(distance.min()) > 0  # about 1e-6, where half precision ends
    assert difference(features().double(), features(1).double()).distance.dtype == torch.float64


def test_direction_has_a_gradient_at_a_perfect_answer_and_at_no_features() -> None:
    fused = features()
    fused[0, :, 0, 0] = 0
    fused.requires_grad_(True)
    (
        difference(fused, fused.detach()).direction.sum() + difference(fused, features(1)).direction.sum()
    ).backward()
    assert fused.grad is not None and bool(fused.grad.isfinite().all())


# --- adoption


def attention(number: int, num_seen: int, num_template: int, others: int, seed: int = 0) -> Tensor:
    """Rows of template tokens over the input's columns, of a softmax over all keys."""
    keys = num_seen + num_template + others
    rows = torch.randn(number, num_template, keys, generator=seeded(seed)).softmax(dim=2)
    return rows[:, :, :num_seen]


def every(number: int, tokens: int) -> Tensor:
    return torch.ones(number, tokens, dtype=torch.bool)


@pytest.mark.parametrize("has_cls", [False, True])
def test_uniform_attention_is_half_of_the_scale(has_cls: bool) -> None:
    n = 16
    rows = torch.full((1, n, n), 1 / (2 * n + has_cls))
    maps = adoption_maps(rows, every(1, n), every(1, n), has_cls)
    torch.testing.assert_close(maps["adoption"], torch.full((1, n), 0.5))
    torch.testing.assert_close(maps["taken"], torch.full((1, n), n / (2 * n + has_cls)))
    torch.testing.assert_close(maps["adoption_peak"], torch.ones(1, n))


def test_the_mean_taken_is_the_mass_per_token() -> None:
    n = 16
    rows = attention(3, n, n, 1)
    maps = adoption_maps(rows, every(3, n), every(3, n), has_cls=True)
    mass = 2 * maps["adoption"] * n / (2 * n + 1)  # far from its bound here
    assert float(maps["adoption"].max()) < 1
    torch.testing.assert_close(maps["taken"].mean(dim=1), mass.sum(dim=1) / n)
    torch.testing.assert_close(mass, rows.sum(dim=1))
    assert 0 <= float(maps["taken"].min()) <= float(maps["taken"].max()) <= 1


def test_adoption_is_cut_at_twice_the_uniform() -> None:
    rows = torch.zeros(1, 4, 4)
    rows[:, :, 2] = 0.9
    maps = adoption_maps(rows, every(1, 4), every(1, 4), has_cls=False)
    assert maps["adoption"][0].tolist() == [0, 0, 1, 0]


def test_the_peak_is_the_eagerest_template_token_over_the_pictures_largest() -> None:
    rows = torch.tensor([[[0.1, 0.2], [0.4, 0.0]]])
    peak = adoption_maps(rows, every(1, 2), every(1, 2), has_cls=False)["adoption_peak"]
    torch.testing.assert_close(peak, torch.tensor([[1.0, 0.5]]))


def test_template_tokens_that_are_not_valid_ask_for_nothing() -> None:
    n = 8
    template = every(1, n)
    template[0, 5:] = False
    rows = torch.full((1, n, n), 1 / (n + 5))
    maps = adoption_maps(rows, every(1, n), template, has_cls=False)
    torch.testing.assert_close(maps["adoption"], torch.full((1, n), 0.5))
    assert not bool(maps["taken"][0, 5:].any()) and bool(maps["taken"][0, :5].all())


def test_input_tokens_that_are_not_valid_count_for_nothing() -> None:
    n = 8
    seen = every(1, n)
    seen[0, 6:] = False
    rows = torch.full((1, n, n), 1 / (n + 6)) * seen[:, None]
    adoption = adoption_maps(rows, seen, every(1, n), has_cls=False)["adoption"]
    torch.testing.assert_close(adoption[0], torch.tensor([0.5] * 6 + [0.0] * 2))


def test_nothing_taken_is_nought_and_no_nan() -> None:
    maps = adoption_maps(torch.zeros(1, 4, 4), ~every(1, 4), ~every(1, 4), has_cls=False)
    assert all(not bool(values.any()) for values in maps.values())
