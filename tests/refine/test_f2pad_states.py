"""Every state of a refinement, each brought about by an energy made for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fettle.refine import f2pad
from fettle.refine.solver import Solution, solve
from refine_toys import (
    FIRST,
    SECOND,
    SIDE,
    SQUARE,
    GreyMethod,
    assert_base_stands,
    base_of,
    grey_facts,
    grey_with,
    is_marked,
    marked,
    refine,
    square_of,
)


def test_no_energy_at_all_is_below_the_hinge() -> None:
    base = base_of(grey_with())
    (answer,) = refine(GreyMethod(), grey_with(), base=base)
    assert (answer.record.refined, answer.record.gate_reason) == ("gate", "energy_below_hinge")
    assert_base_stands(answer, base[0])


@pytest.mark.parametrize(("value", "high"), [(0.58, 0.5), (0.62, 1.5)])
def test_empty_roi(value: float, high: float) -> None:
    """Of z = 0.8 nothing exceeds 1; of z = 1.2 nothing reaches the bound of good pictures."""
    picture = grey_with(SQUARE, value=value)
    (answer,) = refine(GreyMethod(), picture, facts=grey_facts(roi_high=high))
    assert (answer.record.refined, answer.record.gate_reason) == ("empty_roi", None)
    assert_base_stands(answer, base_of(picture)[0])


def square_tokens() -> Tensor:
    tokens = torch.zeros(SIDE // 4, SIDE // 4)
    tokens[6:10, 6:10] = 1
    return tokens


GATES: dict[str, dict[str, Any]] = {
    "no_gradient": {"method": GreyMethod(lambda z, _: z.detach())},
    "flat_energy": {"facts": grey_facts(flat=True)},
    "roi_too_large": {"picture": grey_with((8, 8, 44))},
    # The energy stays whatever is put in.
    "fill_not_normal": {"method": GreyMethod(lambda z, _: 0 * z + 4 * square_tokens())},
    "insufficient": {"facts": grey_facts(noise_floor=5.0)},
}


@pytest.mark.parametrize("reason", GATES)
def test_gates(reason: str) -> None:
    asked = {"method": GreyMethod(), "picture": grey_with(SQUARE), "facts": grey_facts(), **GATES[reason]}
    (answer,) = refine(asked["method"], asked["picture"], facts=asked["facts"])
    assert (answer.record.refined, answer.record.gate_reason) == ("gate", reason)
    assert_base_stands(answer, base_of(asked["picture"])[0])


class TrainedGreyMethod(GreyMethod, nn.Module):
    """Its energy hangs on a trained number, and, as asked, on the picture or not."""

    def __init__(self, *, sees: bool) -> None:
        nn.Module.__init__(self)
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.asks: list[bool] = []
        GreyMethod.__init__(self, lambda z, _: self.factor * (z if sees else z.detach()))

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        self.asks.append(self.factor.requires_grad)
        return super().patch_energy(pictures, valid)


def test_a_trained_number_alone_makes_no_gradient() -> None:
    blind, seeing = TrainedGreyMethod(sees=False), TrainedGreyMethod(sees=True)
    (answer,) = refine(blind, grey_with(SQUARE))
    assert (answer.record.refined, answer.record.gate_reason) == ("gate", "no_gradient")
    (answer,) = refine(seeing, grey_with(SQUARE))
    assert answer.record.refined == "yes"
    for method in (blind, seeing):
        assert method.factor.requires_grad and method.asks and not any(method.asks)


def test_nan_comes_before_a_missing_gradient() -> None:
    (answer,) = refine(GreyMethod(lambda z, _: z.detach() * float("nan")), grey_with(SQUARE))
    assert (answer.record.refined, answer.record.gate_reason) == ("error", None)


def test_time_cap_of_zero_makes_no_iteration() -> None:
    picture = grey_with(SQUARE)
    (answer,) = refine(GreyMethod(), picture, time_cap_s=0)
    record = answer.record
    assert (record.refined, record.stop, record.iterations) == ("time_cap", "time_cap", 0)
    assert_base_stands(answer, base_of(picture)[0])


def test_a_tiny_time_cap_still_judges_the_best_iterate() -> None:
    (answer,) = refine(GreyMethod(), grey_with(SQUARE), time_cap_s=1e-9)
    record = answer.record
    assert (record.refined, record.stop, record.iterations) == ("time_cap", "time_cap", 1)
    assert record.applied and answer.soft is not None  # everything replaced is a candidate
    assert torch.equal(answer.soft > 0.5, square_of(SQUARE))
    (answer,) = refine(GreyMethod(), grey_with(SQUARE), time_cap_s=1e-9, facts=grey_facts(noise_floor=5.0))
    assert answer.record.refined == "time_cap"
    assert_base_stands(answer, base_of(grey_with(SQUARE))[0])


def test_tiles_of_a_picture_share_its_time_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its four tiles one has no region, and takes no share."""
    caps: list[float] = []

    def solved(problem: Any, energy: Any, config: Any, time_caps_s: list[float]) -> list[Solution]:
        caps.extend(time_caps_s)
        return solve(problem, energy, config)

    monkeypatch.setattr(f2pad, "solve", solved)
    pictures = [grey_with(SQUARE), grey_with(), grey_with(SQUARE), grey_with(SQUARE), grey_with(SQUARE)]
    answers = refine(GreyMethod(), *pictures, time_cap_s=1200, tiles_of=[7, 7, 7, 7, 8])
    assert [answer.record.refined for answer in answers] == ["yes", "gate", "yes", "yes", "yes"]
    assert sorted(caps) == [400, 400, 400, 1200]


def test_nan_energy_is_that_pictures_error() -> None:
    method = GreyMethod(lambda z, x: z.masked_fill(is_marked(x), float("nan")))
    pictures = [grey_with(SQUARE), marked(SQUARE), grey_with(SQUARE)]
    answers = refine(method, *pictures)
    assert [answer.record.refined for answer in answers] == ["yes", "error", "yes"]
    assert "NaN" in answers[1].record.error
    assert_base_stands(answers[1], base_of(*pictures)[1])


def test_energy_that_becomes_nan_on_the_way_is_an_error() -> None:
    """Fine as it came and as it is filled, NaN between."""

    def spoilt(z: Tensor, pictures: Tensor) -> Tensor:
        half = (pictures[:, :, 30, 30].mean(dim=1) - 0.7).abs() < 0.19
        return z.masked_fill(half[:, None, None], float("nan"))

    (answer,) = refine(GreyMethod(spoilt), grey_with(SQUARE), start="half")
    assert answer.record.refined == "error" and "NaN" in answer.record.error


def test_an_exception_is_that_pictures_error() -> None:
    def broken(z: Tensor, pictures: Tensor) -> Tensor:
        if bool(is_marked(pictures).any()):
            raise RuntimeError("no more memory\nand much more about it")
        return z

    answers = refine(GreyMethod(broken), grey_with(SQUARE), marked(SQUARE), grey_with((20, 20, 12)))
    assert [answer.record.refined for answer in answers] == ["yes", "error", "yes"]
    assert answers[1].record.error == "RuntimeError: no more memory."


def test_an_invisible_pattern_that_silences_the_method_is_adversarial() -> None:
    """The energy falls to nothing under a faint checkerboard, which a blur takes away."""
    picture = grey_with(SQUARE)
    board = torch.ones(SIDE, SIDE)
    board[::2, ::2], board[1::2, 1::2] = -1, -1
    roi = torch.zeros(SIDE, SIDE)
    roi[16:48, 16:48] = 1

    def fooled(z: Tensor, pictures: Tensor) -> Tensor:
        pattern = (board * roi * (pictures - picture)).flatten(1).sum(dim=1) / (3 * 256)
        return z * (1 - torch.tanh(50 * pattern.abs()))[:, None, None]

    pictures = [(picture + 0.001 * board * roi).clamp(0, 1)]  # |x| has no slope at 0
    (answer,) = refine(
        GreyMethod(fooled),
        *pictures,
        facts=grey_facts(noise_floor=0.02),
        form="free",
        start="zero",
        share="none",
        read_out="a",
        judge=False,
        iters=60,
    )
    record = answer.record
    assert record.energy_after is not None and record.energy_before is not None
    assert record.energy_after < 0.1 * record.energy_before
    assert record.refined == "adversarial", record
    assert [component.rho is not None and component.rho <= 0.6 for component in record.components] == [True]
    assert record.components[0].blur is not None and record.components[0].blur > 0.3
    assert_base_stands(answer, base_of(*pictures)[0])


def half_blind(z: Tensor, _: Tensor) -> Tensor:
    blind = torch.zeros(SIDE // 4, SIDE // 4, dtype=torch.bool)
    blind[11:13, 11:13] = True
    return torch.where(blind, 3 + 0 * z, z)


def test_one_region_accepted_one_not() -> None:
    picture = grey_with(FIRST, SECOND)
    base = base_of(picture)
    (answer,) = refine(GreyMethod(half_blind), picture)
    record = answer.record
    assert (record.refined, record.applied) == ("accepted_part", True)
    assert [component.accepted for component in record.components] == [True, False]
    assert record.components[1].rho == pytest.approx(1)
    assert answer.soft is not None and answer.speaks is not None
    assert torch.equal(answer.soft > 0.5, square_of(FIRST))
    assert torch.equal(answer.anomaly_map[32:, 32:], base[0].clamp_max(2.0)[32:, 32:])
    assert not answer.speaks[square_of(SECOND)].any()
    assert answer.speaks[:32].all()
    # The silent part is the region, 2 px wider than its patches, and 4 px around it (at a side of 64).
    silent = (~answer.speaks).nonzero()
    assert silent.amin(0).tolist() >= [34, 34] and int((~answer.speaks).sum()) < 30 * 30


def test_checks_can_be_left_out() -> None:
    (answer,) = refine(GreyMethod(half_blind), grey_with(FIRST, SECOND), acceptance=False)
    assert answer.record.refined == "yes"
    assert [component.rho for component in answer.record.components] == [None, None]
    assert answer.soft is not None and answer.speaks is not None and answer.speaks.all()
    assert torch.equal(answer.soft > 0.5, square_of(FIRST))  # the second explains nothing
