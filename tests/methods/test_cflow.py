"""CFLOW-AD: steps of its training, scales of its levels, maps that no batch mate changes, and crops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from conftest import textured, write_good
from fettle.backbones.registry import find_entry
from fettle.detector import Detector
from fettle.errors import ConfigError, DataError, UsageError
from fettle.methods.cflow import Cflow, CflowConfig, LevelDensity, slowed, tempered
from fettle.methods.registry import make_config
from fettle.protocols import BackboneSpec, Batch, FeatureBatch, Finishes, Level, Run, Step, Trained, Unbounded
from fettle.refine.settings import F2PADConfig
from fettle.refine.solver import solve
from fettle.training import learning_rate, planned_steps
from refine_toys import SQUARE, GreyMethod, grey_with, problem_of, square_of

PAPER = cast(CflowConfig, Cflow.presets["paper"].config)
SMALL: dict[str, object] = {"code": 8, "blocks": 2, "fibres": 64}
POOLED = (Level("stride8", 3, 8), Level("stride16", 3, 16), Level("stride32", 3, 32))


def spec_of(levels: Sequence[Level]) -> BackboneSpec:
    return BackboneSpec("pooled", "0" * 64, "none", "none", tuple(levels), 32, (0, 0, 0), (1, 1, 1))


class PooledBackbone(nn.Module):
    """Means of cells: a place's features depend on its own pixels alone."""

    cues = ()

    def __init__(self, levels: Sequence[Level] = POOLED) -> None:
        super().__init__()
        self.spec = spec_of(levels)

    def forward(self, pictures: Tensor, levels: Sequence[str]) -> dict[str, Tensor]:
        return {level.name: F.avg_pool2d(pictures, level.stride) for level in self.spec.levels}


def method_on(levels: Sequence[Level] = POOLED, **settings: object) -> Cflow:
    config = CflowConfig.model_validate({**SMALL, **settings})
    return Cflow(PooledBackbone(levels), config, [level.name for level in levels])  # type: ignore[arg-type]


def pictures(number: int = 4, size: int = 64, first: int = 0) -> Tensor:
    views = [torch.from_numpy(textured(first + i, size, size)) for i in range(number)]
    return (torch.stack(views).permute(0, 3, 1, 2).float() / 255).contiguous()


def all_valid(views: Tensor) -> Tensor:
    return torch.ones(len(views), 1, *views.shape[-2:], dtype=torch.bool)


class Stream:
    """Features of some pictures in one batch."""

    def __init__(self, method: Cflow, views: Tensor, valid: Tensor | None = None) -> None:
        self.method, self.views = method, views
        self.valid = all_valid(views) if valid is None else valid
        self.num_pictures = len(views)

    def __iter__(self) -> Iterator[FeatureBatch]:
        keys = tuple(str(i) for i in range(len(self.views)))
        yield FeatureBatch(self.method.features(self.views, self.valid), self.valid, keys, keys)


def prepared(
    views: Tensor | None = None, levels: Sequence[Level] = POOLED, steps: int = 0, **settings: object
) -> Cflow:
    """A method that has walked some pictures, learnt for some steps, and measured its scales."""
    method = method_on(levels, **settings)
    stream = Stream(method, pictures() if views is None else views)
    method.prepare(stream, Run())  # type: ignore[arg-type]  # a stream without `framed`
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for number in range(steps):
        for loss in method.losses(
            Batch(method.features(stream.views, stream.valid), stream.valid), Step(number, steps)
        ):
            optimizer.zero_grad(set_to_none=True)
            loss.value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
    method.finish(stream)  # type: ignore[arg-type]
    return method.eval()


def batch_of(method: Cflow, views: Tensor, valid: Tensor | None = None) -> Batch:
    valid = all_valid(views) if valid is None else valid
    return Batch(method.features(views, valid), valid, views)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- sizes and presets


@pytest.mark.parametrize(
    ("backbone", "config", "number"),
    [
        ("resnet18", PAPER, 8_620_032),
        ("wide_resnet50_2", PAPER, 81_647_616),
        ("resnet18", CflowConfig(taps=("stride8", "stride16")), 776_448),
        ("tf_efficientnet_lite2", CflowConfig(), 1_159_728),
    ],
)
def test_trained_numbers(backbone: str, config: CflowConfig, number: int) -> None:
    entry = find_entry(backbone)
    names = Cflow.choose_levels(entry.levels, config)
    with torch.device("meta"):
        method = Cflow(PooledBackbone(entry.levels), config, names)  # type: ignore[arg-type]
        assert count(method) == number
    assert names == (config.taps or ("stride8", "stride16", "stride32"))


def test_paper_preset_passes_200_times_and_blurs_nothing() -> None:
    assert planned_steps(PAPER, 320) == 200 * 320 // 32
    assert (PAPER.sigma, PAPER.score_form, PAPER.feature_norm, PAPER.weight_decay) == (0, "prob", "none", 0)
    assert (PAPER.mixing, PAPER.rotate, PAPER.fibres, PAPER.clip) == ("rotation", 5, 256, 0)
    rates = [learning_rate(PAPER, Step(number, 2000)) for number in range(2000)]
    assert max(rates) == pytest.approx(1.968615e-4, rel=1e-6)
    assert rates.index(max(rates)) == 160  # after 16 of 200 passes
    assert rates[-1] == pytest.approx(9.877e-7, rel=1e-3)


def test_taps_are_taken_fine_to_coarse_however_they_are_named() -> None:
    offered = find_entry("resnet18").levels
    config = CflowConfig(taps=("stride16", "stride8"))
    assert Cflow.choose_levels(offered, config) == ("stride8", "stride16")


def test_vit_is_tapped_in_its_later_half() -> None:
    offered = [Level(f"block{i}", 384, 14) for i in range(12)]
    assert Cflow.choose_levels(offered, CflowConfig()) == ("block5", "block8", "block11")


@pytest.mark.parametrize("wrong", [{"code": 6}, {"fibres": 0}, {"mixing": "none"}, {"taps": ()}])
def test_wrong_fields_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CflowConfig.model_validate(wrong)


def test_it_is_trained_finishes_and_takes_crops() -> None:
    method = method_on()
    assert isinstance(method, Trained) and isinstance(method, Finishes) and isinstance(method, Unbounded)


# --- the training


def test_published_number_of_steps_a_batch() -> None:
    """32 pictures of 256 px, 256 features a step: 128 + 32 + 8."""
    method = prepared(torch.rand(1, 3, 256, 256), fibres=256)
    batch = batch_of(method, torch.rand(32, 3, 256, 256))
    with torch.no_grad():
        assert sum(1 for _ in method.losses(batch, Step(0, 1))) == 168


@pytest.mark.parametrize(("fibres", "steps"), [(1000, 1), (64, 1), (60, 1), (32, 2), (20, 3)])
def test_what_is_left_over_is_dropped_but_a_small_level_is_taken_whole(fibres: int, steps: int) -> None:
    method = prepared(levels=POOLED[:1], fibres=fibres)
    batch = batch_of(method, pictures(1))  # 64 places
    assert len(list(method.losses(batch, Step(0, 1)))) == steps


def test_each_loss_moves_its_own_level_alone() -> None:
    method = prepared()
    moved = []
    for loss in method.losses(batch_of(method, pictures(1)), Step(0, 1)):
        method.zero_grad(set_to_none=True)
        loss.value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        names = {name.split(".")[1] for name, p in method.named_parameters() if p.grad is not None}
        assert len(names) == 1
        assert all(p.grad is not None for p in method.densities[int(*names)].parameters())
        moved += names
    assert moved == ["0", "1", "2"]


def test_loss_is_the_bounded_likelihood_of_all_places() -> None:
    """With as many features a step as a level has, the loss is the mean over all of them."""
    method = prepared(fibres=64, mixing="rotation")
    views = pictures(1, first=7)
    energies = method._energies(views, all_valid(views))
    losses = [loss.value for loss in method.losses(batch_of(method, views), Step(3, 10))]
    for loss, energy in zip(losses, energies, strict=True):
        torch.testing.assert_close(loss, torch.log1p(energy.exp()).mean())  # -logsigmoid(-e)
    together = torch.cat([energy.flatten() for energy in energies])
    held_out = method.held_out_loss(batch_of(method, views)).value
    torch.testing.assert_close(held_out, torch.log1p(together.exp()).mean())


def test_order_follows_seed_and_step() -> None:
    method = prepared(levels=POOLED[:1], fibres=32)
    batch = batch_of(method, pictures(1))

    def losses(seed: int, number: int) -> list[float]:
        return [float(loss.value.detach()) for loss in method.losses(batch, Step(number, 9, seed))]

    assert losses(0, 1) == losses(0, 1)
    assert losses(0, 1) != losses(0, 2) and losses(0, 1) != losses(5, 1)


def test_what_is_not_valid_is_never_learnt_from() -> None:
    views = pictures()
    valid = all_valid(views)
    valid[..., 32:] = False
    ruined = views.clone()
    ruined[..., 32:] = 50.0
    learnt = []
    for own in (views, ruined):
        method = method_on()
        stream = Stream(method, own, valid)
        method.prepare(stream, Run())  # type: ignore[arg-type]
        method.finish(stream)  # type: ignore[arg-type]
        learnt.append(method.state_dict())
        losses = [loss.value.detach() for loss in method.losses(batch_of(method, own, valid), Step(0, 1))]
        learnt[-1]["losses"] = torch.stack(losses)
    for name, tensor in learnt[0].items():
        torch.testing.assert_close(learnt[1][name], tensor, msg=name)


def test_a_batch_without_a_valid_place_gives_no_loss() -> None:
    method = prepared()
    views = pictures(1)
    assert list(method.losses(batch_of(method, views, ~all_valid(views)), Step(0, 1))) == []


@torch.no_grad()
def test_baseline_is_the_cost_of_independent_normal_channels() -> None:
    """Whatever the norm: the same density, but for the deviations that normalising takes out."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(50, 3, 64, 64, generator=generator) * torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    for norm, scale in (("standard", 1.0), ("none", 36 ** (1 / 3) / 8)):  # means of 64 pixels
        method = prepared(views, POOLED[:1], feature_norm=norm)
        density = cast(LevelDensity, method.densities[0])
        likelihood = -1.4189385 - torch.log(torch.tensor(scale))
        assert density.baseline == pytest.approx(float(-F.logsigmoid(likelihood)), rel=1e-2)


def test_standard_features_have_no_mean_and_unit_deviation() -> None:
    method = prepared()
    features = method.features(pictures(), all_valid(pictures()))
    for name, density in zip(method.levels, method.densities, strict=True):
        assert isinstance(density, LevelDensity)
        rows = (features[name].permute(0, 2, 3, 1).flatten(0, 2) - density.mean) / density.deviation
        torch.testing.assert_close(rows.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-4)
        torch.testing.assert_close(rows.std(dim=0, correction=0), torch.ones(3), rtol=1e-3, atol=0)


def test_a_channel_that_never_changes_is_not_blown_up() -> None:
    views = pictures()
    views[:, 2] = 0.25
    density = cast(LevelDensity, prepared(views).densities[0])
    assert float(density.deviation[2]) == pytest.approx(1e-3 * float(density.deviation.max()))


def test_features_that_are_nan_are_refused() -> None:
    views = pictures()
    views[1, 0, 3, 3] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        prepared(views)


def test_density_is_of_the_place() -> None:
    """Bright left of dark is good; dark left of bright has the same features at other places."""
    generator = torch.Generator().manual_seed(0)
    good = torch.full((8, 3, 64, 64), 0.2)
    good[..., :32] = 0.8
    good += 0.05 * torch.randn(8, 3, 8, 8, generator=generator).repeat_interleave(8, 2).repeat_interleave(
        8, 3
    )
    method = prepared(good, POOLED[:1], steps=50, code=16, blocks=4)
    with torch.no_grad():
        as_learnt = method.patch_energy(good, all_valid(good))
        mirrored = method.patch_energy(good.flip(-1), all_valid(good))
    assert float(mirrored.median()) > float(as_learnt.quantile(0.99))


# --- scales and maps


def test_each_level_is_scaled_by_the_pictures_learnt_from() -> None:
    method = prepared(steps=3)
    views = pictures()
    with torch.no_grad():
        for density, energy in zip(method.densities, method._energies(views, all_valid(views)), strict=True):
            assert isinstance(density, LevelDensity)
            z = density.scale(energy).flatten()
            assert float(z.median()) == pytest.approx(0, abs=1e-4)
            ordered = z.sort().values
            assert float(ordered[int(0.99 * len(ordered))]) == pytest.approx(1, abs=0.1)
            assert float(density.least) == float(energy.min())


@torch.no_grad()
def test_levels_are_joined_by_their_mean_on_the_finest_grid() -> None:
    method = prepared()
    views = pictures(2, first=9)
    energies = method._energies(views, all_valid(views))
    expected = torch.zeros(2, 8, 8)
    for density, energy in zip(method.densities, energies, strict=True):
        z = tempered(cast(LevelDensity, density).scale(energy))
        expected += F.interpolate(z[:, None], size=(8, 8), mode="bilinear", align_corners=False)[:, 0] / 3
    torch.testing.assert_close(method.patch_energy(views, all_valid(views)), expected)
    method.settle(torch.linspace(1, 3, 101))  # median 2, rare 2.98
    settled = method.patch_energy(views, all_valid(views))
    torch.testing.assert_close(settled, (expected - 2) / 0.98, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_settling_the_patch_energy_moves_no_map() -> None:
    """Thresholds are set before it."""
    method = prepared()
    before = method(pictures(2), all_valid(pictures(2)))
    method.settle(torch.linspace(1, 3, 101))
    assert torch.equal(method(pictures(2), all_valid(pictures(2))).anomaly_map, before.anomaly_map)


@torch.no_grad()
def test_probability_map_is_the_published_one_with_a_fixed_reference() -> None:
    method = prepared(score_form="prob", sigma=0)
    views = pictures(2, first=9)
    energies = method._energies(views, all_valid(views))
    expected = torch.full((2, 64, 64), 3.0)
    for density, energy in zip(method.densities, energies, strict=True):
        p = (-energy + cast(LevelDensity, density).least).exp().clamp_max(1)
        expected -= F.interpolate(p[:, None], size=(64, 64), mode="bilinear", align_corners=True)[:, 0]
    maps = method(views, all_valid(views))
    torch.testing.assert_close(maps.anomaly_map, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(maps.score, maps.anomaly_map.flatten(1).amax(dim=1))


def test_tempered_energies_are_bounded_and_keep_their_order() -> None:
    z = torch.tensor([-1.5, 0.0, 1.0, 2.0, 1e9])
    expected = torch.tensor([-1.5, 0.0, 2 * (1 - math.exp(-0.5)), 2 * (1 - math.exp(-1)), 2.0])
    torch.testing.assert_close(tempered(z), expected)
    near = torch.tensor([-1e-3, 1e-3])
    torch.testing.assert_close(tempered(near), near, rtol=1e-3, atol=0)  # it joins on with slope 1


def test_slowed_energies_join_on_grow_and_have_a_slope_everywhere() -> None:
    z = torch.tensor([-3.0, 0.0, 1.0, 100.0, 1e7, 1e38], requires_grad=True)
    found = slowed(z)
    expected = torch.tensor([-3.0, 0.0, math.log(2), math.log(101), math.log(1e7), math.log(1e30)])
    torch.testing.assert_close(found, expected)
    found[:-1].sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad[:-1], torch.tensor([1.0, 1.0, 0.5, 1 / 101, 1e-7]))
    assert bool(slowed(torch.tensor(torch.inf)).isfinite())


def test_energies_without_a_bound_are_those_of_the_map_where_nothing_is_loud() -> None:
    method = prepared()
    views = pictures(3)
    for density in method.densities:
        scale = cast(LevelDensity, density).scale
        scale.rare = scale.median + 1e4
    quiet = method.patch_energy(views, all_valid(views))
    torch.testing.assert_close(method.unbounded_energy(views, all_valid(views)), quiet, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loud", [2, 10, 50])
def test_a_mask_comes_back_from_nothing_where_energies_are_loud(loud: float) -> None:
    """From the full replacement the first step takes all of the mask away, and the slope at a bound is next
    to nothing there."""
    method = GreyMethod(lambda z, _: slowed(loud * z))
    problem, energy = problem_of(grey_with(SQUARE), method=method)
    (solution,) = solve(problem, energy, F2PADConfig(time_cap_s=1000))
    assert solution.objective < 0.3 * solution.objective_start
    assert torch.equal(solution.unknown[0] > 0.5, square_of(SQUARE))


@torch.no_grad()
def test_no_level_drowns_the_others() -> None:
    """The wildest picture scores at most what every level's bound gives."""
    method = prepared(sigma=0)
    wild = 40 * torch.rand(1, 3, 64, 64)
    maps = method(wild, all_valid(wild))
    assert 1.9 < float(maps.score) <= 2 + 1e-6


@pytest.mark.parametrize("score_form", ["nll", "prob"])
@torch.no_grad()
def test_no_batch_mate_changes_an_answer(score_form: str) -> None:
    method = prepared(score_form=score_form)
    own, plain, wild = pictures(1, first=5), pictures(1, first=6), 40 * torch.rand(1, 3, 64, 64)
    answers = []
    for mate in (plain, wild, own):
        together = torch.cat([own, mate])
        maps = method(together, all_valid(together))
        answers.append(
            (maps.anomaly_map[0], maps.score[0], method.patch_energy(together, all_valid(together))[0])
        )
    for answer in answers[1:]:
        assert all(torch.equal(one, other) for one, other in zip(answer, answers[0], strict=True))


@torch.no_grad()
def test_what_is_not_valid_neither_scores_nor_spreads() -> None:
    """Also into the fine cells beside it, which a coarse cell outside would reach."""
    method = prepared(sigma=0)
    views = pictures(1, first=9)
    valid = all_valid(views)
    valid[..., 32:] = False
    ruined = views.clone()
    ruined[..., 32:] += 5
    one, other = (method(own, valid) for own in (views, ruined))
    assert torch.equal(one.anomaly_map, other.anomaly_map) and not one.anomaly_map[..., 32:].any()
    energies = [method.patch_energy(own, valid)[..., :4] for own in (views, ruined)]
    assert torch.equal(*energies)


@torch.no_grad()
def test_a_score_below_zero_is_not_replaced_by_what_lies_outside() -> None:
    method = prepared(sigma=0)
    for density in method.densities:
        cast(LevelDensity, density).scale.median.fill_(1e3)
        cast(LevelDensity, density).scale.rare.fill_(2e3)
    valid = all_valid(pictures(1))
    valid[..., 32:] = False
    maps = method(pictures(1), valid)
    assert maps.score[0] == maps.anomaly_map[valid[:, 0]].max() < 0


# --- parts of frames


def test_a_part_has_the_codes_of_its_place() -> None:
    method = prepared(pictures(2, 128), steps=2).requires_grad_(False)
    whole = pictures(1, 128, first=3)
    expected = method.unbounded_energy(whole, all_valid(whole))
    torch.testing.assert_close(method.unbounded_energy(whole, all_valid(whole), [(0, 0)]), expected)
    parts = torch.cat([whole[..., 32:96, 64:128], whole[..., 0:64, 32:96]])
    found = method.unbounded_energy(parts, all_valid(parts), [(32, 64), (0, 32)])
    assert found.shape == (2, 8, 8)
    inner = slice(2, 6)  # a coarse cell's half is 2 fine ones
    torch.testing.assert_close(
        found[0, inner, inner], expected[0, 4:12, 8:16][inner, inner], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        found[1, inner, inner], expected[0, 0:8, 4:12][inner, inner], rtol=1e-4, atol=1e-5
    )
    elsewhere = method.unbounded_energy(parts, all_valid(parts), [(0, 0), (64, 64)])
    assert float((elsewhere - found).abs().max()) > 0.01


@pytest.mark.parametrize("origin", [(16, 0), (0, 8), (32, 96), (-32, 0), (0, -64)])
def test_a_part_off_the_cells_or_the_frame_is_refused(origin: tuple[int, int]) -> None:
    method = prepared(pictures(2, 128))
    part = pictures(1)
    with pytest.raises(ConfigError, match="whole cells"):
        method.unbounded_energy(part, all_valid(part), [origin])


def test_another_size_is_refused() -> None:
    method = prepared()
    with pytest.raises(ConfigError, match=r"fitted on a grid of \[8, 8\], not \[12, 12\]"):
        method(pictures(1, 96), all_valid(pictures(1, 96)))


# --- the whole


def test_tiles_and_many_products_are_refused(tmp_path: Path) -> None:
    good = write_good(tmp_path / "bolt", 4)
    fit = {"method": "cflow", "backbone": "tiny", "weights": "random", "size": 64}
    with pytest.raises(UsageError, match="cannot take tiles"):
        Detector.fit(good, frame="tile", **fit)
    write_good(tmp_path / "nut", 4, first_seed=50)
    with pytest.raises(UsageError, match="cannot hold many products"):
        Detector.fit(tmp_path, multi_class=True, **fit)


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_small_fits_of_both_presets_find_a_scratch(preset: str, tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 16)
    small = {
        "code": 16,
        "blocks": 2,
        "fibres": 128,
        "epochs": None,
        "steps": 40,
        "batch": 8,
        "lr": 3e-3,
        "warmup": 0,
    }
    detector = Detector.fit(
        good, method="cflow", preset=preset, backbone="tiny", weights="random", size=64, settings=small
    )
    config = cast(CflowConfig, detector.method.config)
    assert config.rotate == make_config(Cflow, preset, {}).rotate  # type: ignore[attr-defined]  # a CflowConfig
    views = pictures(8, first=300)
    views[:4, :, 20:28, 12:50] = 1 - views[:4, :, 20:28, 12:50]
    with torch.no_grad():
        score = detector.method(views, all_valid(views)).score
    assert float(score[:4].min()) > float(score[4:].max())


def test_refiners_know_the_peaks_of_energies_without_a_bound(tmp_path: Path) -> None:
    small = {"code": 16, "blocks": 2, "fibres": 128, "epochs": None, "steps": 10, "batch": 8, "warmup": 0}
    detector = Detector.fit(
        write_good(tmp_path / "good", 16),
        **{"method": "cflow", "backbone": "tiny", "weights": "random", "size": 64, "settings": small},
    )
    fitted = detector.for_refiners
    assert fitted is not None and fitted.facts.roi_high_unbounded is not None
    moved = detector.recalibrated(write_good(tmp_path / "fresh", 10, first_seed=400))
    views = pictures(10, first=400)
    method = moved.method
    assert isinstance(method, Unbounded) and moved.for_refiners is not None
    with torch.no_grad():
        expected = method.unbounded_energy(views, all_valid(views)).flatten(1).amax(dim=1).quantile(0.9)
    assert float(expected) > 1  # or the least bound would hide it
    facts = moved.for_refiners.facts
    assert facts.roi_high_unbounded == pytest.approx(float(expected), rel=1e-4)
    assert facts.roi_high_unbounded != pytest.approx(facts.roi_high, rel=1e-2)
