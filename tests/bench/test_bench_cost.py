"""Costs against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fettle.bench.cost import cost_of, interleaved, multiply_adds, trainable_parameters
from fettle.detector import Detector


def test_linear_and_convolution_are_counted() -> None:
    linear, convolution = nn.Linear(5, 7), nn.Conv2d(3, 4, 3, padding=1)
    assert multiply_adds(lambda: linear(torch.zeros(2, 5))) == 2 * 5 * 7
    assert multiply_adds(lambda: convolution(torch.zeros(1, 3, 6, 8))) == 6 * 8 * 4 * 3 * 9


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_counted(masked: bool) -> None:
    query, key = torch.zeros(2, 3, 16, 8), torch.zeros(2, 3, 20, 8)
    mask = torch.ones(16, 20, dtype=torch.bool) if masked else None
    counted = multiply_adds(lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask))
    assert counted == 2 * 3 * 16 * 20 * (8 + 8)


def test_interleaved_times_come_in_pairs_and_the_first_is_dropped() -> None:
    calls: list[str] = []
    times = interleaved(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3)
    assert calls == ["a", "b"] * 4 and len(times) == 3
    assert all(one >= 0 and other >= 0 for one, other in times)


def test_cost_of_agpnet_by_hand(good_folder: Path) -> None:
    """The decoder of section 7 on the tiny backbone: the momentum copy is neither trained nor run."""
    width, depth, side = 32, 2, 4
    settings = {"width": width, "heads": 2, "depth": depth, "steps": 2, "batch": 4}
    detector = Detector.fit(
        good_folder, method="agpnet", backbone="tiny", weights="random", size=64, settings=settings
    )
    channels, tokens = 12 + 16, side * side
    expected = depth * (12 * width**2 + 13 * width) + tokens * width
    expected += width * channels + channels + channels * width + width
    found = cost_of(detector, batch=2, rounds=1)
    assert found.trainable == trainable_parameters(detector.method) == expected

    decoder = tokens * (depth * 12 * width**2 + 2 * channels * width) + depth * 2 * tokens**2 * width
    convolutions = 16**2 * 8 * 3 * 25 + 8**2 * 12 * 8 * 9 + 4**2 * 16 * 12 * 9
    assert found.backbone_multiply_adds == convolutions
    beyond = found.multiply_adds - convolutions - decoder
    assert 0 <= beyond <= 4 * (64 * 4 * 4 + 64 * 64 * 4)  # the map's two small products, twice
    assert found.seconds > 0 and found.ratio > 0


def test_memory_methods_train_nothing(good_folder: Path) -> None:
    detector = Detector.fit(
        good_folder, backbone="tiny", weights="random", size=64, settings={"bank_rows": 100}
    )
    assert trainable_parameters(detector.method) == 0
