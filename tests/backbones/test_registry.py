"""Backbones by name: what is refused, what is cut away, where weights come from."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fettle.backbones import backbone_names, load_backbone
from fettle.backbones.registry import find_entry, name_by_hash, resolve_level_names
from fettle.errors import UsageError, WeightsError


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="resnet18"):
        load_backbone("resnet81", ["stride8"])


def test_known_names_are_listed() -> None:
    assert {"tf_efficientnet_lite2", "resnet18", "resnet50_keras", "vit_small_patch14"} <= set(
        backbone_names()
    )


def test_a_level_that_the_file_lacks_is_refused_by_name(real_weights: Path) -> None:
    with pytest.raises(WeightsError, match=r"'stride32'.*stride4, stride8, stride16"):
        load_backbone("resnet18", ["stride16", "stride32"])


def test_a_level_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="stride5"):
        load_backbone("tiny", ["stride5"], weights="random")


def test_resnet_names_of_levels_are_understood() -> None:
    assert resolve_level_names(find_entry("resnet18"), ("layer2", "layer3")) == ("stride8", "stride16")
    assert resolve_level_names(find_entry("tiny"), ("layer2",)) == ("layer2",)


def test_only_the_blocks_that_are_needed_are_built() -> None:
    shallow = load_backbone("tf_efficientnet_lite2", ["stride8"])
    deep = load_backbone("tf_efficientnet_lite2", ["stride8", "stride32"])
    assert len(shallow.net.blocks) == 3
    assert len(deep.net.blocks) == 7
    picture = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(
        shallow(picture, ["stride8"])["stride8"], deep(picture, ["stride8"])["stride8"]
    )


def test_side_that_is_no_multiple_is_refused() -> None:
    backbone = load_backbone("tiny", ["stride8"], weights="random")
    with pytest.raises(UsageError, match="multiples of 32"):
        backbone(torch.rand(1, 3, 60, 64), ["stride8"])


def test_training_mode_changes_nothing() -> None:
    backbone = load_backbone("tf_efficientnet_lite2", ["stride8"])
    picture = torch.rand(2, 3, 64, 64)
    before = backbone(picture, ["stride8"])["stride8"]
    backbone.train()
    torch.testing.assert_close(backbone(picture, ["stride8"])["stride8"], before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_gradient_reaches_the_picture() -> None:
    backbone = load_backbone("tf_efficientnet_lite2", ["stride8"])
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    backbone(picture, ["stride8"])["stride8"].square().sum().backward()
    assert picture.grad is not None and bool((picture.grad != 0).any())


def test_random_weights_only_when_asked_for_and_repeatable() -> None:
    first = load_backbone("resnet18", ["stride8"], weights="random")
    second = load_backbone("resnet18", ["stride8"], weights="random")
    assert first.spec.sha256 == "random"
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_nothing_found_names_the_remedies_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An unreachable hub is noticed within 5 s, even if looking its name up hangs."""
    monkeypatch.delenv("FETTLE_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def hang(*args: object, **kwargs: object) -> None:
        time.sleep(30)
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", hang)
    find_entry("resnet34")  # importing timm is not what is timed
    start = time.monotonic()
    with pytest.raises(WeightsError, match=r"--weights.*FETTLE_WEIGHTS.*hub"):
        load_backbone("resnet34", ["stride8"])
    assert time.monotonic() - start < 6


def test_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(4, 3, 3, 3)}, path)
    with pytest.raises(WeightsError, match="resnet18"):
        load_backbone("resnet18", ["stride8"], weights=path)


def test_damaged_and_pickled_files_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not tensors at all")
    with pytest.raises(WeightsError, match="damaged"):
        load_backbone("resnet18", ["stride8"], weights=damaged)
    pickled = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, pickled)
    with pytest.raises(WeightsError, match="hash is unknown"):
        load_backbone("resnet18", ["stride8"], weights=pickled)
    with pytest.raises(WeightsError, match="no weights file"):
        load_backbone("resnet18", ["stride8"], weights=tmp_path / "absent.safetensors")


def test_explicit_file_is_recognised_by_its_hash(real_weights: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes((real_weights / "resnet18_tv_in1k_l123.safetensors").read_bytes())
    assert name_by_hash(renamed) == "resnet18"
    backbone = load_backbone(None, ["stride8"], weights=renamed)
    assert backbone.spec.id == "resnet18"
    assert backbone.spec.source == "file renamed.safetensors"
