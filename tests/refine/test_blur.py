"""The light blur of a raw map."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from fettle.refine.blur import light_blur
from fettle.sampling import resize_map


def test_it_is_the_resized_map_under_a_gaussian_of_one_pixel() -> None:
    z = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0))
    found = light_blur(z, torch.ones(2, 1, 48, 40, dtype=torch.bool))
    for own, blurred in zip(z.numpy(), found.numpy(), strict=True):
        expected = gaussian_filter(resize_map(own, 48, 40), 1.0, mode="reflect", truncate=4.0)
        np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_padding_is_nought_and_does_not_spread() -> None:
    valid = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    valid[..., 16:] = False
    z = torch.ones(1, 4, 4)
    z[..., 2:] = 100
    found = light_blur(z, valid, sigma=2.0)
    torch.testing.assert_close(found, valid[:, 0].float())
