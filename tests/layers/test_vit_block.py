"""The block of a plain ViT: its size, its attention, and who is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fettle.layers.positions import wave_positions
from fettle.layers.vit_block import SelfAttention, ViTBlock, draw_weights, seen_by_all


def seeded(module: nn.Module) -> nn.Module:
    draw_weights(module, torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize("width", [32, 384])
def test_parameters(width: int) -> None:
    block = ViTBlock(width, 4)
    assert sum(p.numel() for p in block.parameters()) == 12 * width**2 + 13 * width


def test_attention_is_that_of_torch() -> None:
    own = SelfAttention(32, 4)
    seeded(own)
    other = nn.MultiheadAttention(32, 4, batch_first=True)
    other.load_state_dict(
        {
            "in_proj_weight": own.qkv.weight,
            "in_proj_bias": own.qkv.bias,
            "out_proj.weight": own.proj.weight,
            "out_proj.bias": own.proj.bias,
        }
    )
    x = 3 * torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 5:] = False
    expected, weights = other(x, x, x, key_padding_mask=~valid)
    torch.testing.assert_close(own(x, seen_by_all(valid)), expected, atol=1e-5, rtol=1e-5)
    received = own.received(x, valid)
    torch.testing.assert_close(received[0], weights[0].mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(received[1], weights[1, :5].mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(received.sum(1), torch.ones(2), atol=1e-5, rtol=0)


def test_equal_scores_look_at_all_alike() -> None:
    attention = SelfAttention(8, 2)
    nn.init.zeros_(attention.qkv.weight)
    nn.init.zeros_(attention.qkv.bias)
    received = attention.received(torch.randn(1, 16, 8), torch.ones(1, 16, dtype=torch.bool))
    torch.testing.assert_close(received, torch.full((1, 16), 1 / 16))


def test_a_picture_without_valid_tokens_gives_numbers() -> None:
    block = ViTBlock(8, 2)
    valid = torch.zeros(1, 4, dtype=torch.bool)
    assert bool(block(torch.randn(1, 4, 8), seen_by_all(valid)).isfinite().all())


def test_weights_are_drawn_by_the_generator() -> None:
    one, two = ViTBlock(64, 4), ViTBlock(64, 4)
    seeded(one)
    seeded(two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert float(one.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not bool(one.fc1.bias.any()) and bool((one.norm1.weight == 1).all())


def test_waves_tell_every_place_of_a_rectangle() -> None:
    waves = wave_positions((12, 20), 64, torch.device("cpu"))
    assert waves.shape == (240, 64)
    distance = torch.cdist(waves, waves) + 10 * torch.eye(240)
    assert float(distance.min()) > 0.1
    torch.testing.assert_close(waves.square().sum(1), torch.full((240,), 32.0))
