"""What holds of every registered backbone, with random weights: none need be at hand."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from fettle.backbones import backbone_names, load_backbone, restore_backbone
from fettle.backbones.registry import BackboneEntry, find_entry, found_offline
from fettle.errors import UsageError
from fettle.protocols import Backbone, BackboneSpec

NAMES = backbone_names()
AT_HAND = [name for name in NAMES if found_offline(name)]
each_backbone = pytest.mark.parametrize("name", NAMES)


@cache
def entry_of(name: str) -> BackboneEntry:
    return find_entry(name)


@cache
def tapped(name: str) -> tuple[str, ...]:
    """Two levels, shallow enough to be fast."""
    return tuple(level.name for level in entry_of(name).levels[1:3])


@cache
def backbone_of(name: str) -> Backbone:
    return load_backbone(name, tapped(name), weights="random")


def pictures(name: str, count: int, seed: int = 0) -> torch.Tensor:
    """Not square, and with an even number of cells at any stride."""
    step = entry_of(name).side_step
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 2 * step, 4 * step, generator=generator)


@each_backbone
def test_levels_have_the_channels_and_strides_that_are_told(name: str) -> None:
    backbone = backbone_of(name)
    batch = pictures(name, 2)
    with torch.no_grad():
        features = backbone(batch, tapped(name))
    assert tuple(features) == tapped(name)
    for level_name, feature in features.items():
        level = backbone.spec.level(level_name)
        assert level is not None
        assert feature.shape == (
            2,
            level.channels,
            batch.shape[2] // level.stride,
            batch.shape[3] // level.stride,
        )
        assert feature.dtype == torch.float32


@each_backbone
def test_features_ignore_batch_mates(name: str) -> None:
    backbone, batch = backbone_of(name), pictures(name, 4)
    with torch.no_grad():
        together = backbone(batch, tapped(name))
        for i in range(4):
            alone = backbone(batch[i : i + 1], tapped(name))
            for level, feature in alone.items():
                torch.testing.assert_close(feature[0], together[level][i], rtol=1e-4, atol=1e-5)


@each_backbone
def test_features_repeat_bit_for_bit(name: str) -> None:
    backbone, batch = backbone_of(name), pictures(name, 2)
    with torch.no_grad():
        first, second = backbone(batch, tapped(name)), backbone(batch, tapped(name))
    assert all(torch.equal(first[level], second[level]) for level in first)


@each_backbone
def test_one_level_is_the_same_alone_and_beside_others(name: str) -> None:
    backbone, batch = backbone_of(name), pictures(name, 1)
    with torch.no_grad():
        both = backbone(batch, tapped(name))
        for level in tapped(name):
            torch.testing.assert_close(backbone(batch, (level,))[level], both[level], rtol=1e-5, atol=1e-6)


@each_backbone
def test_normalisation_is_inside(name: str) -> None:
    """The network sees 0 for the mean colour, and 1 for one deviation above it."""
    backbone = copy.deepcopy(backbone_of(name))
    assert isinstance(backbone, torch.nn.Module)
    backbone.fix(*pictures(name, 1).shape[-2:])  # what runs is then the network that is looked at
    seen: list[torch.Tensor] = []
    first = next(module for module in backbone.modules() if isinstance(module, torch.nn.Conv2d))
    handle = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.spec.mean, backbone.spec.std))
    empty = torch.zeros_like(pictures(name, 1))
    backbone(empty + mean, tapped(name))
    backbone(empty + mean + std, tapped(name))
    handle.remove()
    inside = seen[1][..., 8:-8, 8:-8]  # a network may pad what it is given
    torch.testing.assert_close(seen[0], torch.zeros_like(seen[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(inside, torch.ones_like(inside), rtol=0, atol=1e-5)


@each_backbone
def test_backbone_is_frozen_and_differentiable_in_the_picture(name: str) -> None:
    backbone, batch = backbone_of(name), pictures(name, 1).requires_grad_(True)
    assert isinstance(backbone, torch.nn.Module)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    sum(feature.square().sum() for feature in backbone(batch, tapped(name)).values()).backward()
    assert batch.grad is not None and bool(torch.isfinite(batch.grad).all()) and bool(batch.grad.any())


@each_backbone
def test_training_mode_changes_nothing(name: str) -> None:
    backbone, batch = backbone_of(name), pictures(name, 2)
    assert isinstance(backbone, torch.nn.Module)
    with torch.no_grad():
        before = backbone(batch, tapped(name))
        backbone.train()
        after = backbone(batch, tapped(name))
    assert all(torch.equal(before[level], after[level]) for level in before)


@each_backbone
def test_restored_from_its_tensors_it_gives_the_same_bits(name: str) -> None:
    backbone, batch = backbone_of(name), pictures(name, 2)
    restored = restore_backbone(backbone.spec, tapped(name), backbone.state_dict())
    assert isinstance(restored.spec, BackboneSpec) and restored.spec == backbone.spec
    with torch.no_grad():
        before, after = backbone(batch, tapped(name)), restored(batch, tapped(name))
    assert all(torch.equal(before[level], after[level]) for level in before)


@each_backbone
def test_missing_level_and_wrong_side_are_refused(name: str) -> None:
    backbone = backbone_of(name)
    unbuilt = entry_of(name).levels[0].name
    with pytest.raises(UsageError, match=f"without level '{unbuilt}'"):
        backbone(pictures(name, 1), (unbuilt,))
    step = backbone.spec.side_step
    with pytest.raises(UsageError, match=f"multiples of {step}"):
        backbone(torch.rand(1, 3, step, step + 1), tapped(name))


@pytest.mark.parametrize("name", AT_HAND)
def test_weights_at_hand_load_and_tell_where_they_are_from(name: str) -> None:
    levels = tapped(name)
    backbone = load_backbone(name, levels)
    assert len(backbone.spec.sha256) == 64 and backbone.spec.source and backbone.spec.licence
    with torch.no_grad():
        features = backbone(pictures(name, 1), levels)
    assert all(bool(torch.isfinite(feature).all()) for feature in features.values())
