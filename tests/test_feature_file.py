"""Feature batches in a temporary file: the same bits, within bounds, and nothing left behind."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fettle.feature_file import FeatureFile
from fettle.protocols import FeatureBatch


def batch(seed: int = 0, **features: Tensor) -> FeatureBatch:
    generator = torch.Generator().manual_seed(seed)
    own = {
        "fine": torch.randn(2, 5, 8, 6, generator=generator),
        "odd/name": torch.randn(2, 3, generator=generator),
    }
    valid = torch.rand(2, 1, 16, 12, generator=generator) > 0.5
    names = (f"a{seed}", f"b{seed}")
    return FeatureBatch({**own, **features}, valid, names, names, names, ("nut", "nut"))


def assert_same(found: FeatureBatch, given: FeatureBatch) -> None:
    assert found[2:] == given[2:]
    assert torch.equal(found.valid, given.valid)
    assert list(found.features) == list(given.features)
    for name, tensor in given.features.items():
        assert found.features[name].dtype == tensor.dtype
        assert torch.equal(found.features[name], tensor)


def test_batches_come_back_in_their_order_with_the_same_bits(tmp_path: Path) -> None:
    kept = FeatureFile(tmp_path / "made" / "anew", max_mib=1)
    given = [batch(0), batch(1, half=torch.randn(2, 4).half()), batch(2)]
    assert all(kept.append(one) for one in given)
    for _ in range(2):
        for found, one in zip(kept, given, strict=True):
            assert_same(found, one)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)])
def test_tensors_lie_in_memory_as_they_did(order: tuple[int, ...], tmp_path: Path) -> None:
    inverse = [order.index(i) for i in range(4)]
    tensor = torch.randn(2, 3, 4, 5).permute(order).contiguous().permute(inverse)
    kept = FeatureFile(tmp_path, max_mib=1)
    kept.append(batch(fine=tensor))
    (found,) = kept
    assert found.features["fine"].stride() == tensor.stride()
    assert torch.equal(found.features["fine"], tensor)


def test_reading_in_the_middle_of_writing_changes_nothing(tmp_path: Path) -> None:
    kept = FeatureFile(tmp_path, max_mib=1)
    for seed in range(4):
        kept.append(batch(seed))
        for number, found in enumerate(kept):
            assert_same(found, batch(number))


def test_after_the_first_that_does_not_fit_none_is_kept(tmp_path: Path) -> None:
    said: list[str] = []
    kept = FeatureFile(tmp_path, max_mib=1, say=said.append)
    assert kept.append(batch(0))
    assert not kept.append(batch(1, large=torch.zeros(2, 1 << 17)))
    assert not kept.append(batch(2))  # it would fit, but the stream would have a hole
    assert [one.keys for one in kept] == [("a0", "b0")]
    (sentence,) = said
    assert "room for 1 MiB" in sentence and "--cache-mib" in sentence


def test_half_of_the_free_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    size = sum(
        tensor.numel() * tensor.element_size() for tensor in [*batch().features.values(), batch().valid]
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(4 * size))
    kept = FeatureFile(tmp_path, max_mib=1)
    assert [kept.append(batch(seed)) for seed in range(3)] == [True, True, False]


def test_no_file_is_left_and_none_is_seen(tmp_path: Path) -> None:
    kept = FeatureFile(tmp_path, max_mib=1)
    kept.append(batch())
    if os.name == "posix":
        assert not list(tmp_path.iterdir())
    del kept
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    kept = FeatureFile(tmp_path / "file" / "cache", max_mib=1, say=said.append)
    assert not kept.append(batch(0)) and not kept.append(batch(1))
    assert list(kept) == []
    (sentence,) = said
    assert "each time" in sentence and "--cache-dir" in sentence


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_ends_the_keeping_and_loses_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    kept = FeatureFile(tmp_path, max_mib=1, say=said.append)
    assert kept.append(batch(0))
    assert kept._file is not None
    kept._file.close()
    with Path("/dev/full").open("r+b", buffering=0) as full:
        kept._file = full
        assert not kept.append(batch(1))
    assert len(said) == 1
