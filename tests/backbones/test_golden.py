"""Known backbones give their golden values: weights, normalisation, padding and strides are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fettle.backbones import load_backbone
from fettle.backbones.networks import VisionTransformer

# network, level: mean, std, sum of abs, an entry's place and value; measured on the golden picture
GOLDEN = {
    "resnet18": {
        "stride4": (0.603076, 0.773484, 158092.7, (23, 16, 16), 4.8735),
        "stride8": (0.219709, 0.373828, 28797.7, (66, 8, 8), 2.4911),
        "stride16": (0.135182, 0.253208, 8859.3, (231, 4, 4), 1.3702),
    },
    "resnet50_keras": {
        "stride4": (1.232162, 1.776589, 1292015.1, (123, 16, 16), 10.9727),
        "stride8": (0.970087, 1.653885, 508605.0, (346, 8, 8), 11.8853),
        "stride16": (0.441887, 1.003878, 115837.9, (80, 4, 4), 11.6719),
    },
    "tf_efficientnet_lite2": {
        "stride4": (-1.705409, 16.603809, 1319055.6, (11, 16, 16), 40.6816),
        "stride8": (-0.122484, 11.594239, 444520.4, (27, 8, 8), -35.9565),
        "stride16": (-0.382804, 5.020360, 120367.5, (2, 4, 4), 11.8500),
        "stride32": (-0.042663, 2.496804, 44494.7, (135, 2, 2), 10.1954),
    },
}


def golden_picture(side: int) -> Tensor:
    """(1, 3, side, side) in 0..1: v = (7 y + 11 x + 50 c + x y // 16) mod 256."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    channels = [(7 * y + 11 * x + 50 * c + x * y // 16) % 256 for c in range(3)]
    return torch.stack(channels)[None].float() / 255


def test_golden_picture_is_the_right_one() -> None:
    assert round(float((golden_picture(256).double() * 255).sum())) == 25_058_048
    assert round(float((golden_picture(252).double() * 255).sum())) == 24_282_771


def check(name: str) -> None:
    expected = GOLDEN[name]
    backbone = load_backbone(name, list(expected))
    with torch.inference_mode():
        features = backbone(golden_picture(256), list(expected))
    for level, (mean, std, total, place, value) in expected.items():
        tensor = features[level][0].double()
        assert float(tensor.std(unbiased=False)) == pytest.approx(std, rel=1e-3)
        assert float(tensor.mean()) == pytest.approx(mean, abs=1e-3 * std)
        assert float(tensor.abs().sum()) == pytest.approx(total, rel=1e-3)
        assert float(tensor[place]) == pytest.approx(value, rel=1e-3)


def test_default_backbone_comes_from_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FETTLE_WEIGHTS", raising=False)
    check("tf_efficientnet_lite2")


@pytest.mark.parametrize("name", ["resnet18", "resnet50_keras"])
def test_cnn_gives_golden_values(name: str, real_weights: Path) -> None:
    check(name)


def test_vit_gives_golden_tokens(real_weights: Path) -> None:
    expected = {
        "block3": (-0.001115, 0.081075, 1.66603, 0.04909),
        "block6": (-0.000383, 0.094631, 1.63377, 0.07185),
        "block9": (0.000533, 0.206418, 5.40554, 0.12854),
        "block12": (0.034488, 2.767096, 10.47094, -2.54702),
        "final": (-0.015818, 2.665759, 9.78836, -3.23942),
    }
    backbone = load_backbone("vit_small_patch14", list(expected))
    assert isinstance(backbone, VisionTransformer)
    picture = golden_picture(252)
    with torch.inference_mode():
        for level, (mean, std, largest, value) in expected.items():
            tokens = backbone.tokens(picture, level)
            assert tokens.shape == (1, 325, 384)
            assert float(tokens.double().std(unbiased=False)) == pytest.approx(std, rel=1e-3)
            assert float(tokens.double().mean()) == pytest.approx(mean, abs=1e-3 * std)
            assert float(tokens.abs().max()) == pytest.approx(largest, rel=1e-3)
            assert float(tokens[0, 163, 191]) == pytest.approx(value, rel=2e-3)


def test_vit_attention_reproduces_the_block(real_weights: Path) -> None:
    """The weights that we compute openly are those that the fused attention used."""
    backbone = load_backbone("vit_small_patch14", ["block1"])
    assert isinstance(backbone, VisionTransformer)
    picture = golden_picture(126)
    with torch.inference_mode():
        (weights,) = backbone.attention(picture, [1])
        assert weights.shape == (1, 6, 82, 82)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6, 82))
        net = backbone.net
        x = net.norm_pre(
            net.patch_drop(net._pos_embed(net.patch_embed((picture - backbone.mean) / backbone.std)))
        )
        block = net.blocks[0]
        qkv = block.attn.qkv(block.norm1(x)).reshape(1, 82, 3, 6, 64).permute(2, 0, 3, 1, 4)
        ours = block.attn.proj((weights @ qkv[2]).transpose(1, 2).reshape(1, 82, 384))
        torch.testing.assert_close(ours, block.attn(block.norm1(x)), rtol=1e-4, atol=1e-4)


def test_vit_takes_any_size_of_whole_patches(real_weights: Path) -> None:
    backbone = load_backbone("vit_small_patch14", ["block6"])
    with torch.inference_mode():
        features = backbone(torch.rand(2, 3, 112, 154), ["block6"])
    assert features["block6"].shape == (2, 384, 8, 11)
