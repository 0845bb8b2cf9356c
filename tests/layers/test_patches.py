"""Patches: the order in which a token holds its cells, and the way back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fettle.layers.patches import patchify, unpatchify


def counted() -> torch.Tensor:
    """The specification's example: 24 channels of 16 x 16, all numbers in order."""
    return torch.arange(24 * 16 * 16).view(1, 24, 16, 16)


def test_within_a_token_the_channel_runs_fastest() -> None:
    tokens = patchify(counted(), 2)[0]
    assert tokens.shape == (64, 96)
    assert tokens[0, :3].tolist() == [0, 256, 512]


def test_then_the_cells_column_and_then_its_row() -> None:
    first = patchify(counted(), 2)[0, 0]
    assert (int(first[24]), int(first[48])) == (1, 16)


def test_tokens_run_row_by_row() -> None:
    tokens = patchify(counted(), 2)[0]
    assert (int(tokens[1, 0]), int(tokens[8, 0])) == (2, 32)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_there_and_back_is_exact_on_rectangles(patch: int) -> None:
    features = torch.randn(2, 5, 4 * patch, 3 * patch, generator=torch.Generator().manual_seed(0))
    tokens = patchify(features, patch)
    assert tokens.shape == (2, 12, patch**2 * 5)
    assert torch.equal(unpatchify(tokens, patch, (4, 3)), features)


def test_a_convolution_lays_the_same_numbers_out_by_channel_first() -> None:
    unfolded = F.unfold(counted().float(), 2, stride=2).transpose(1, 2)  # as a kernel's weights lie
    by_channel_last = unfolded.unflatten(2, (24, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(patchify(counted().float(), 2), by_channel_last)
    assert not torch.equal(patchify(counted().float(), 2), unfolded)
