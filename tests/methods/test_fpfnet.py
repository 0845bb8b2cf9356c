"""FPFNet is UniAD with two switches: what they change, and that without them nothing is left of it."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from test_uniad import batch_of, good_pictures, prepared, train, whole

from fettle.methods.fpfnet import FPFNet, FPFNetConfig
from fettle.methods.registry import find_method, make_config
from fettle.methods.uniad import Uniad, UniadConfig
from fettle.perturb.pool import NAMED_POOLS

OFF: dict[str, object] = {"pool": "gaussian", "fusion": "none"}


def test_both_switches_off_is_uniad_bit_for_bit() -> None:
    uniad, fpfnet = prepared("uniad"), prepared("fpfnet", **OFF)
    assert isinstance(fpfnet, FPFNet)
    pictures = good_pictures(4)
    batch = batch_of(uniad, pictures)

    def assert_same_state() -> None:
        first, second = uniad.state_dict(), fpfnet.state_dict()
        assert list(first) == list(second)
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name

    assert_same_state()
    assert train(uniad, batch, 5) == train(fpfnet, batch, 5)
    assert_same_state()
    for one, other in zip(uniad(pictures, whole(pictures)), fpfnet(pictures, whole(pictures)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("switch", ["pool", "fusion"])
def test_each_switch_alone_changes_the_training(switch: str) -> None:
    uniad = prepared("uniad")
    fpfnet = prepared("fpfnet", **{name: value for name, value in OFF.items() if name != switch})
    for name, tensor in uniad.state_dict().items():  # the same start: neither has a parameter
        assert torch.equal(tensor, fpfnet.state_dict()[name]), name
    batch = batch_of(uniad, good_pictures(4))
    assert train(uniad, batch, 5) != train(fpfnet, batch, 5)


def test_both_share_cached_features() -> None:
    assert prepared("uniad").feature_key() == prepared("fpfnet").feature_key()


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_presets_are_those_of_uniad_with_the_switches_on(preset: str) -> None:
    ours, base = FPFNet.presets[preset], Uniad.presets[preset]
    assert (ours.backbone, ours.frame, ours.size) == (base.backbone, base.frame, base.size)
    config = cast(FPFNetConfig, ours.config)
    assert config.pool == NAMED_POOLS["fpfnet"] and config.fusion == "encoder_decoder"
    back = config.model_copy(update={"pool": NAMED_POOLS["gaussian"], "fusion": "none"})
    assert UniadConfig.model_validate(back.model_dump()) == base.config


def test_presets_can_be_changed_field_by_field() -> None:
    config = make_config(find_method("fpfnet"), "paper", {"pool": "base_plus_one", "fusion": "full"})
    assert isinstance(config, FPFNetConfig)
    assert config.pool == NAMED_POOLS["base_plus_one"] and config.fusion == "full"
    assert (config.width, config.epochs, config.lr, config.warmup) == (256, 1000, 1e-4, 0)
    assert FPFNetConfig.model_validate_json(config.model_dump_json()) == config


def test_traits_are_those_of_uniad() -> None:
    assert FPFNet.traits == Uniad.traits and FPFNet.name == "fpfnet"
