"""The whole refinement: its answer where it is known, every state, and what it must not change."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fettle.errors import ConfigError, UsageError
from fettle.protocols import Level
from fettle.refine import f2pad
from fettle.refine.energy import WindowEnergy
from fettle.refine.f2pad import Refined, refine_f2pad
from fettle.refine.record import RefineRecord
from fettle.refine.references import References
from fettle.refine.settings import F2PADConfig, Lengths, make_f2pad_config
from fettle.refine.solver import Problem, Solution
from refine_toys import (
    FIRST,
    PLAIN,
    SECOND,
    SIDE,
    SQUARE,
    CroppingGreyMethod,
    GreyMethod,
    all_valid,
    assert_base_stands,
    base_of,
    grey_facts,
    grey_with,
    is_marked,
    marked,
    refine,
    square_of,
)

# --- where the answer is known


def test_the_square_is_found_bit_for_bit() -> None:
    picture = grey_with(SQUARE)
    (answer,) = refine(GreyMethod(), picture)
    record = answer.record
    assert (record.refined, record.applied, record.gate_reason, record.error) == ("yes", True, None, "")
    assert answer.soft is not None and answer.speaks is not None
    assert torch.equal(answer.soft > 0.5, square_of(SQUARE))
    assert answer.speaks.all()
    assert record.energy_before == pytest.approx(56, rel=1e-5) and record.energy_fill == 0
    assert record.objective_before == 1 and record.objective_start == pytest.approx(0.6)
    assert record.objective_after is not None and record.objective_after < 0.6
    assert (record.fill, record.form, record.crop, record.mask) == ("exemplar", "mask", False, "solver")
    (component,) = record.components
    assert component.accepted and component.pixels == 256
    assert component.rho == 0 and component.blur is None  # a mixture of two pictures is not probed
    assert component.visibility == pytest.approx(0.4 * 3**0.5, rel=0.2)
    assert record.noise_floor == pytest.approx(0.2)


@pytest.mark.parametrize("judge", [True, False])
def test_the_plain_difference_stands_in_where_the_solver_finds_nothing(
    judge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective chooses between their masks; the checks then look at the chosen one's picture."""

    def in_vain(problem: Problem, energy: WindowEnergy, config: F2PADConfig, _: Any) -> list[Solution]:
        nothing = torch.zeros_like(problem.roi[0])
        return [Solution(nothing, 1.0, float(problem.before[0]), 0.6, config.iters, "max_iter")]

    monkeypatch.setattr(f2pad, "solve", in_vain)
    (answer,) = refine(GreyMethod(), grey_with(SQUARE), judge=judge)
    if not judge:
        assert (answer.record.refined, answer.record.gate_reason) == ("gate", "insufficient")
        return
    assert (answer.record.refined, answer.record.mask) == ("yes", "difference")
    assert answer.soft is not None and torch.equal(answer.soft > 0.5, square_of(SQUARE))


def test_energies_far_from_the_regions_count_only_where_asked() -> None:
    """Unlike surface below the hinge of a region, in the far corner, is no part of a picture's energy."""
    picture = grey_with(SQUARE)
    picture[:, 60:64, 0:4] = 0.58  # z of 0.8: above the hinge, below `roi_low`
    (near,), (everywhere,) = refine(GreyMethod(), picture), refine(GreyMethod(), picture, near=False)
    assert near.record.energy_before == pytest.approx(56, rel=1e-4)
    assert everywhere.record.energy_before is not None
    assert everywhere.record.energy_before > 56.1


def test_what_the_fill_leaves_counts_as_nothing_unless_told_otherwise() -> None:
    """Good surface lies 0.1 above the hinge everywhere."""
    method = GreyMethod(lambda z, pictures: z + 0.6)
    (default,), (zero,) = (refine(method, grey_with(SQUARE), floor=floor) for floor in ("fill", "zero"))
    assert default.record.energy_fill is not None and default.record.energy_fill > 0
    assert default.record.objective_start == pytest.approx(0.6)
    assert zero.record.energy_before is not None and zero.record.energy_fill is not None
    left = zero.record.energy_fill / zero.record.energy_before
    assert zero.record.objective_start == pytest.approx(0.6 + left, rel=1e-4)


def test_map_keeps_the_base_outside_and_adds_in_the_mask() -> None:
    picture = grey_with(SQUARE)
    base = base_of(picture)
    (answer,) = refine(GreyMethod(), picture)
    assert answer.soft is not None and base.max() > 2
    whole, mask = base[0].clamp_max(2.0), answer.soft > 0.5
    torch.testing.assert_close(answer.anomaly_map[mask], (whole + 2.0 * answer.soft)[mask])
    # In the peak's unit this is S of the specification, twice.
    share = 0.5 * (base[0] / 2.0).clamp_max(1) + 0.5 * answer.soft
    torch.testing.assert_close((answer.anomaly_map / (2 * 2.0))[mask], share[mask])
    held = ~mask & (answer.anomaly_map != whole)
    assert 0 < int(held.sum()) <= answer.record.roi_pixels - int(mask.sum())
    torch.testing.assert_close(answer.anomaly_map[held], torch.full_like(base[0], 0.5)[held])
    far = torch.ones_like(mask)
    far[8:56, 8:56] = False
    assert torch.equal(answer.anomaly_map[far], whole[far])


def test_a_verdict_of_ok_leaves_the_map_alone() -> None:
    method = GreyMethod()
    picture = grey_with(SQUARE)
    first, second = refine(method, picture, picture, chosen=[False, True])
    assert (first.record.refined, first.record.gate_reason) == ("gate", "verdict_ok")
    assert_base_stands(first, base_of(picture)[0])
    assert second.record.refined == "yes"
    method.calls = 0
    refine(method, picture, chosen=[False])
    assert method.calls == 0


@pytest.mark.parametrize(
    "settings", [{"iters": 0}, {"form": "free", "iters": 60, "kappa": 0.2}, {"share": "none"}]
)
def test_every_form_finds_the_square(settings: dict[str, object]) -> None:
    (answer,) = refine(GreyMethod(), grey_with(SQUARE), **settings)
    assert answer.record.refined == "yes", answer.record
    assert answer.soft is not None
    assert torch.equal(answer.soft > 0.5, square_of(SQUARE))


@pytest.mark.parametrize("fill", ["exemplar", "diffusion", "mean"])
def test_every_fill_restores_plain_grey(fill: str) -> None:
    (answer,) = refine(GreyMethod(), grey_with(SQUARE), fill=fill)
    assert answer.record.refined == "yes" and answer.record.fill == fill
    assert answer.record.energy_fill == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("settings", [{"refs": 0}, {}])
def test_without_references_the_fill_is_diffusion(settings: dict[str, object]) -> None:
    facts = grey_facts() if settings else grey_facts(references=None)
    (answer,) = refine(GreyMethod(), grey_with(SQUARE), facts=facts, **settings)
    assert answer.record.fill == "diffusion" and answer.record.refined == "yes"


def test_without_regions_everything_valid_is_one() -> None:
    (answer,) = refine(GreyMethod(), grey_with(SQUARE), roi=False)
    assert answer.record.roi_pixels == SIDE**2 and answer.record.fill == "exemplar"
    assert answer.soft is not None and torch.equal(answer.soft > 0.5, square_of(SQUARE))


def test_an_older_model_is_told_of_in_the_notes() -> None:
    (answer,) = refine(GreyMethod(), grey_with(SQUARE), facts=grey_facts(noise_floor=None))
    assert answer.record.refined == "yes"
    assert answer.record.noise_floor == pytest.approx(16 / 255)
    assert "default" in answer.record.notes[0]


def test_what_is_not_valid_is_never_refined() -> None:
    picture = grey_with(SQUARE)
    valid = all_valid(picture[None])
    valid[..., 36:] = False
    (answer,) = refine(GreyMethod(), picture, valid=valid)
    assert answer.soft is not None and answer.soft[~valid[0, 0]].abs().max() == 0
    assert torch.equal(answer.soft > 0.5, square_of(SQUARE) & valid[0, 0])


# --- batches, modes, records


def several() -> list[Tensor]:
    noise = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 0.04
    squares = [(SQUARE,), ((20, 28, 8),), (FIRST, SECOND), ()]
    return [(grey_with(*own) + noise[i]).clamp(0, 1) for i, own in enumerate(squares)]


def assert_same(one: Refined, other: Refined) -> None:
    drop = {"seconds": 0.0, "seconds_fill": 0.0}
    torch.testing.assert_close(one.anomaly_map, other.anomaly_map, atol=1e-4, rtol=0)
    first, second = (answer.record.model_copy(update=drop).model_dump() for answer in (one, other))
    assert (first["refined"], first["iterations"]) == (second["refined"], second["iterations"])
    assert (one.soft is None) == (other.soft is None)
    if one.soft is not None and other.soft is not None:
        assert torch.equal(one.soft > 0.5, other.soft > 0.5)


def test_answers_ignore_batch_mates_and_order() -> None:
    pictures = several()
    together = refine(GreyMethod(), *pictures)
    turned = refine(GreyMethod(), *pictures[::-1])[::-1]
    assert len({answer.record.iterations for answer in together}) > 1
    for i, picture in enumerate(pictures):
        (alone,) = refine(GreyMethod(), picture)
        assert_same(together[i], alone)
        assert_same(turned[i], alone)


def test_two_runs_are_bit_equal() -> None:
    for one, other in zip(refine(GreyMethod(), *several()), refine(GreyMethod(), *several()), strict=True):
        assert torch.equal(one.anomaly_map, other.anomaly_map)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_works_where_gradients_are_off(mode: Any) -> None:
    expected = refine(GreyMethod(), grey_with(SQUARE))[0].anomaly_map
    with mode():
        (answer,) = refine(GreyMethod(), grey_with(SQUARE))
        assert not torch.is_grad_enabled()
    assert answer.record.refined == "yes"
    assert torch.equal(answer.anomaly_map, expected)
    assert not answer.anomaly_map.requires_grad and not answer.anomaly_map.is_inference()


def test_inputs_stay_as_they_are() -> None:
    views = torch.stack([grey_with(SQUARE)])
    base = base_of(views[0])
    before = views.clone(), base.clone()
    refine_f2pad(GreyMethod(), views, all_valid(views), base, grey_facts(), PLAIN, chosen=[True])
    assert torch.equal(views, before[0]) and torch.equal(base, before[1])


def test_records_survive_json() -> None:
    method = GreyMethod(lambda z, x: z.masked_fill(is_marked(x), float("nan")))
    for answer in refine(method, grey_with(SQUARE), marked(SQUARE), grey_with(), grey_with(FIRST, SECOND)):
        record = answer.record
        text = json.dumps(record.to_json(), allow_nan=False)
        assert RefineRecord.model_validate_json(text) == record
        assert record.seconds > 0
        if record.objective_after is not None and record.objective_start is not None:
            assert record.objective_after <= min(1, record.objective_start)


def test_numbers_must_agree() -> None:
    views = torch.stack([grey_with(SQUARE)])
    with pytest.raises(UsageError, match="differ in number"):
        refine_f2pad(GreyMethod(), views, all_valid(views), views[0], grey_facts(), PLAIN, chosen=[True])


def test_snap_always_needs_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f2pad, "have_opencv", lambda: False)
    with pytest.raises(UsageError, match="OpenCV"):
        refine(GreyMethod(), grey_with(SQUARE), snap="always")


# --- crops

BIG = 256
SMALL_SQUARE = (120, 40, 16)


def test_a_crop_gives_the_answer_of_the_whole() -> None:
    picture = grey_with(SMALL_SQUARE, side=BIG)
    (whole,) = refine(GreyMethod(), picture)
    (crop,) = refine(CroppingGreyMethod(), picture)
    assert whole.record.crop is False
    assert crop.record.crop == (80, 0, 96)  # centred on (128, 48), in steps of 16
    assert crop.record.refined == whole.record.refined == "yes"
    assert crop.soft is not None and whole.soft is not None
    assert torch.equal(crop.soft > 0.5, square_of(SMALL_SQUARE, side=BIG))
    torch.testing.assert_close(crop.anomaly_map, whole.anomaly_map, atol=1e-4, rtol=0)
    assert crop.record.energy_before == pytest.approx(whole.record.energy_before)


def test_crop_energies_are_asked_for_at_their_own_places() -> None:
    asked: list[tuple[tuple[int, int], ...]] = []

    class Noting(CroppingGreyMethod):
        def crop_energy(self, pictures: Tensor, valid: Tensor, origins: Any) -> Tensor:
            asked.append(tuple(origins))
            assert pictures.shape[-2:] == (96, 96) and valid.shape[-2:] == (96, 96)
            return super().crop_energy(pictures, valid, origins)

    pictures = [grey_with((top, 120, 16), side=BIG) for top in (16, 200)]
    answers = refine(Noting(), *pictures)
    assert {origin for origins in asked for origin in origins} == {(0, 80), (160, 80)}
    assert [answer.record.refined for answer in answers] == ["yes", "yes"]


def test_a_crop_that_differs_from_the_whole_is_not_used() -> None:
    class Shifted(CroppingGreyMethod):
        def crop_energy(self, pictures: Tensor, valid: Tensor, origins: Any) -> Tensor:
            return self.patch_energy(pictures, valid) + 0.11

    (answer,) = refine(Shifted(), grey_with(SMALL_SQUARE, side=BIG))
    assert answer.record.crop is False and "0.11" in answer.record.notes[0]
    assert answer.record.refined == "yes"


def test_a_method_of_one_stride_is_not_cropped() -> None:
    method = CroppingGreyMethod()
    method.backbone.spec.level = lambda name: Level(name, 1, 4)
    (answer,) = refine(method, grey_with(SMALL_SQUARE, side=BIG))
    assert answer.record.crop is False and answer.record.refined == "yes"


# --- settings


def test_presets_hold_the_specifications_values() -> None:
    default, compact = make_f2pad_config("default", {}), make_f2pad_config("compact", {})
    assert (default.kappa, default.lambda1, default.lambda2, default.iters) == (0.5, 0.6, 0, 24)
    assert (default.eta, default.eta_free, default.momentum, default.scale_decay) == (0.3, 0.03, 0.7, 0.8)
    assert (default.share, default.share_window, default.share_contrast) == ("bilateral", 7, 0.08)
    assert (default.max_roi_share, default.refs, default.time_cap_s) == (0.35, 32, 10)
    changed = {name for name, value in compact if value != getattr(default, name)}
    assert changed == {"iters", "share_window", "max_roi_share", "refs", "time_cap_s"}


def test_wrong_settings_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'lambda"):
        make_f2pad_config("default", {"lambda": 1})
    with pytest.raises(ConfigError, match="form=free"):
        make_f2pad_config("default", {"sparsity": "l1"})
    with pytest.raises(ConfigError, match="iters"):
        make_f2pad_config("default", {"iters": 501})
    with pytest.raises(UsageError, match="no preset"):
        make_f2pad_config("papre", {})


def test_lengths_follow_the_smaller_side() -> None:
    half = Lengths(F2PADConfig(), 128, 512)
    assert (half.dilate, half.ring, half.margin, half.crop_side, half.rim) == (4, 6, 12, 48, 8)
    assert (half.guide_radius, half.around, half.hole_area, half.speck_area) == (2, 8, 4, 2.25)


def test_only_the_references_asked_for_are_used() -> None:
    """The first good picture is spotted where the defect is, the second is plain."""
    pixels = torch.full((2, 3, SIDE, SIDE), 0.5)
    pixels[0, :, 28:36, 28:36] = 0.8
    references = References.from_views(pixels, torch.ones(2, 1, SIDE, SIDE, dtype=torch.bool))
    left = {}
    for count in (1, 2):
        facts = grey_facts(references=references)
        (answer,) = refine(GreyMethod(), grey_with(SQUARE), facts=facts, refs=count, fill="mean")
        left[count] = answer.record.energy_fill
    assert left[1] == pytest.approx(4 * 2.5, rel=0.02)  # 4 cells of z = 3
    assert left[2] == pytest.approx(4 * 1.0, rel=0.02)  # the mean of both: z = 1.5
