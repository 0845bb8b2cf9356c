"""Resampling and blur as matrices: golden values of the patch map to pixel map step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from fettle.layers.pixel_map import pixel_map
from fettle.sampling import bilinear_matrix, gaussian_matrix, resize_map


def spread(row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    patch = np.zeros((28, 28))
    patch[row, column] = 1
    up, blur = bilinear_matrix(224, 28), gaussian_matrix(224, 4.0)
    before = up @ patch @ up.T
    return before, blur @ before @ blur.T


def test_centre_patch_has_the_golden_peak() -> None:
    before, after = spread(14, 14)
    assert before.max() == pytest.approx(0.87890625)
    assert after.max() == pytest.approx(0.36721882, abs=2e-8)
    assert after[115, 115] == pytest.approx(after.max(), abs=1e-12)
    assert after.sum() == pytest.approx(64.0)


def test_corner_patch_keeps_its_mass() -> None:
    before, after = spread(0, 0)
    assert before.max() == 1.0
    assert after.max() == pytest.approx(0.8365393, abs=1e-7)
    assert after.sum() == pytest.approx(64.0)


@pytest.mark.parametrize(("num_in", "num_out"), [(28, 224), (16, 50), (50, 16), (7, 7), (1, 5)])
def test_bilinear_is_torchs(num_in: int, num_out: int) -> None:
    values = torch.rand(1, 1, num_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = F.interpolate(values, size=num_out, mode="linear", align_corners=False)
    np.testing.assert_allclose(
        bilinear_matrix(num_out, num_in) @ values[0, 0].numpy(), expected[0, 0], atol=1e-12
    )


@pytest.mark.parametrize("num", [5, 20, 100])
def test_gaussian_is_scipys_reflect(num: int) -> None:
    values = np.random.default_rng(0).random(num)
    expected = ndimage.gaussian_filter1d(values, 4.0, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(gaussian_matrix(num, 4.0) @ values, expected, atol=1e-12)


def test_resize_to_the_same_size_is_the_same_map() -> None:
    anomaly_map = np.random.default_rng(0).random((9, 7), dtype=np.float32)
    assert resize_map(anomaly_map, 9, 7) is anomaly_map


def test_pixel_map_of_all_valid_is_the_plain_blur() -> None:
    patches = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    up, blur = bilinear_matrix(64, 8), gaussian_matrix(64, 4.0)
    expected = np.stack([blur @ (up @ p.numpy() @ up.T) @ blur.T for p in patches])
    np.testing.assert_allclose(
        pixel_map(patches, torch.ones(2, 1, 64, 64, dtype=torch.bool), 4.0), expected, atol=1e-5
    )


def test_what_is_not_valid_neither_scores_nor_spreads() -> None:
    patches = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    valid[..., 40:] = False
    first = pixel_map(patches, valid, 4.0)
    patches[..., 5:] = 1e6  # tokens from column 40 on
    second = pixel_map(patches, valid, 4.0)
    assert torch.equal(first, second)
    assert float(first[..., 40:].abs().max()) == 0


def test_constant_map_stays_constant_beside_what_is_not_valid() -> None:
    valid = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    valid[..., 24:, :] = False
    inside = pixel_map(torch.full((1, 8, 8), 3.0), valid, 4.0)[:, :24]
    torch.testing.assert_close(inside, torch.full((1, 24, 64), 3.0))
