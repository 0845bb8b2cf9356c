"""Features and cue from one pass: the features are those of a plain pass; the cue says where something is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fettle.backbones import load_backbone
from fettle.backbones.networks import ConvPyramid, VisionTransformer, energy_cue
from fettle.errors import UsageError


def test_conv_features_beside_the_cue_are_the_plain_ones() -> None:
    backbone = load_backbone("tf_efficientnet_lite2", ["stride8", "stride16"])
    assert isinstance(backbone, ConvPyramid)
    picture = torch.rand(2, 3, 128, 160)
    features, cue = backbone.features_and_cue(picture, ["stride8", "stride16"])
    for name, expected in backbone(picture, ["stride8", "stride16"]).items():
        assert torch.equal(features[name], expected)
    assert cue.shape == (2, 8, 10)
    assert float(cue.min()) >= 0 and float(cue.max()) <= 1


def test_energy_cue_is_high_where_the_activation_is() -> None:
    level = torch.full((1, 4, 16, 16), 0.1)
    level[..., 4:8, 8:12] = 3.0
    cue = energy_cue(level, (8, 8))
    assert float(cue[0, 2:4, 4:6].min()) == pytest.approx(1.0)
    assert float(cue[0, 5:, :3].max()) == pytest.approx(0.0, abs=1e-6)


def test_energy_cue_ignores_the_border_and_the_scale() -> None:
    level = torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    louder = 7 * level
    louder[..., 0, :] = 99  # zero padding makes the border stand out: it must not rule the cue
    torch.testing.assert_close(energy_cue(louder, (16, 16)), energy_cue(level, (16, 16)))


def test_constant_energy_is_neither_high_nor_low() -> None:
    torch.testing.assert_close(energy_cue(torch.ones(1, 4, 16, 16), (8, 8)), torch.full((1, 8, 8), 0.5))


def test_a_network_without_attention_refuses_such_a_cue() -> None:
    backbone = load_backbone("tiny", ["stride8"], weights="random")
    assert isinstance(backbone, ConvPyramid)
    with pytest.raises(UsageError, match="energy"):
        backbone.features_and_cue(torch.rand(1, 3, 64, 64), ["stride8"], "cls")


@pytest.mark.parametrize("cue", ["cls", "received"])
def test_vit_cue_is_the_mean_attention_of_its_blocks(cue: str, real_weights: Path) -> None:
    backbone = load_backbone("vit_small_patch14", ["block3", "block6"])
    assert isinstance(backbone, VisionTransformer)
    picture = torch.rand(2, 3, 112, 126)
    with torch.inference_mode():
        features, found = backbone.features_and_cue(picture, ["block3", "block6"], cue)
        plain = backbone(picture, ["block3", "block6"])
        maps = backbone.attention(picture, [3, 6])
    for name, expected in plain.items():
        assert torch.equal(features[name], expected)
    rows = [m.mean(1)[:, 0, 1:] if cue == "cls" else m.mean(1)[:, 1:, 1:].mean(1) for m in maps]
    torch.testing.assert_close(found.flatten(1), torch.stack(rows).mean(0))
    assert found.shape == (2, 8, 9)
