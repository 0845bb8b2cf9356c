"""The members of a pool: sizes by the specification's golden values, and what holds for each of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fettle.errors import ConfigError
from fettle.perturb.feature_drop import FeatureDrop, reaching
from fettle.perturb.feature_noise import FeatureNoise
from fettle.perturb.gaussian import RELATIVE_SIGMA, Gaussian
from fettle.perturb.perturbation import MemberConfig
from fettle.perturb.pool import Nothing
from fettle.perturb.token_mask import TokenMask, probabilities

GRID = (14, 14)
N = GRID[0] * GRID[1]
DISTURBING: tuple[MemberConfig, ...] = (
    Gaussian(),
    FeatureNoise(),
    FeatureNoise(shared=True),
    FeatureDrop(),
    FeatureDrop(rule="ratio_abs"),
    FeatureDrop(fill="mean"),
    TokenMask(choice="bernoulli"),
    TokenMask(choice="exact"),
    TokenMask(choice="block"),
    TokenMask(choice="exact", fill="mean"),
)
every_member = pytest.mark.parametrize("member", DISTURBING, ids=repr)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def changed(disturbed: Tensor, clean: Tensor) -> Tensor:
    """Which tokens differ, (B, N) bool."""
    return (disturbed != clean).any(dim=2)


# Gaussian


@pytest.mark.parametrize(("channels", "ratio"), [(272, 1.2127), (448, 0.9449)])
def test_uniads_alpha_is_this_multiple_of_a_tokens_rms(channels: int, ratio: float) -> None:
    clean = 3 * features(4, N, channels)
    jitter = Gaussian(relative_sigma=20 / math.sqrt(channels))
    noise = (jitter(clean, GRID, seeded()) - clean) / clean.square().mean(dim=2, keepdim=True).sqrt()
    assert float(noise.std()) == pytest.approx(ratio, rel=0.01)
    assert abs(float(noise.mean())) < 0.01


def test_jitters_default_is_the_papers_alpha_at_its_channels() -> None:
    assert Gaussian().relative_sigma * math.sqrt(272) == pytest.approx(20)


def test_jitter_follows_the_size_of_each_token() -> None:
    clean = features(1, N, 272) * torch.linspace(0.01, 100, N)[:, None]
    noise = Gaussian()(clean, GRID, seeded()) - clean
    ratio = noise.square().mean(dim=2).sqrt() / clean.square().mean(dim=2).sqrt()
    torch.testing.assert_close(ratio, torch.full_like(ratio, RELATIVE_SIGMA), rtol=0.2, atol=0)


def test_jitter_leaves_a_token_of_zeros_at_zero() -> None:
    clean = features(2, N, 16)
    clean[1, 5] = 0
    assert not bool(Gaussian()(clean, GRID, seeded())[1, 5].any())


# F-Noise


def test_feature_noise_keeps_signs_and_its_bound() -> None:
    clean = features(4, N, 272)
    noisy = FeatureNoise()(clean, GRID, seeded())
    assert bool(((noisy - clean).abs() <= 0.3 * clean.abs() * (1 + 1e-5)).all())
    assert torch.equal(noisy.sign(), clean.sign())
    factor = noisy / clean - 1
    assert abs(float(factor.mean())) < 0.002 and float(factor.max()) > 0.299 and float(factor.min()) < -0.299
    relative = (noisy - clean).norm() / clean.norm()
    assert float(relative) == pytest.approx(0.1732, abs=0.002)


def test_feature_noise_refuses_a_range_that_could_turn_signs() -> None:
    with pytest.raises(ValueError, match="less than 1"):
        FeatureNoise(range=1.0)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_feature_noise_is_one_factor_for_all_pictures(shared: bool) -> None:
    factor = FeatureNoise(shared=shared)(torch.ones(3, N, 8), GRID, seeded())
    assert torch.equal(factor[0], factor[2]) is shared


# F-Drop


def test_quantile_drops_the_drawn_share_of_the_most_active_tokens() -> None:
    clean = features(64, N, 8)
    dropped = changed(FeatureDrop()(clean, GRID, seeded()), clean)
    activity = clean.abs().mean(dim=2)
    assert bool(
        (activity.masked_fill(~dropped, torch.inf).amin(1) >= activity.masked_fill(dropped, 0).amax(1)).all()
    )
    share = dropped.sum(dim=1) / N
    assert 0.1 - 0.5 / N <= float(share.min()) < 0.15 and 0.35 < float(share.max()) <= 0.4 + 0.5 / N


@pytest.mark.parametrize("share", [0.1, 0.25, 0.333])
def test_quantile_of_a_fixed_share_drops_exactly_that_number(share: float) -> None:
    clean = features(3, N, 8)
    dropped = FeatureDrop(share=(share, share))(clean, GRID, seeded())
    assert changed(dropped, clean).sum(dim=1).tolist() == [round(share * N)] * 3
    assert not bool(dropped[changed(dropped, clean)].any())


def test_half_of_four_tokens_are_the_two_largest() -> None:
    clean = torch.tensor([[1.0], [-2.0], [3.0], [-4.0]])[None]
    dropped = FeatureDrop(share=(0.5, 0.5))(clean, (2, 2), seeded())
    assert dropped.flatten().tolist() == [1, -2, 0, 0]


def test_ties_go_by_token_index() -> None:
    dropped = FeatureDrop(share=(0.5, 0.5))(torch.ones(1, 6, 2), (2, 3), seeded())
    assert changed(dropped, torch.ones(1, 6, 2)).tolist() == [[True, True, True, False, False, False]]


RAMP = torch.tensor([[1.0, 1], [2, 2], [3, 3], [10, 10]])[None]


def test_cct_rule_drops_what_reaches_gamma_times_the_largest() -> None:
    dropped = FeatureDrop(rule="ratio_mean", gamma=(0.8, 0.8))(RAMP, (2, 2), seeded())
    assert torch.equal(dropped, RAMP.masked_fill(RAMP == 10, 0))


def test_cct_rule_is_refused_on_signed_features() -> None:
    with pytest.raises(ConfigError, match=r"negative.*quantile"):
        FeatureDrop(rule="ratio_mean")(-RAMP, (2, 2), seeded())


def test_cct_rule_looks_at_valid_tokens_only() -> None:
    clean, valid = RAMP.clone(), torch.tensor([[False, True, True, True]])
    clean[0, 0] = -100
    dropped = FeatureDrop(rule="ratio_mean", gamma=(0.8, 0.8))(clean, (2, 2), seeded(), valid=valid)
    assert changed(dropped, clean).tolist() == [[False, False, False, True]]


def test_cct_threshold_reaches_nothing_where_all_means_are_negative() -> None:
    """Why the rule is guarded: gamma times a negative maximum lies above it."""
    activity = torch.tensor([[-1.0, -2, -3, -10]])
    assert not bool(reaching(activity, torch.ones(1, 4, dtype=torch.bool), torch.tensor([0.8])).any())


def test_ratio_abs_takes_negative_features_by_their_size() -> None:
    dropped = FeatureDrop(rule="ratio_abs", gamma=(0.8, 0.8))(-RAMP, (2, 2), seeded())
    assert changed(dropped, -RAMP).tolist() == [[False, False, False, True]]


def test_ratio_abs_hides_at_most_two_fifths_of_an_even_texture() -> None:
    dropped = FeatureDrop(rule="ratio_abs")(torch.ones(2, N, 4), GRID, seeded())
    assert changed(dropped, torch.ones(2, N, 4)).sum(dim=1).tolist() == [round(0.4 * N)] * 2


@pytest.mark.parametrize("rule", ["quantile", "ratio_abs"])
def test_strength_scales_the_number_dropped(rule: str) -> None:
    drop = FeatureDrop.model_validate({"rule": rule, "share": (0.4, 0.4), "gamma": (0.1, 0.1)})
    clean = features(2, N, 8).abs() + 1
    dropped = drop(clean, GRID, seeded(), strength=0.5)
    assert changed(dropped, clean).sum(dim=1).tolist() == pytest.approx([0.2 * N] * 2, abs=1)


def test_fill_mean_is_the_mean_of_the_pictures_valid_tokens() -> None:
    clean, valid = RAMP.clone(), torch.tensor([[False, True, True, True]])
    clean[0, 0] = torch.nan  # what lies outside does not matter
    dropped = FeatureDrop(share=(0.34, 0.34), fill="mean")(clean, (2, 2), seeded(), valid=valid)
    assert dropped[0, 3].tolist() == [5, 5]
    assert dropped[0, 1:3].tolist() == [[2, 2], [3, 3]]


# Token masking


def test_bernoulli_hides_the_share_on_average() -> None:
    clean = features(200, N, 2)
    hidden = changed(TokenMask(choice="bernoulli", share=(0.3, 0.3))(clean, GRID, seeded()), clean)
    num = hidden.sum(dim=1).double()
    assert float(num.mean()) == pytest.approx(0.3 * N, rel=0.03)
    assert float(num.std()) == pytest.approx(math.sqrt(N * 0.3 * 0.7), rel=0.2)


def test_exact_hides_exactly_the_share_at_random_places() -> None:
    clean = features(400, N, 2)
    hidden = changed(TokenMask(choice="exact", share=(0.25, 0.25))(clean, GRID, seeded()), clean)
    assert hidden.sum(dim=1).unique().tolist() == [N // 4]
    frequency = hidden.double().mean(dim=0)
    assert float(frequency.std()) == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.25)


def test_block_is_one_rectangle_of_about_the_share() -> None:
    clean = features(50, N, 2)
    hidden = changed(TokenMask(choice="block", share=(0.25, 0.25))(clean, GRID, seeded()), clean)
    for mask in hidden.view(-1, *GRID):
        high, wide = int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        assert int(mask.sum()) == high * wide == pytest.approx(0.25 * N, rel=0.15)
        assert int(rows.max() - rows.min()) == high - 1 and int(columns.max() - columns.min()) == wide - 1
        assert 1 / 4 < high / wide < 4


def test_block_of_everything_covers_a_rectangular_grid() -> None:
    clean = torch.ones(20, 40, 2)
    assert not bool(TokenMask(choice="block", share=(1, 1))(clean, (4, 10), seeded()).any())


def test_blocks_reach_every_corner_of_the_grid() -> None:
    clean = torch.ones(400, 36, 1)
    hidden = changed(TokenMask(choice="block")(clean, (6, 6), seeded()), clean).any(dim=0).view(6, 6)
    assert bool(hidden.all())


def test_blocks_lie_where_tokens_are_valid() -> None:
    clean, valid = torch.ones(100, N, 1), torch.zeros(100, *GRID, dtype=torch.bool)
    valid[:, 10:, 10:] = True
    mask = TokenMask(choice="block", share=(0.02, 0.02))
    hidden = changed(mask(clean, GRID, seeded(), valid=valid.flatten(1)), clean)
    assert bool(hidden.any(dim=1).all())


# Guide


def test_guide_multiplies_noise_token_by_token() -> None:
    clean, guide = features(2, N, 16), torch.rand(2, N, generator=seeded(3))
    for member in (Gaussian(), FeatureNoise()):
        plain = member(clean, GRID, seeded()) - clean
        guided = member(clean, GRID, seeded(), guide=guide) - clean
        torch.testing.assert_close(guided, guide[:, :, None] * plain, rtol=1e-4, atol=1e-6)


def test_guide_over_its_root_mean_square_keeps_the_energy() -> None:
    clean, guide = torch.ones(8, N, 272), 0.2 + torch.rand(8, N, generator=seeded(3))
    guide /= guide.square().mean(dim=1, keepdim=True).sqrt()
    for member in (Gaussian(), FeatureNoise()):
        plain = (member(clean, GRID, seeded(4)) - clean).square().sum()
        guided = (member(clean, GRID, seeded(5), guide=guide) - clean).square().sum()
        assert float(guided / plain) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("factor", [1.0, 0.125])
@pytest.mark.parametrize(
    "member", [m for m in DISTURBING if isinstance(m, FeatureDrop | TokenMask)], ids=repr
)
def test_an_even_guide_drops_as_none(member: MemberConfig, factor: float) -> None:
    clean = features(4, N, 8)
    even = member(clean, GRID, seeded(), guide=torch.full((4, N), factor))
    assert torch.equal(even, member(clean, GRID, seeded()))


@pytest.mark.parametrize(
    "member",
    [FeatureDrop(), FeatureDrop(rule="ratio_abs", gamma=(0.3, 0.4)), TokenMask(choice="exact")],
    ids=repr,
)
def test_guide_moves_drops_and_keeps_their_number(member: MemberConfig) -> None:
    clean, guide = features(16, N, 8), torch.full((16, N), 0.1)
    guide[:, : N // 2] = 1
    plain = changed(member(clean, GRID, seeded()), clean)
    guided = changed(member(clean, GRID, seeded(), guide=guide), clean)
    assert torch.equal(guided.sum(dim=1), plain.sum(dim=1))
    assert int(guided[:, : N // 2].sum()) > 1.5 * int(plain[:, : N // 2].sum())


def test_bernoulli_keeps_the_expected_number_under_a_guide() -> None:
    clean, guide = features(400, N, 1), torch.rand(400, N, generator=seeded(2)) ** 4
    mask = TokenMask(choice="bernoulli", share=(0.4, 0.4))
    hidden = changed(mask(clean, GRID, seeded(), guide=guide), clean)
    assert float(hidden.sum(dim=1).double().mean()) == pytest.approx(0.4 * N, rel=0.02)


def test_probabilities_hand_on_what_is_cut_off() -> None:
    weights = torch.tensor([[8.0, 1, 1, 0], [1, 1, 1, 1], [5, 5, 0, 0]], dtype=torch.float64)
    found = probabilities(torch.tensor([1.5, 1.0, 3.0], dtype=torch.float64), weights)
    expected = [[1, 0.25, 0.25, 0], [0.25] * 4, [1, 1, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), st.floats(0, 1))
def test_probabilities_sum_to_what_is_expected(weights: list[float], share: float) -> None:
    possible = sum(weight > 0 for weight in weights)
    expected = share * len(weights)
    found = probabilities(
        torch.tensor([expected], dtype=torch.float64), torch.tensor([weights], dtype=torch.float64)
    )
    assert bool(((found >= 0) & (found <= 1)).all())
    assert float(found.sum()) == pytest.approx(min(expected, possible), abs=1e-6)


@every_member
def test_tokens_of_weight_zero_stay(member: MemberConfig) -> None:
    clean, guide = features(6, N, 8), torch.ones(6, N)
    guide[:, ::3] = 0
    disturbed = changed(member(clean, GRID, seeded(), guide=guide), clean)
    assert not bool(disturbed[:, ::3].any()) and bool(disturbed.any())
    assert torch.equal(member(clean, GRID, seeded(), guide=torch.zeros(6, N)), clean)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_guide_of_no_weights_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="guide"):
        Gaussian()(torch.ones(1, 4, 2), (2, 2), seeded(), guide=torch.full((1, 4), weight))


# Every member


@every_member
def test_strength_zero_gives_the_same_tensor_and_draws_nothing(member: MemberConfig) -> None:
    clean, generator = features(2, N, 8), seeded()
    before = generator.get_state()
    assert member(clean, GRID, generator, strength=0) is clean
    assert torch.equal(generator.get_state(), before)


@every_member
def test_a_seed_repeats_and_another_differs(member: MemberConfig) -> None:
    clean = features(8, N, 8)
    first = member(clean, GRID, seeded(1))
    assert torch.equal(first, member(clean, GRID, seeded(1)))
    assert not torch.equal(first, member(clean, GRID, seeded(2)))


@every_member
def test_draws_do_not_depend_on_the_global_generator(member: MemberConfig) -> None:
    clean = features(4, N, 8)
    torch.manual_seed(1)
    first = member(clean, GRID, seeded())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(first, member(clean, GRID, seeded()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "member", [m for m in DISTURBING if not isinstance(m, FeatureDrop | TokenMask)], ids=repr
)
def test_strength_scales_noise(member: MemberConfig) -> None:
    clean = features(2, N, 8)
    whole, half = (member(clean, GRID, seeded(), strength=share) - clean for share in (1.0, 0.5))
    torch.testing.assert_close(half, whole / 2, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from((*DISTURBING, Nothing())),
    st.integers(1, 3),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.booleans(),
)
def test_clean_input_and_invalid_tokens_stay_untouched(
    member: MemberConfig, num: int, grid: tuple[int, int], seed: int, strength: float, guided: bool
) -> None:
    drawn = seeded(seed)
    clean = torch.randn(num, grid[0] * grid[1], 3, generator=drawn)
    valid = torch.rand(clean.shape[:2], generator=drawn) < 0.6
    clean[~valid] = torch.nan  # the sternest padding
    guide = torch.rand(clean.shape[:2], generator=drawn) if guided else None
    before = clean.clone()
    disturbed = member(clean, grid, seeded(seed), strength=strength, guide=guide, valid=valid)
    assert torch.equal(clean.nan_to_num(99), before.nan_to_num(99))
    assert bool(disturbed[~valid].isnan().all())
    assert bool(disturbed[valid].isfinite().all())
    assert disturbed.shape == clean.shape and disturbed.dtype == clean.dtype


@every_member
def test_a_mask_of_all_valid_is_no_mask(member: MemberConfig) -> None:
    clean = features(3, N, 8)
    everywhere = torch.ones(3, N, dtype=torch.bool)
    assert torch.equal(member(clean, GRID, seeded(), valid=everywhere), member(clean, GRID, seeded()))


@pytest.mark.parametrize("member", [FeatureDrop(share=(0.5, 0.5)), TokenMask(share=(0.5, 0.5))], ids=repr)
def test_shares_are_of_the_valid_tokens(member: MemberConfig) -> None:
    clean, valid = features(3, N, 8), torch.zeros(3, N, dtype=torch.bool)
    valid[:, :20] = True
    assert changed(member(clean, GRID, seeded(), valid=valid), clean).sum(dim=1).tolist() == [10] * 3


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_strength_is_a_share(strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        Gaussian()(torch.ones(1, 4, 2), (2, 2), seeded(), strength=strength)


def test_tokens_must_fit_the_grid() -> None:
    with pytest.raises(ValueError, match="grid"):
        Gaussian()(torch.ones(1, 5, 2), (2, 2), seeded())


@pytest.mark.parametrize("share", [(0.4, 0.1), (-0.1, 0.5), (0.5, 1.5)])
def test_a_share_that_is_no_interval_of_shares_is_refused(share: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="share"):
        FeatureDrop(share=share)
