"""Methods whose energy is a formula of the pixels, so that answers are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.protocols import Level
from fettle.refine.energy import Box, WindowEnergy
from fettle.refine.f2pad import GoodFacts, Refined, refine_f2pad
from fettle.refine.references import References
from fettle.refine.settings import F2PADConfig
from fettle.refine.solver import Problem

SIDE = 64
STRIDE = 4
SQUARE = (24, 24, 16)  # top, left, side
ROI = slice(16, 48)
FIRST, SECOND = (8, 8, 12), (44, 44, 8)
PLAIN = F2PADConfig(snap="off", time_cap_s=1000)
LEVELS = (Level("stride4", 1, 4), Level("stride8", 1, 8))


class GreyMethod:
    """z = RMS over channels of the cell's mean difference to 0.5, over 0.1; cells of 4 x 4 px."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.change = change  # (z, pictures) -> z
        self.levels = tuple(level.name for level in LEVELS)
        by_name = {level.name: level for level in LEVELS}
        self.backbone: Any = SimpleNamespace(spec=SimpleNamespace(level=by_name.get, side_step=32))
        self.calls = 0

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        self.calls += 1
        square = F.avg_pool2d(pictures - 0.5, STRIDE).square().mean(dim=1)
        z = torch.where(square > 0, square.clamp_min(1e-20).sqrt(), 0 * square) / 0.1
        return z if self.change is None else self.change(z, pictures)


class CroppingGreyMethod(GreyMethod):
    """One that may be asked for parts of frames."""

    def crop_energy(self, pictures: Tensor, valid: Tensor, origins: Sequence[tuple[int, int]]) -> Tensor:
        return self.patch_energy(pictures, valid)


def grey_with(*squares: tuple[int, int, int], side: int = SIDE, value: float = 0.9) -> Tensor:
    """(3, side, side) of 0.5 with brighter squares (top, left, side)."""
    picture = torch.full((3, side, side), 0.5)
    for top, left, length in squares:
        picture[:, top : top + length, left : left + length] = value
    return picture


def all_valid(pictures: Tensor) -> Tensor:
    return torch.ones(len(pictures), 1, *pictures.shape[-2:], dtype=torch.bool)


def grey_facts(side: int = SIDE, **changed: Any) -> GoodFacts:
    """Good pictures are plain grey, all of them."""
    references = References.from_views(
        torch.full((2, 3, side, side), 0.5), torch.ones(2, 1, side, side, dtype=torch.bool)
    )
    facts = GoodFacts(roi_high=1.5, peak=2.0, hold=0.5, noise_floor=0.2, references=references)
    return facts._replace(**changed)


def energy_of(method: GreyMethod, pictures: Tensor, kappa: float | None = 0.5) -> WindowEnergy:
    boxes = [Box(0, 0, *pictures.shape[-2:])] * len(pictures)
    grid = (pictures.shape[-2] // 4, pictures.shape[-1] // 4)
    frame = (pictures.shape[-2], pictures.shape[-1])
    return WindowEnergy.of(method, all_valid(pictures), boxes, frame, grid, cropped=False, rim=0, kappa=kappa)


def problem_of(
    *pictures: Tensor, method: GreyMethod | None = None, kappa: float | None = 0.5
) -> tuple[Problem, WindowEnergy]:
    """The known good surface is 0.5 everywhere."""
    batch = torch.stack(pictures)
    energy = energy_of(method or GreyMethod(), batch, kappa)
    roi = torch.zeros(len(batch), 1, SIDE, SIDE)
    roi[:, :, ROI, ROI] = 1
    difference = (batch - 0.5) * roi
    with torch.no_grad():
        filled = energy(batch - difference)
        return Problem(batch, roi, difference, energy(batch), filled, torch.zeros_like(filled)), energy


def refine(
    method: GreyMethod,
    *pictures: Tensor,
    facts: GoodFacts | None = None,
    base: Tensor | None = None,
    valid: Tensor | None = None,
    chosen: list[bool] | None = None,
    tiles_of: list[int] | None = None,
    config: F2PADConfig = PLAIN,
    **settings: object,
) -> list[Refined]:
    views = torch.stack(pictures)
    return refine_f2pad(
        method,
        views,
        all_valid(views) if valid is None else valid,
        base_of(*pictures) if base is None else base,
        facts or grey_facts(views.shape[-1]),
        F2PADConfig.model_validate({**config.model_dump(), **settings}),
        chosen=[True] * len(pictures) if chosen is None else chosen,
        pictures=tiles_of,
    )


def base_of(*pictures: Tensor) -> Tensor:
    """Something blurred that reaches above the peak."""
    grey = torch.stack(pictures).mean(dim=1, keepdim=True) - 0.5
    return F.avg_pool2d(grey, 9, stride=1, padding=4)[:, 0] * 10


def square_of(*squares: tuple[int, int, int], side: int = SIDE) -> Tensor:
    return grey_with(*squares, side=side)[0] > 0.6


def assert_base_stands(answer: Refined, base: Tensor) -> None:
    assert torch.equal(answer.anomaly_map, base)
    assert answer.soft is None and answer.speaks is None
    assert not answer.record.applied


def marked(*squares: tuple[int, int, int]) -> Tensor:
    picture = grey_with(*squares)
    picture[:, 0, 0] = 0.6
    return picture


def is_marked(pictures: Tensor) -> Tensor:
    return (pictures[:, 0, 0, 0] > 0.55)[:, None, None]
