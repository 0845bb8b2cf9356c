"""The optimisation, on problems whose optimum is known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.refine.energy import Box, hinged, rim_weights
from fettle.refine.settings import F2PADConfig
from fettle.refine.sharing import BilateralSharing, GaussSharing, blurred
from fettle.refine.solver import (
    Objective,
    Solution,
    group_soft_threshold,
    soft_threshold,
    solve,
    total_variation,
)
from refine_toys import SIDE, SQUARE, GreyMethod, grey_with, problem_of

BEST = 0.6 * 0.875 * 256 / 1024  # 0.13125
PLAIN = F2PADConfig(share="none", stop_gain=0, time_cap_s=1000)


def solved(config: F2PADConfig, *pictures: Tensor, method: GreyMethod | None = None) -> list[Solution]:
    problem, energy = problem_of(*pictures, method=method, kappa=config.kappa)
    return solve(problem, energy, config)


# --- small steps


def test_soft_thresholds() -> None:
    values = torch.tensor([0.3, 0.4, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(group_soft_threshold(values, 0.1).flatten(), torch.tensor([0.24, 0.32, 0.0]))
    assert group_soft_threshold(values, 0.6).abs().max() == 0
    assert group_soft_threshold(torch.zeros(1, 3, 1, 1), 0.1).abs().max() == 0
    torch.testing.assert_close(
        soft_threshold(torch.tensor([0.3, -0.05, 0.0]), 0.1), torch.tensor([0.2, 0.0, 0.0])
    )


def test_hinge() -> None:
    z = (torch.tensor([1.0, 2.0, 5.0]) - 2) / (4 - 2)
    assert hinged(z, 0.5).tolist() == [0, 0, 1]
    assert hinged(z, None).tolist() == [-0.5, 0, 1.5]


def test_share_ends_at_the_floor() -> None:
    problem, _ = problem_of(grey_with(SQUARE))
    problem = replace(problem, before=torch.tensor([10.0]), floor=torch.tensor([4.0]))
    shares = [float(problem.share(torch.tensor([energy]))) for energy in (10.0, 7.0, 4.0, 1.0)]
    assert shares == [1, 0.5, 0, 0]


def test_total_variation_of_a_square_is_its_outline_times_its_height() -> None:
    anomaly = torch.zeros(1, 3, 16, 16)
    anomaly[:, :, 4:9, 4:10] = 0.2 / 3**0.5  # of norm 0.2
    assert float(total_variation(anomaly)) == pytest.approx(0.2 * 2 * (5 + 6), rel=1e-4)


def test_rim_is_left_out_along_crop_sides_only() -> None:
    """A window at the frame's top left corner has two sides of its own and two of the frame."""
    weights = rim_weights(Box(0, 0, 32, 32), (64, 64), (8, 8), 8)
    assert weights[:6, :6].all() and weights.sum() == 36
    whole = rim_weights(Box(0, 0, 64, 64), (64, 64), (16, 16), 8)
    assert whole.all()


# --- sharing


def roi_of_five() -> Tensor:
    roi = torch.zeros(1, 1, 9, 9)
    roi[:, :, 2:7, 2:7] = 1
    return roi


@pytest.mark.parametrize("sigma", [3.0, 0.7])
def test_gauss_sharing_keeps_a_constant(sigma: float) -> None:
    roi = roi_of_five()
    assert torch.equal(GaussSharing(roi, (sigma,), 4)(roi.clone(), 0), roi)


def test_bilateral_sharing_keeps_a_constant() -> None:
    roi = roi_of_five()
    picture = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    shared = BilateralSharing.of(picture, roi, 7, 0.08)(roi.clone(), 0)
    torch.testing.assert_close(shared, roi)
    assert shared[roi == 0].abs().max() == 0


def test_bilateral_sharing_does_not_cross_an_edge() -> None:
    """The neighbour across an edge of 0.4 in three channels weighs exp(-0.48 / 0.0128) of an own one."""
    picture = torch.full((1, 3, 9, 9), 0.5)
    picture[..., 5:] = 0.9
    gradient = torch.zeros(1, 1, 9, 9)
    gradient[..., 5:] = 1
    shared = BilateralSharing.of(picture, torch.ones(1, 1, 9, 9), 7, 0.08)(gradient, 0)
    torch.testing.assert_close(shared, gradient, atol=1e-6, rtol=0)


def test_bilateral_weights_agree_with_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 8, 8, generator=generator)
    roi = (torch.rand(1, 1, 8, 8, generator=generator) < 0.7).float()
    gradient = torch.randn(1, 1, 8, 8, generator=generator) * roi
    shared = BilateralSharing.of(picture, roi, 3, 0.2)(gradient, 0)
    expected = torch.zeros(8, 8)
    for y, x in itertools.product(range(8), range(8)):
        total = weight = 0.0
        for v, u in itertools.product(
            range(max(y - 1, 0), min(y + 2, 8)), range(max(x - 1, 0), min(x + 2, 8))
        ):
            distance = float((picture[0, :, y, x] - picture[0, :, v, u]).square().sum())
            own = float(roi[0, 0, v, u]) * torch.exp(torch.tensor(-distance / (2 * 0.2**2))).item()
            total += own * float(gradient[0, 0, v, u])
            weight += own
        expected[y, x] = total / weight * float(roi[0, 0, y, x]) if weight else 0
    torch.testing.assert_close(shared[0, 0], expected, atol=1e-5, rtol=1e-4)


def test_gaussian_of_one_pixel() -> None:
    point = torch.zeros(1, 1, 15, 15)
    point[..., 7, 7] = 1
    spread = blurred(point, 1.0)[0, 0]
    assert float(spread[7].sum()) == pytest.approx(0.399, abs=2e-4)
    assert float(spread[7, 7]) == pytest.approx(0.1592, abs=1e-4)


def test_gauss_sharing_goes_from_coarse_to_fine() -> None:
    roi, gradient = torch.ones(1, 1, 31, 31), torch.zeros(1, 1, 31, 31)
    gradient[..., 15, 15] = 1
    sharing = GaussSharing(roi, (3.0, 1.5, 0.7), 24)
    peaks = [float(sharing(gradient, t).max()) for t in range(24)]
    assert len(set(peaks)) == 3 and peaks == sorted(peaks)
    assert [peaks.index(peak) for peak in sorted(set(peaks))] == [0, 8, 16]


# --- the exact optimum


def test_the_known_energy() -> None:
    problem, _ = problem_of(grey_with(SQUARE))
    assert float(problem.before[0]) == pytest.approx(56, rel=1e-5)
    assert float(problem.filled[0]) == 0


@pytest.mark.parametrize(("iters", "measured", "within"), [(24, 0.13625, 0.05), (100, 0.13195, 0.01)])
def test_solver_finds_the_exact_optimum(iters: int, measured: float, within: float) -> None:
    config = PLAIN.model_copy(update={"iters": iters})
    (solution,) = solved(config, grey_with(SQUARE))
    assert BEST <= solution.objective <= BEST * (1 + within)
    assert solution.objective == pytest.approx(measured, abs=2e-5)
    mask = solution.unknown[0]
    assert float(mask[24:40, 24:40].std()) < 1e-4
    assert float(mask[24:40, 24:40].mean()) == pytest.approx(0.875, abs=0.04 if iters == 24 else 0.006)
    mask = mask.clone()
    mask[24:40, 24:40] = 0
    assert mask.abs().max() == 0


def test_sharing_keeps_the_square() -> None:
    config = F2PADConfig(stop_gain=0, time_cap_s=1000)
    (solution,) = solved(config, grey_with(SQUARE))
    assert solution.objective <= BEST * 1.05
    assert torch.equal(solution.unknown[0] > 0.5, grey_with(SQUARE)[0] > 0.6)


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "free"},
        {"form": "free", "start": "zero"},
        {"form": "free", "sparsity": "l1"},
        {"form": "free", "lambda2": 0.01},
        {"step": "adam"},
        {"start": "half"},
        {"start": "zero"},
        {"share": "gauss"},
    ],
)
def test_every_form_comes_near_its_optimum(settings: dict[str, object]) -> None:
    """The free form counts its sparsity in what the full replacement removes, which is the square alone."""
    config = F2PADConfig.model_validate({"stop_gain": 0, "iters": 100, "time_cap_s": 1000, **settings})
    (solution,) = solved(config, grey_with(SQUARE))
    optimum = 0.6 * 0.875 if config.form == "free" else BEST
    assert optimum - 1e-5 <= solution.objective <= 1.25 * optimum


def test_without_sparsity_the_free_form_takes_energy_only() -> None:
    config = F2PADConfig(form="free", sparsity="none", iters=24, time_cap_s=1000)
    (solution,) = solved(config, grey_with(SQUARE))
    assert solution.objective == 0
    assert solution.objective_start == 0


def test_no_hinge_takes_all_of_the_defect() -> None:
    """Without a hinge a patch pulls until it is typical: V = 1 on the square."""
    config = PLAIN.model_copy(update={"kappa": None, "iters": 100})
    (solution,) = solved(config, grey_with(SQUARE))
    assert float(solution.unknown[0, 24:40, 24:40].min()) > 0.98


def test_free_form_stays_within_the_pictures_range() -> None:
    problem, energy = problem_of(grey_with(SQUARE, value=1.0))
    for solution in solve(problem, energy, F2PADConfig(form="free", eta_free=1.0, time_cap_s=1000)):
        restored = problem.picture[0] - solution.unknown
        assert float(restored.min()) >= 0 and float(restored.max()) <= 1


def test_free_form_leaves_a_start_without_gradient_by_its_step() -> None:
    """Where everything is replaced no energy is left and nothing but the sparsity moves."""
    config = F2PADConfig(form="free", share="none", iters=1, time_cap_s=1000)
    (solution,) = solved(config, grey_with(SQUARE))  # 0.4 above its fill in each of three channels
    assert solution.objective == pytest.approx(0.6 * (1 - 0.03 / (0.4 * 3**0.5)), abs=1e-5)


def test_no_iterations_give_the_start() -> None:
    config = PLAIN.model_copy(update={"iters": 0})
    (solution,) = solved(config, grey_with(SQUARE))
    assert torch.equal(solution.unknown[0], problem_of(grey_with(SQUARE))[0].roi[0, 0])
    assert (solution.iterations, solution.stop) == (0, "max_iter")
    assert solution.objective == pytest.approx(0.6) == solution.objective_start


@pytest.mark.parametrize("start", ["zero", "half", "full"])
@pytest.mark.parametrize("lambda1", [0.1, 5.0])
def test_objective_is_at_most_that_of_both_extremes(start: str, lambda1: float) -> None:
    config = F2PADConfig.model_validate({"start": start, "lambda1": lambda1, "iters": 1, "time_cap_s": 1000})
    (solution,) = solved(config, grey_with(SQUARE))
    assert solution.objective <= min(1, solution.objective_start)


# --- batches, stops


def three() -> list[Tensor]:
    noise = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 0.05
    squares = [((24, 24, 16),), ((20, 28, 8),), ((18, 18, 12), (36, 36, 8))]
    return [(grey_with(*own) + noise[i]).clamp(0, 1) for i, own in enumerate(squares)]


@pytest.mark.parametrize("form", ["mask", "free"])
def test_solution_ignores_batch_mates_and_order(form: str) -> None:
    config = F2PADConfig.model_validate({"form": form, "time_cap_s": 1000})
    pictures = three()
    together = solved(config, *pictures)
    turned = solved(config, *pictures[::-1])[::-1]
    assert len({solution.iterations for solution in together}) > 1  # some leave earlier than others
    for i, picture in enumerate(pictures):
        (alone,) = solved(config, picture)
        for other in (together[i], turned[i]):
            torch.testing.assert_close(other.unknown, alone.unknown, atol=1e-5, rtol=0)
            assert (other.iterations, other.stop) == (alone.iterations, alone.stop)


def test_two_runs_are_bit_equal() -> None:
    first, second = (solved(F2PADConfig(time_cap_s=1000), *three()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.unknown, other.unknown) and one.objective == other.objective


def test_a_picture_that_gains_nothing_stops_early() -> None:
    method = GreyMethod()
    (solution,) = solved(F2PADConfig(iters=100, time_cap_s=1000), grey_with(SQUARE), method=method)
    assert solution.stop == "converged"
    assert 8 <= solution.iterations < 100
    assert method.calls == solution.iterations + 1 + 2  # two of them to pose the problem


def test_time_cap_is_the_batchs_sum_and_never_interrupts() -> None:
    """Each reading of the clock is a second later: an iteration of three takes a third a picture."""
    problem, energy = problem_of(*three())
    seconds = itertools.count()
    found = solve(problem, energy, F2PADConfig(time_cap_s=1.5, stop_gain=0), clock=lambda: next(seconds))
    assert [solution.stop for solution in found] == ["time_cap"] * 3
    assert [solution.iterations for solution in found] == [5] * 3  # the first after 5 / 3 s a picture


def test_windows_may_have_time_caps_of_their_own() -> None:
    problem, energy = problem_of(*three())
    seconds = itertools.count()
    config = F2PADConfig(iters=12, stop_gain=0)
    found = solve(problem, energy, config, [1.5, 1000, 0.2], clock=lambda: next(seconds))
    assert [solution.stop for solution in found] == ["time_cap", "max_iter", "time_cap"]
    assert found[2].iterations == 1 < found[0].iterations < found[1].iterations == 12


def test_without_an_iteration_the_start_is_the_full_replacement() -> None:
    plain, half = (solved(F2PADConfig(iters=0, start=start), grey_with(SQUARE)) for start in ("full", "half"))
    assert torch.equal(plain[0].unknown, half[0].unknown) and bool(plain[0].unknown.max() == 1)


def test_what_is_not_finite_stops_that_picture_only() -> None:
    def spoilt(z: Tensor, pictures: Tensor) -> Tensor:
        """NaN once a picture with a mark has lost some of its square."""
        marked = pictures[:, 0, 0, 0] > 0.55
        changed = F.avg_pool2d(pictures, 64)[:, 0, 0, 0] < 0.51
        return z.masked_fill((marked & changed)[:, None, None], float("nan"))

    marked = grey_with(SQUARE)
    marked[:, 0, 0] = 0.6
    method = GreyMethod()
    problem, energy = problem_of(grey_with(SQUARE), marked, method=method)
    method.change = spoilt
    found = solve(problem, energy, F2PADConfig(time_cap_s=1000))
    assert [solution.stop == "not_finite" for solution in found] == [False, True]
    (alone,) = solved(F2PADConfig(time_cap_s=1000), grey_with(SQUARE))
    torch.testing.assert_close(found[0].unknown, alone.unknown, atol=1e-5, rtol=0)


def test_objective_of_half_a_mask_by_hand() -> None:
    problem, energy = problem_of(grey_with(SQUARE))
    objective = Objective(problem, F2PADConfig())
    half = 0.5 * problem.roi
    left, gradient, smooth = objective.evaluate(half, energy, with_gradient=True)
    assert float(left) == pytest.approx(16 * (2 - 0.5), rel=1e-5)
    assert float(smooth) == pytest.approx(float(left) / 56, rel=1e-5)
    assert float(objective.sparsity(half)) == pytest.approx(0.3)
    # One pixel of the square: 4 a cell of 16 px, over E(X).
    assert float(gradient[0, 0, 30, 30]) == pytest.approx(-4 / 16 / 56, rel=1e-4)
    assert float(gradient[0, 0, 20, 20]) == 0


def test_energies_are_shares_of_what_is_above_the_floor() -> None:
    problem, energy = problem_of(grey_with(SQUARE))
    raised = replace(problem, floor=torch.tensor([14.0]))
    assert raised.share(torch.tensor([56.0, 14.0, 35.0])).tolist() == pytest.approx([1, 0, 0.5], abs=1e-6)
    _, _, smooth = Objective(raised, F2PADConfig()).evaluate(0.5 * problem.roi, energy, with_gradient=False)
    assert float(smooth) == pytest.approx((16 * (2 - 0.5) - 14) / 42, rel=1e-5)
