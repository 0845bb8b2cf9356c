"""Levels onto one grid, and scores of maps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.layers.pixel_map import valid_tokens
from fettle.layers.token_grid import aligned_to, enlarged, score_of_map


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everywhere(anomaly_map: Tensor) -> Tensor:
    return torch.ones(anomaly_map.shape, dtype=torch.bool)


# --- std of a map


def test_std_of_a_single_pixel() -> None:
    one = torch.zeros(1, 256, 256)
    one[0, 100, 3] = 1
    mean = 1 / 65536
    assert float(score_of_map(one, everywhere(one), "std")) == pytest.approx(0.00390622, abs=1e-8)
    assert float(score_of_map(one, everywhere(one), "std")) == pytest.approx(math.sqrt(mean - mean**2))


def test_std_is_that_of_the_population() -> None:
    maps = torch.rand(3, 20, 30, generator=seeded())
    expected = maps.flatten(1).std(dim=1, unbiased=False)
    torch.testing.assert_close(score_of_map(maps, everywhere(maps), "std"), expected)


def test_std_is_of_valid_pixels_alone() -> None:
    maps = torch.rand(2, 20, 30, generator=seeded())
    valid = torch.rand(2, 20, 30, generator=seeded(1)) < 0.5
    ruined = maps.masked_fill(~valid, 100)
    expected = torch.stack([own[inside].std(unbiased=False) for own, inside in zip(maps, valid, strict=True)])
    torch.testing.assert_close(score_of_map(maps, valid, "std"), expected)
    assert torch.equal(score_of_map(ruined, valid, "std"), score_of_map(maps, valid, "std"))


def test_padding_does_not_lower_std() -> None:
    maps = torch.rand(1, 20, 30, generator=seeded())
    padded = F.pad(maps, (0, 30, 0, 0))
    valid = everywhere(padded)
    valid[..., 30:] = False
    alone = score_of_map(maps, everywhere(maps), "std")
    torch.testing.assert_close(score_of_map(padded, valid, "std"), alone)


def test_std_of_a_level_map_and_of_nothing_is_nought() -> None:
    level = torch.full((1, 8, 8), 7.0)
    assert float(score_of_map(level, everywhere(level), "std")) == pytest.approx(0, abs=1e-6)
    assert float(score_of_map(level, ~everywhere(level), "std")) == 0


def test_std_of_large_values_does_not_cancel() -> None:
    maps = 1000 + torch.rand(1, 50, 50, generator=seeded())
    expected = float(maps.double().std(unbiased=False))
    assert float(score_of_map(maps, everywhere(maps), "std")) == pytest.approx(expected, rel=1e-3)


def test_nan_in_a_map_is_no_finite_std() -> None:
    maps = torch.rand(1, 8, 8, generator=seeded())
    maps[0, 3, 3] = torch.nan
    assert bool(score_of_map(maps, everywhere(maps), "std").isnan().all())


# --- grids


@pytest.mark.parametrize("grid", [(8, 12), (3, 4)])
def test_aligned_corners_stay_where_they_are(grid: tuple[int, int]) -> None:
    level = torch.rand(1, 2, 4, 6, generator=seeded())
    found = aligned_to(level, grid, "corners")
    for y in (0, -1):
        for x in (0, -1):
            torch.testing.assert_close(found[..., y, x], level[..., y, x])


def test_a_level_of_that_grid_is_taken_as_it_is() -> None:
    level = torch.rand(1, 2, 4, 6, generator=seeded())
    assert aligned_to(level, (4, 6), "corners") is level


def test_enlarging_with_aligned_corners_is_torchs() -> None:
    error = torch.rand(2, 4, 6, generator=seeded())
    found = enlarged(error, torch.ones(2, 1, 16, 24, dtype=torch.bool), "corners")
    expected = F.interpolate(error[:, None], (16, 24), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sides", [(64, 64, 16, 16), (64, 64, 15, 21), (70, 90, 32, 31), (10, 10, 13, 3)])
def test_a_token_is_valid_if_any_pixel_that_it_touches_is(sides: tuple[int, int, int, int]) -> None:
    """Also where cells are no whole pixels."""
    height, width, *grid = sides
    draws = torch.Generator().manual_seed(0)
    for share in (0.01, 0.2, 0.9):
        valid = torch.rand(3, 1, height, width, generator=draws) < share
        expected = F.adaptive_max_pool2d(valid.float(), grid)[:, 0] > 0
        assert torch.equal(valid_tokens(valid, (grid[0], grid[1])), expected)
