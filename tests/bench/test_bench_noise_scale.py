"""The noise-scale probe against its closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import tiny_entry, write_good
from fettle.backbones import load_backbone
from fettle.bench.noise_scale import fit_denoiser, largest_mean, probe_noise_scale, residual
from fettle.errors import UsageError
from fettle.images.framing import Frame
from fettle.methods.registry import find_method, make_config
from fettle.protocols import Method


def unfitted(name: str) -> Method:
    method_class = find_method(name)
    config = make_config(method_class, "compact", {})
    levels = method_class.choose_levels(tiny_entry().levels, config)
    return method_class(load_backbone("tiny", levels, weights="random"), config, levels)


def test_residual_is_the_best_linear_denoisers() -> None:
    """No other linear map rebuilds noisy tokens with less squared error."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    good = torch.randn(40_000, 5, generator=generator, dtype=torch.float64) @ mix + 3
    denoiser = fit_denoiser(good.split(7_000))
    torch.testing.assert_close(denoiser.mean, good.mean(dim=0))
    noisy = good + 1.5 * torch.randn(good.shape, generator=generator, dtype=torch.float64)
    centred = noisy - noisy.mean(dim=0)
    best = torch.linalg.lstsq(centred, good - good.mean(dim=0)).solution  # (C, C)
    expected = (centred[:100] - centred[:100] @ best).norm(dim=1)
    found = residual(
        (centred[:100] + denoiser.mean).view(1, 10, 10, 5), denoiser, torch.tensor([1.5])
    ).flatten()
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.02)


def test_little_noise_copies_and_much_noise_keeps_the_mean_alone() -> None:
    good = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    denoiser = fit_denoiser([good])
    tokens = good[:8].view(2, 2, 2, 4)
    faint, huge = (residual(tokens, denoiser, torch.full((2,), noise)) for noise in (1e-4, 1e4))
    assert float(faint.max()) < 1e-6
    torch.testing.assert_close(huge, (tokens - denoiser.mean).norm(dim=3), rtol=1e-5, atol=0)


def test_largest_mean_leaves_out_what_is_not_valid() -> None:
    error, inside = torch.zeros(1, 5, 5), torch.ones(1, 5, 5, dtype=torch.bool)
    error[0, 0, 0] = 4.0
    assert float(largest_mean(error, inside)) == pytest.approx(1.0)  # one of the corner's four
    inside[0, 0, 1] = False
    assert float(largest_mean(error, inside)) == pytest.approx(4 / 3)
    inside[0, 0, 0] = False
    assert float(largest_mean(error, inside)) == 0


@pytest.mark.parametrize("name", ["agpnet", "uniad"])
def test_probe_finds_pasted_defects_and_repeats(name: str, tmp_path: Path) -> None:
    good = sorted(write_good(tmp_path / "good", 24, height=128, width=128).iterdir())
    frame = Frame(mode="stretch", height=128, width=128)

    def probe(seed: int) -> dict[float, float]:
        return probe_noise_scale(
            unfitted(name), frame, good[:12], good[12:], weights=(0.05, 0.3), pastes=1, seed=seed
        )

    found = probe(0)
    assert list(found) == [0.05, 0.3] and found == probe(0) != probe(1)
    assert max(found.values()) > 0.6


def test_method_without_tokens_is_refused(tmp_path: Path) -> None:
    good = sorted(write_good(tmp_path / "good", 2).iterdir())
    with pytest.raises(UsageError, match="'patchcore' has no tokens"):
        probe_noise_scale(unfitted("patchcore"), Frame(mode="stretch", height=64, width=64), good, good)
