"""Learned positions: which table speaks of what."""

from __future__ import annotations

import torch

from fettle.layers.positions import LearnedPositions


def test_token_is_its_column_then_its_row() -> None:
    positions = LearnedPositions((3, 5), 8)
    laid_out = positions().unflatten(0, (3, 5))
    for y in range(3):
        for x in range(5):
            assert torch.equal(laid_out[y, x], torch.cat([positions.columns[x], positions.rows[y]]))


def test_transposing_the_grid_exchanges_the_halves() -> None:
    upright = LearnedPositions((3, 5), 8)
    lying = LearnedPositions((5, 3), 8)
    lying.load_state_dict({"rows": upright.columns, "columns": upright.rows})
    laid_out = lying().unflatten(0, (5, 3)).transpose(0, 1)
    halves = upright().unflatten(0, (3, 5)).chunk(2, dim=-1)
    assert torch.equal(laid_out, torch.cat(halves[::-1], dim=-1))


@torch.no_grad()
def test_positions_start_uniform_in_0_to_1() -> None:
    torch.manual_seed(0)
    start = LearnedPositions((40, 30), 64)()
    assert float(start.min()) >= 0 and float(start.max()) < 1
    assert abs(float(start.mean()) - 0.5) < 0.02


def test_both_tables_learn() -> None:
    positions = LearnedPositions((3, 5), 8)
    positions().sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert positions.rows.grad is not None and bool((positions.rows.grad == 5).all())
    assert positions.columns.grad is not None and bool((positions.columns.grad == 3).all())
