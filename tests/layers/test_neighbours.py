"""Exact nearest neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.errors import UsageError
from fettle.layers.neighbours import (
    FlatIndex,
    grids_pay,
    half_squared_norms,
    k_nearest,
    nearest,
    nearest_on_grids,
)


def _rows(num: int, dims: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(num, dims, generator=torch.Generator().manual_seed(seed)).relu() + 2


def _all_distances(queries: Tensor, bank: Tensor) -> Tensor:
    return (queries.double()[:, None] - bank.double()[None]).square().sum(2)


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 640])
@pytest.mark.parametrize("chunk", [None, 1, 100, 1024])
def test_nearest_is_exact(num_rows: int, chunk: int | None) -> None:
    queries, bank = _rows(130, seed=1), _rows(num_rows)
    found = nearest(queries, bank, chunk=chunk)
    least = _all_distances(queries, bank).min(1)
    assert torch.equal(found.row, least.indices)
    torch.testing.assert_close(found.squared_distance.double(), least.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_rows", [192, 200])
def test_ties_go_to_the_lowest_row(num_rows: int) -> None:
    bank = torch.randint(0, 2, (num_rows, 4), generator=torch.Generator().manual_seed(0)).float()
    queries = torch.randint(0, 2, (50, 4), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(nearest(queries, bank).row, _all_distances(queries, bank).argmin(1))


def test_a_bank_row_is_at_distance_zero() -> None:
    bank = 1000 * _rows(300, dims=384)
    found = nearest(bank, bank)
    assert torch.equal(found.row, torch.arange(300))
    assert float(found.squared_distance.max()) == 0.0


def test_small_distances_keep_their_digits() -> None:
    bank = 100 * _rows(300, dims=384)
    queries = bank.clone()
    queries[:, 0] += 0.25
    assert torch.equal(nearest(queries, bank).squared_distance, torch.full((300,), 0.0625))


def test_answer_ignores_batch_mates() -> None:
    queries, bank = _rows(50, seed=1), _rows(640)
    whole = nearest(queries, bank)
    for place in (0, 49):
        alone = nearest(queries[place : place + 1], bank)
        assert int(alone.row) == int(whole.row[place])
        assert float(alone.squared_distance) == float(whole.squared_distance[place])


def test_own_rows_are_left_out() -> None:
    queries, bank = _rows(40, seed=1), _rows(128)
    query_owners = torch.arange(40) % 4
    bank_owners = torch.arange(128) % 5  # need not be sorted
    bank[0] = queries[0]  # the same owner's row, at distance 0
    found = nearest(queries, bank, chunk=16, query_owners=query_owners, bank_owners=bank_owners)
    distances = _all_distances(queries, bank)
    distances[query_owners[:, None] == bank_owners[None]] = torch.inf
    assert torch.equal(found.row, distances.argmin(1))
    assert not (bank_owners[found.row] == query_owners).any()


def test_leaving_every_row_out_is_refused() -> None:
    with pytest.raises(UsageError, match="owner 3"):
        nearest(_rows(2), _rows(5), query_owners=torch.tensor([3, 3]), bank_owners=torch.full((5,), 3))


def test_k_nearest_is_exact_and_sorted() -> None:
    queries, bank = _rows(70, seed=1), _rows(300)
    found = k_nearest(queries, bank, 9, chunk=32)
    least = _all_distances(queries, bank).topk(9, largest=False)
    assert torch.equal(found.row, least.indices)
    torch.testing.assert_close(found.squared_distance.double(), least.values, rtol=1e-6, atol=0)


def test_faiss_gives_the_same() -> None:
    queries, bank = _rows(200, dims=168, seed=1), _rows(1000, dims=168)
    ours, theirs = nearest(queries, bank), FlatIndex(bank).nearest(queries)
    assert torch.equal(ours.row, theirs.row)
    torch.testing.assert_close(ours.squared_distance, theirs.squared_distance, rtol=0, atol=0)


@pytest.mark.parametrize("sides", [(12, 6), (12, 6, 3), (13, 7), (8, 8)])
def test_levels_on_their_own_grids_find_the_same_rows(sides: tuple[int, ...]) -> None:
    """Also where a coarse grid is not half the fine one, and for two pictures."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 10, side, side + 1, generator=generator) for side in sides]
    grid = levels[0].shape[-2:]
    joined = [F.interpolate(one, size=grid, mode="bilinear", align_corners=False) for one in levels]
    queries = torch.cat(joined, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    bank = torch.randn(640, queries.shape[1], generator=generator)
    rows = nearest_on_grids(levels, bank, half_squared_norms(bank))
    assert rows.shape == (2, *grid)
    assert torch.equal(rows.flatten(), nearest(queries, bank).row)


def test_grids_pay_for_wide_coarse_levels_on_small_grids() -> None:
    def pays(channels: tuple[int, int], side: int) -> bool:
        return grids_pay(
            [torch.empty(1, channels[0], side, side), torch.empty(1, channels[1], side // 2, side // 2)]
        )

    assert pays((128, 256), 32)
    assert not pays((48, 120), 32)
    assert not pays((128, 256), 64)


def test_gradient_is_that_of_the_difference() -> None:
    queries = _rows(5, seed=1).requires_grad_()
    bank = _rows(64)
    found = nearest(queries, bank)
    found.squared_distance.sum().backward()
    assert queries.grad is not None
    torch.testing.assert_close(queries.grad, 2 * (queries.detach() - bank[found.row]))


def test_gradient_at_a_bank_row_is_finite() -> None:
    bank = _rows(64)
    queries = bank[:3].clone().requires_grad_()
    (nearest(queries, bank).squared_distance + 1e-8).sqrt().sum().backward()
    assert queries.grad is not None and bool(torch.isfinite(queries.grad).all())


@pytest.mark.parametrize("num_rows", [128, 130])
def test_it_can_be_exported_with_a_free_number_of_queries(num_rows: int) -> None:
    bank = _rows(num_rows)

    class Search(torch.nn.Module):
        def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
            return nearest(queries, bank, chunk=None)

    graph = torch.export.export(
        Search(), (_rows(7, seed=1),), dynamic_shapes=({0: torch.export.Dim("patches", min=2)},)
    )
    queries = _rows(90, seed=2)
    for ours, theirs in zip(nearest(queries, bank), graph.module()(queries), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_no_queries_give_no_answers() -> None:
    assert nearest(_rows(0), _rows(5)).row.shape == (0,)
    assert k_nearest(_rows(0), _rows(5), 2).row.shape == (0, 2)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        nearest(_rows(3, dims=4), _rows(3, dims=5))
    with pytest.raises(UsageError, match="no rows"):
        nearest(_rows(3), _rows(0))
    with pytest.raises(UsageError, match="both or neither"):
        nearest(_rows(3), _rows(3), query_owners=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="neighbours"):
        k_nearest(_rows(3), _rows(3), 4)
