"""What a mask explains of a part's energy, and each of the checks that a mask must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fettle.datasets.parts.render import render
from fettle.detector import Detector
from fettle.refine.acceptance import MAX_BLUR, MAX_NOISE, Checked, check_components
from fettle.refine.energy import Box, WindowEnergy
from fettle.refine.roi import of_mask, widened
from refine_toys import SIDE, SQUARE, GreyMethod, grey_with, square_of

PART = "woven_fabric"
PART_SIDE = 128


def energy_of(method: Any, near: Tensor, cells: int) -> WindowEnergy:
    """Of a whole picture, patches near the regions."""
    side = near.shape[-1]
    return WindowEnergy.of(
        method,
        torch.ones(1, 1, side, side, dtype=torch.bool),
        [Box(0, 0, side, side)],
        (side, side),
        (cells, cells),
        cropped=False,
        rim=0,
        kappa=0.5,
        near=near[None, None],
    )


@pytest.fixture(scope="module")
def good_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for index in range(24):
        rendered = render(PART, seed=0, index=index, size=PART_SIDE, stream="train/good")
        Image.fromarray(rendered.pixels).save(folder / f"{index:02}.png")
    return folder


@pytest.mark.parametrize("method", ["patchcore", "padim"])
def test_the_true_mask_explains_a_part_and_its_surroundings_do_not(method: str, good_parts: Path) -> None:
    """A part is rendered with its defect and without: what it should look like is known."""
    detector = Detector.fit(good_parts, method=method, frame="square", size=PART_SIDE, refine_refs=0)
    generator = torch.Generator().manual_seed(0)
    for defect in ("missing", "misweave", "fibre"):
        faulty = render(PART, seed=0, index=100, defect=defect, size=PART_SIDE)
        sound = render(PART, seed=0, index=100, size=PART_SIDE)
        picture, clean = (torch.from_numpy(one.pixels).permute(2, 0, 1) / 255 for one in (faulty, sound))
        mask = torch.from_numpy(faulty.mask > 0)
        near = torch.from_numpy(widened(mask.numpy(), 8))
        filled = clean + 0.02 * torch.randn(clean.shape, generator=generator) * near
        difference = (picture - filled) * near
        versions = torch.stack([picture, picture - mask * difference, picture - (near & ~mask) * difference])
        with torch.no_grad():
            valid = torch.ones(1, 1, PART_SIDE, PART_SIDE, dtype=torch.bool)
            cells = detector.method.patch_energy(picture[None], valid).shape[-1]
            energy = energy_of(detector.method, near, cells)
            before, exact, rest = (float(energy(version[None])) for version in versions)
        assert exact <= 0.3 * before
        assert rest >= 0.7 * before


def check(
    method: GreyMethod, picture: Tensor, restored: Tensor | None = None, *, noise_floor: float = 0.0
) -> Checked:
    """The true mask of a square on grey, which is filled with grey."""
    square = square_of(SQUARE)
    roi = of_mask(widened(square.numpy(), 4))
    (found,) = check_components(
        picture,
        restored,
        square,
        picture - 0.5,
        roi,
        energy_of(method, torch.ones(SIDE, SIDE, dtype=torch.bool), SIDE // 4),
        noise_floor=noise_floor,
        above_fill=False,
        around=8,
        batch=8,
    )
    return found


@pytest.mark.parametrize(("noise_floor", "accepted"), [(2.7, True), (2.9, False)])
def test_a_change_must_exceed_a_quarter_of_the_noise_floor(noise_floor: float, accepted: bool) -> None:
    found = check(GreyMethod(), grey_with(SQUARE, value=0.9), noise_floor=noise_floor)
    assert found.sufficient and found.record.accepted is accepted
    assert found.record.visibility == pytest.approx(0.4 * 3**0.5, rel=1e-4)


@pytest.mark.parametrize(("levels", "accepted"), [(3.5, False), (4.5, True)])
def test_a_change_below_four_grey_levels_is_never_seen(levels: float, accepted: bool) -> None:
    """However sensitive the method is."""
    faint = grey_with(SQUARE, value=0.5 + levels / 255 / 3**0.5)
    found = check(GreyMethod(lambda z, _: 100 * z), faint)
    assert found.sufficient and found.record.accepted is accepted


def under_noise(z: Tensor, pictures: Tensor) -> Tensor:
    """Sees faint offsets only in pictures with noise."""
    detail = (pictures - F.avg_pool2d(pictures, 3, 1, 1)).abs()[..., 1:-1, 1:-1]
    noisy = detail.flatten(1).median(dim=1).values > 0.004
    return torch.where(noisy[:, None, None] & (z > 0.12), 4.0, z)


def test_what_noise_brings_back_was_not_removed() -> None:
    picture, faint = grey_with(SQUARE, value=0.9), grey_with(SQUARE, value=0.52)
    sound = check(GreyMethod(), picture, faint)
    assert sound.record.accepted
    fragile = check(GreyMethod(under_noise), picture, faint)
    assert fragile.sufficient and not fragile.record.accepted
    assert fragile.record.blur is not None and fragile.record.blur <= MAX_BLUR
    assert fragile.record.noise is not None and fragile.record.noise > MAX_NOISE
