"""Features and cue from one pass: the features are those of a plain pass; the cue says where something is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fettle.backbones import load_backbone
from fettle.backbones.networks import ConvPyramid, VisionTransformer, activation_energy
from fettle.errors import UsageError


def test_conv_features_beside_the_cue_are_the_plain_ones() -> None:
    backbone = load_backbone("tf_efficientnet_lite2", ["stride8", "stride16"])
    assert isinstance(backbone, ConvPyramid)
    picture = torch.rand(2, 3, 128, 160)
    features, cue = backbone.features_and_cue(picture, ["stride8", "stride16"])
    for name, expected in backbone(picture, ["stride8", "stride16"]).items():
        assert torch.equal(features[name], expected)
    assert cue.shape == (2, 2, 8, 10)
    _, coarse = backbone.features_and_cue(picture, ["stride8", "stride16"], cue_levels=["stride16"])
    assert torch.equal(coarse, cue[:, 1:])


def test_activation_energy_is_the_rms_over_channels_and_cells() -> None:
    level = torch.full((1, 4, 16, 16), 0.5)
    level[:, :2, 4:8, 8:12] = -3.0
    level[:, 2:, 4:8, 8:12] = 4.0
    energy = activation_energy(level, (8, 8))
    assert energy.shape == (1, 1, 8, 8)
    torch.testing.assert_close(energy[0, 0, 2:4, 4:6], torch.full((2, 2), 12.5**0.5))
    torch.testing.assert_close(energy[0, 0, 5:, :3], torch.full((3, 3), 0.5))


def test_activation_energy_leaves_the_border_out_unless_asked() -> None:
    level = torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    bordered = level.clone()
    bordered[..., 0, :] = 99  # zero padding makes the border stand out: it must not rule the cue
    assert torch.equal(activation_energy(bordered, (16, 16)), activation_energy(level, (16, 16)))
    assert float(activation_energy(bordered, (16, 16), without_border=False)[..., 0, :].min()) == 99
    tiny = activation_energy(bordered, (3, 3))  # nothing would be left of so small a grid
    assert torch.equal(tiny, activation_energy(bordered, (3, 3), without_border=False))


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
    assert found.shape == (2, 1, 8, 9)
    _, last = backbone.features_and_cue(picture, ["block3", "block6"], cue, cue_levels=["block6"])
    torch.testing.assert_close(last.flatten(1), rows[1])


def random_vit(*blocks: str) -> VisionTransformer:
    backbone = load_backbone("vit_small_patch16_224.dino", blocks, weights="random")
    assert isinstance(backbone, VisionTransformer)
    return backbone


def test_attention_beside_fused_attention_is_that_of_the_open_path() -> None:
    backbone = random_vit("block3", "block6")
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    attention = backbone.net.blocks[5].attn  # type: ignore[union-attr,index]
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        (found,) = backbone.attention(picture, [6])
        attention.fused_attn = False
        attention.attn_drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        backbone(picture, ["block6"])
    torch.testing.assert_close(found, seen[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, 6, 25), atol=1e-5, rtol=0)


def test_vit_levels_and_cue_at_256_px_and_on_a_rectangle() -> None:
    names = ["block1", "block2", "block3", "block4"]
    backbone = random_vit(*names)
    with torch.no_grad():
        features, cue = backbone.features_and_cue(torch.rand(2, 3, 256, 256), names)
        rectangle, _ = backbone.features_and_cue(torch.rand(1, 3, 192, 320), names[:1], "received")
    assert [features[name].shape for name in names] == [(2, 384, 16, 16)] * 4 and cue.shape == (2, 1, 16, 16)
    assert bool((cue.sum(dim=(2, 3)) < 1).all()) and bool((cue.sum(dim=(2, 3)) > 0.9).all())
    assert rectangle["block1"].shape == (1, 384, 12, 20)


def test_equal_scores_of_a_vit_look_at_all_alike() -> None:
    backbone = random_vit("block1", "block2")
    for block in backbone.net.blocks:  # type: ignore[union-attr]
        block.attn.qkv.weight.zero_()  # type: ignore[union-attr,operator]
        block.attn.qkv.bias.zero_()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        for cue in backbone.cues:
            _, found = backbone.features_and_cue(torch.rand(1, 3, 64, 64), ["block1", "block2"], cue)
            torch.testing.assert_close(found, torch.full((1, 1, 4, 4), 1 / 17))


@pytest.mark.parametrize(
    ("name", "word"),
    [("vit_small_patch16_dinov3", "Eva"), ("vit_relpos_small_patch16_224", "VisionTransformerRelPos")],
)
def test_vits_whose_positions_are_not_added_once_are_refused_by_class(name: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        load_backbone(name, ["block1"], weights="random")


def test_window_attention_is_refused() -> None:
    backbone = load_backbone("swin_tiny_patch4_window7_224", ["stride4"], weights="random")
    assert isinstance(backbone, ConvPyramid)
    with pytest.raises(UsageError, match="window attention"):
        backbone(torch.rand(1, 3, 224, 224), ["stride4"])


def test_blocks_without_plain_attention_have_no_readable_cue() -> None:
    backbone = load_backbone("vit_small_patch16_18x2_224", ["block1"], weights="random")
    assert isinstance(backbone, VisionTransformer)
    picture = torch.rand(1, 3, 32, 32)
    backbone(picture, ["block1"])
    with pytest.raises(UsageError, match="ParallelThingsBlock"):
        backbone.features_and_cue(picture, ["block1"])


def test_features_have_the_picture_size_that_the_patch_allows() -> None:
    backbone = load_backbone("vit_small_patch14_dinov2", ["block1"], weights="random")
    with pytest.raises(UsageError, match=r"252 and 266"):
        backbone(torch.rand(1, 3, 256, 256), ["block1"])
