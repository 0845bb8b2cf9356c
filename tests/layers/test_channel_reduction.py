"""Fewer channels: a plain draw as in PaDiM's paper, or random orthonormal directions level by level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fettle.layers.channel_reduction import ChannelReduction, ReductionKind

SIZES = (8, 12, 16)


def reduction(kind: ReductionKind, kept: int = 10, seed: int = 0) -> ChannelReduction:
    module = ChannelReduction(SIZES, kept, kind)
    module.choose(torch.Generator().manual_seed(seed))
    return module


def levels(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, size, 4, 5, generator=generator) for size in SIZES]


@pytest.mark.parametrize("kind", ["draw", "orthogonal"])
def test_it_keeps_as_many_as_asked_for(kind: ReductionKind) -> None:
    for kept in (1, 2, 3, 10, 35, 36):
        reduced = reduction(kind, kept)(levels())
        assert sum(level.shape[1] for level in reduced) == kept
        assert all(level.shape[-2:] == (4, 5) for level in reduced)


def test_orthogonal_directions_are_orthonormal_and_each_level_has_its_share() -> None:
    module = reduction("orthogonal", kept=18)
    eyes = [torch.eye(size).reshape(1, size, size, 1) for size in SIZES]
    for size, directions in zip(SIZES, module(eyes), strict=True):
        matrix = directions[0, :, :, 0]  # (d_l, C_l)
        assert matrix.shape == (size // 2, size)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size // 2), rtol=0, atol=1e-6)


def test_all_directions_keep_every_length() -> None:
    made = levels()
    for before, after in zip(made, reduction("orthogonal", kept=36)(made), strict=True):
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))


def test_a_draw_copies_channels_of_the_input() -> None:
    module, made = reduction("draw"), levels()
    assert torch.equal(torch.cat(module(made), 1), torch.cat(made, 1)[:, module.channels.long()])


@pytest.mark.parametrize("kind", ["draw", "orthogonal"])
def test_the_seed_decides_and_the_state_holds_it(kind: ReductionKind) -> None:
    first, again, other = reduction(kind), reduction(kind), reduction(kind, seed=1)
    for one, two in zip(first(levels()), again(levels()), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(torch.cat(first(levels()), 1), torch.cat(other(levels()), 1))
    loaded = ChannelReduction(SIZES, 10, kind)
    loaded.channels, loaded.directions = first.channels, first.directions
    for one, two in zip(first(levels()), loaded(levels()), strict=True):
        assert torch.equal(one, two)
