"""Pictures turned by small angles: which way, how far, and what comes in at the corners."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.perturb.rotation import rotated


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everywhere(pictures: Tensor) -> Tensor:
    return torch.ones(len(pictures), 1, *pictures.shape[-2:], dtype=torch.bool)


def lines(count: int, height: int, width: int) -> Tensor:
    """Pictures of one short line to the right of the centre, whose angle can be read."""
    pictures = torch.zeros(count, 3, height, width)
    pictures[..., height // 2, width // 2 + 20 : width // 2 + 24] = 1
    return pictures


def angles_of(turned: Tensor) -> Tensor:
    """Of the bright spot as seen from the centre, degrees."""
    height, width = turned.shape[-2:]
    y = torch.arange(height) - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    weight = turned[:, 0] / turned[:, 0].sum(dim=(1, 2), keepdim=True)
    across = (weight * x).sum(dim=(1, 2))
    down = (weight * y[:, None]).sum(dim=(1, 2))
    return torch.atan2(down, across) * 180 / math.pi


@pytest.mark.parametrize("sides", [(64, 64), (64, 128), (128, 64)])
def test_angles_are_uniform_within_the_bound_and_each_pictures_own(sides: tuple[int, int]) -> None:
    pictures = lines(400, *sides)
    turned, _ = rotated(pictures, everywhere(pictures), 5, seeded())
    away = angles_of(turned) - angles_of(pictures)[0]
    assert float(away.abs().max()) <= 5.2 and float(away.max()) > 4.5 and float(away.min()) < -4.5
    assert abs(float(away.mean())) < 0.5
    assert float(away.std()) == pytest.approx(10 / math.sqrt(12), rel=0.1)


def test_length_is_kept_on_rectangles() -> None:
    pictures = lines(50, 64, 128)
    turned, _ = rotated(pictures, everywhere(pictures), 40, seeded())
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(128) - 63.5, indexing="ij")
    distance = (x.square() + y.square()).sqrt()
    far = (turned[:, 0] * distance).sum(dim=(1, 2)) / turned[:, 0].sum(dim=(1, 2))
    assert float((far - 22).abs().max()) < 0.5


def test_corners_are_mirrored_and_never_black() -> None:
    plain = torch.full((8, 3, 32, 48), 0.6)
    turned, valid = rotated(plain, everywhere(plain), 30, seeded())
    torch.testing.assert_close(turned, plain)
    assert bool(valid.all())


def test_valid_turns_along() -> None:
    pictures = torch.rand(6, 3, 64, 64, generator=seeded(1))
    valid = everywhere(pictures)
    valid[..., :32] = False
    pictures[..., :32] = 0
    pictures[..., 32:] += 1
    turned, inside = rotated(pictures, valid, 20, seeded())
    agree = (turned[:, :1] > 0.5) == inside
    assert float(agree.float().mean()) > 0.97
    assert float((inside != valid).float().mean()) > 0.02


def test_a_seed_repeats_and_no_angle_changes_nothing() -> None:
    pictures = F.interpolate(torch.rand(3, 3, 8, 8, generator=seeded(2)), size=(32, 32), mode="bilinear")
    one, same, other = (rotated(pictures, everywhere(pictures), 5, seeded(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(rotated(pictures, everywhere(pictures), 0, seeded())[0], pictures)
