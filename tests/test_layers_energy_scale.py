"""The scale of patch energies."""

from __future__ import annotations

import pytest
import torch

from fettle.layers.energy_scale import EnergyScale


def settled(energies: torch.Tensor) -> EnergyScale:
    scale = EnergyScale()
    scale.settle(energies)
    return scale


def test_energies_are_raw_before_they_settle() -> None:
    energies = torch.tensor([0.0, 0.5, 7.0])
    assert torch.equal(EnergyScale()(energies), energies)


def test_median_becomes_zero_and_the_rare_one_becomes_one() -> None:
    energies = torch.arange(1, 1001).float()  # 1..1000
    z = settled(energies)(energies)
    assert float(z[499]) == 0 and float(z[990]) == 1  # 500 is the median, 991 the 99 % quantile
    assert float(z[0]) < 0 < 1 < float(z[999])


def test_order_of_energies_changes_nothing() -> None:
    energies = torch.rand(501, generator=torch.Generator().manual_seed(0))
    one, other = settled(energies), settled(energies.flip(0))
    assert torch.equal(one.median, other.median) and torch.equal(one.rare, other.rare)


def test_one_extreme_energy_moves_the_scale_little() -> None:
    energies = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    plain, moved = settled(energies), settled(torch.cat([energies, torch.tensor([1e6])]))
    assert float(moved.rare - moved.median) == pytest.approx(float(plain.rare - plain.median), rel=0.05)


@pytest.mark.parametrize("energy", [0.0, 1e-4, 1.0, 100.0, 1e4])
def test_equal_energies_give_no_division_by_zero(energy: float) -> None:
    scale = settled(torch.full((50,), energy))
    assert float(scale(torch.tensor(energy))) == 0
    assert bool(torch.isfinite(scale(torch.tensor([0.0, energy, 2 * energy + 1]))).all())
    assert float(scale.rare) > float(scale.median)


def test_one_energy_settles() -> None:
    assert float(settled(torch.tensor([3.0]))(torch.tensor(3.0))) == 0


def test_scale_is_saved() -> None:
    energies = torch.rand(100, generator=torch.Generator().manual_seed(1))
    scale, fresh = settled(energies), EnergyScale()
    fresh.load_state_dict(scale.state_dict())
    assert torch.equal(fresh(energies), scale(energies))


def test_gradient_is_one_over_the_spread() -> None:
    scale = settled(torch.arange(100).float())
    energy = torch.tensor(5.0, requires_grad=True)
    scale(energy).backward()
    assert energy.grad is not None
    assert float(energy.grad) == pytest.approx(1 / float(scale.rare - scale.median))
