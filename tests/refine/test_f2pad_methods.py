"""The refinement of a real method on a small random backbone, whose receptive field is bounded."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conftest import TINY_LEVELS, textured
from fettle.backbones import load_backbone
from fettle.methods.patchcore import PatchCore, PatchCoreConfig
from fettle.protocols import Crops
from fettle.refine import f2pad
from fettle.refine.energy import Box, WindowEnergy
from fettle.refine.f2pad import GoodFacts, refine_f2pad
from fettle.refine.references import References
from fettle.refine.settings import F2PADConfig

SIDE = 128
DEFECT = (slice(56, 72), slice(40, 80))


class Fitted(NamedTuple):
    method: PatchCore
    facts: GoodFacts
    picture: Tensor  # (3, H, W), with the defect


def views(*seeds: int) -> Tensor:
    pictures = [torch.from_numpy(textured(seed, SIDE, SIDE)) for seed in seeds]
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def all_valid(pictures: Tensor) -> Tensor:
    return torch.ones(len(pictures), 1, *pictures.shape[-2:], dtype=torch.bool)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    levels = tuple(level.name for level in TINY_LEVELS[1:])
    method: Any = PatchCore(load_backbone("tiny", levels, weights="random"), PatchCoreConfig(), levels)
    method.eval()
    good, held_out = views(*range(12)), views(*range(20, 26))
    with torch.no_grad():
        patches = method.features(good, all_valid(good))["patches"]
        method.bank = patches.permute(0, 2, 3, 1).flatten(0, 2)[::2].contiguous()
        method.settle(method.patch_energy(held_out, all_valid(held_out)).flatten())
        energies = method.patch_energy(held_out, all_valid(held_out))
        maps = method(held_out, all_valid(held_out)).anomaly_map
    facts = GoodFacts(
        roi_high=float(energies.flatten(1).amax(dim=1).quantile(0.9)),
        peak=4 * float(maps.flatten().quantile(0.999)),
        hold=float(maps.flatten().quantile(0.999)),
        noise_floor=0.1,
        references=References.from_views(good, all_valid(good)),
    )
    picture = views(30)[0]
    picture[:, *DEFECT] = 1 - picture[:, *DEFECT] * 0.5
    return Fitted(method, facts, picture)


def mask() -> Tensor:
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[DEFECT] = True
    return inside


def test_energy_of_a_crop_does_not_depend_on_its_place(fitted: Fitted) -> None:
    """16 px further, and beyond the receptive field of the sides, the same patches have the same energy."""
    assert isinstance(fitted.method, Crops)
    valid = torch.ones(1, 1, 96, 96, dtype=torch.bool)

    def crop(start: int) -> Tensor:
        window = fitted.picture[None, :, start : start + 96, start : start + 96]
        with torch.no_grad():
            return fitted.method.crop_energy(window, valid, [(start, start)])[0]

    one, other = crop(0), crop(16)
    assert (one - other).abs().max() > 0.1
    torch.testing.assert_close(one[7:-5, 7:-5], other[5:-7, 5:-7], atol=1e-4, rtol=0)


def test_the_true_mask_explains_the_energy_and_the_rest_does_not(fitted: Fitted) -> None:
    """rho of the exact mask, and of its complement within 8 px around."""
    clean, near = views(30)[0], torch.zeros(SIDE, SIDE, dtype=torch.bool)
    near[48:80, 32:88] = True
    generator = torch.Generator().manual_seed(0)
    filled = clean + 0.02 * torch.randn(clean.shape, generator=generator) * near
    difference = (fitted.picture - filled) * near
    energy = WindowEnergy.of(
        fitted.method,
        all_valid(fitted.picture[None]),
        [Box(0, 0, SIDE, SIDE)],
        (SIDE, SIDE),
        (SIDE // 8, SIDE // 8),
        cropped=False,
        rim=0,
        kappa=0.5,
    )
    with torch.no_grad():
        before = energy(fitted.picture[None])
        exact = energy((fitted.picture - mask() * difference)[None]) / before
        rest = energy((fitted.picture - (near & ~mask()) * difference)[None]) / before
    assert float(exact) <= 0.3
    assert float(rest) >= 0.7


def test_a_defect_on_texture_is_outlined(fitted: Fitted) -> None:
    pictures = fitted.picture[None]
    valid = all_valid(pictures)
    with torch.inference_mode():
        base = fitted.method(pictures, valid).anomaly_map
        (answer,) = refine_f2pad(
            fitted.method,
            pictures,
            valid,
            base,
            fitted.facts,
            F2PADConfig(snap="off", time_cap_s=1000),
            chosen=[True],
        )
    assert answer.record.applied and answer.record.components[0].accepted
    assert answer.soft is not None
    found, true = answer.soft > 0.5, mask()
    assert float((found & true).sum() / (found | true).sum()) > 0.9


@pytest.mark.parametrize("turn", [True, False])
def test_exemplars_turn_unless_told_otherwise(
    fitted: Fitted, turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    whole = f2pad.fill_window

    def spy(*parts: Any, **named: Any) -> Any:
        told.append(named["turn"])
        return whole(*parts, **named)

    monkeypatch.setattr(f2pad, "fill_window", spy)
    pictures = fitted.picture[None]
    with torch.no_grad():
        base = fitted.method(pictures, all_valid(pictures)).anomaly_map
    config = F2PADConfig(snap="off", iters=0, turn=turn, time_cap_s=1000)
    refine_f2pad(fitted.method, pictures, all_valid(pictures), base, fitted.facts, config, chosen=[True])
    assert told == [turn]
