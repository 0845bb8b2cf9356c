"""The guided filter and its box mean, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fettle.refine.guided import box_mean, guided_filter, guided_map


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def looped_mean(values: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    padded = np.pad(values, radius, mode="symmetric")
    side = 2 * radius + 1
    height, width = values.shape
    return np.array(
        [[padded[y : y + side, x : x + side].mean() for x in range(width)] for y in range(height)]
    )


@pytest.mark.parametrize(
    ("size", "radius"), [((9, 7), 2), ((4, 5), 4), ((3, 2), 8), ((1, 1), 3), ((6, 6), 0)]
)
def test_box_mean_agrees_with_a_loop(size: tuple[int, int], radius: int) -> None:
    values = torch.rand(1, *size, generator=seeded(), dtype=torch.float64)
    np.testing.assert_allclose(
        box_mean(values, radius)[0], looped_mean(values[0].numpy(), radius), atol=1e-12
    )


def test_the_filter_agrees_with_a_loop() -> None:
    values, guide = torch.rand(2, 12, 10, generator=seeded(), dtype=torch.float64)
    p, i, eps = values.numpy(), guide.numpy(), 1e-3
    mean_p, mean_i = looped_mean(p, 2), looped_mean(i, 2)
    a = (looped_mean(i * p, 2) - mean_i * mean_p) / (looped_mean(i * i, 2) - mean_i**2 + eps)
    expected = looped_mean(a, 2) * i + looped_mean(mean_p - a * mean_i, 2)
    np.testing.assert_allclose(guided_filter(values[None], guide[None], 2, eps)[0], expected, atol=1e-10)


@pytest.mark.parametrize("level", [0.0, 0.37, 812.5])
def test_a_constant_stays_that_constant(level: float) -> None:
    guide = torch.rand(1, 20, 24, generator=seeded())
    found = guided_filter(torch.full((1, 20, 24), level), guide, 4, 1e-3)
    torch.testing.assert_close(found, torch.full_like(found, level), rtol=1e-6, atol=1e-6)


def test_without_any_trust_in_the_guide_it_is_two_box_means() -> None:
    values, guide = torch.rand(2, 1, 16, 20, generator=seeded())
    found = guided_filter(values, guide, 3, 1e9)
    torch.testing.assert_close(found, box_mean(box_mean(values, 3), 3))


def test_an_edge_of_the_guide_is_kept() -> None:
    step = (torch.arange(32) >= 16).float().expand(1, 32, 32)
    noisy = step + 0.2 * torch.randn(1, 32, 32, generator=seeded())
    found = guided_filter(noisy, step, 4, 1e-3)
    assert float((found - step).abs().max()) < 0.15
    assert float((box_mean(noisy, 4) - step).abs().max()) > 0.4


def test_what_is_not_valid_has_no_part() -> None:
    values, guide = torch.rand(2, 1, 16, 20, generator=seeded())
    valid = torch.ones(1, 16, 20, dtype=torch.bool)
    valid[:, :, 12:] = False
    first = guided_filter(values, guide, 3, 1e-3, valid)
    second = guided_filter(
        torch.where(valid, values, 50.0), torch.where(valid, guide, torch.nan), 3, 1e-3, valid
    )
    torch.testing.assert_close(first, second)
    assert not bool(first[~valid].any())


def bright_square(side: int) -> tuple[Tensor, Tensor]:
    """A picture with a square in it, and a coarse map of which one token shows it."""
    views, z = torch.zeros(1, 3, side, side), torch.zeros(1, side // 32, side // 32)
    views[..., side // 2 : side // 2 + 32, side // 2 : side // 2 + 32] = 1
    z[:, side // 64, side // 64] = 10
    return views, z


def test_a_map_takes_the_shape_of_what_it_lies_on() -> None:
    views, z = bright_square(256)
    valid = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    found = guided_map(z, views, valid)[0]
    ratio = float(found[128:160, 128].mean() / found[128:160, 127].mean())
    assert ratio > 1.3  # over one pixel, where the coarse map itself rises by 3 %


def test_a_smaller_frame_has_a_smaller_radius() -> None:
    generator = seeded()
    views, z = torch.rand(1, 3, 64, 64, generator=generator), torch.rand(1, 64, 64, generator=generator)
    valid = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    torch.testing.assert_close(
        guided_map(z, views, valid), guided_filter(z, views.mean(dim=1), 2, 1e-3, valid[:, 0])
    )
