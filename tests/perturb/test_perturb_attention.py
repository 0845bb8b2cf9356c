"""Masks from attention: counted values, equal energies, and what must not hang on what."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fettle.errors import ConfigError, DataError
from fettle.perturb.attention import (
    Guidance,
    GuideConfig,
    binarise,
    combine,
    equal_energy,
    follow,
    frozen_copy,
    linear,
    momentum_at,
    normalise,
    picture_sigma,
    shuffled_places,
    strength,
)
from fettle.perturb.attention_guide import AttentionGuide
from fettle.protocols import Backbone, Step

PRIOR, LEARNED = [1.0, 2, 3, 5], [4.0, 0, 2, 2]


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def all_of(cue: Tensor) -> Tensor:
    return torch.ones_like(cue, dtype=torch.bool)


class Energetic:
    """A backbone of one cue, as far as a guide asks."""

    cues = ("energy",)


def make_guide(**settings: object) -> AttentionGuide:
    return AttentionGuide(GuideConfig.model_validate(settings), cast(Backbone, Energetic()), ("a", "b"))


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("cue", "floor", "expected"),
    [
        (PRIOR, 0, [0, 0.25, 0.5, 1]),
        (LEARNED, 0, [1, 0, 0.5, 0.5]),
        ([0.3] * 4, 0, [0.5] * 4),
        ([0.9, 1, 1.1, 1], 1, [0.4, 0.5, 0.6, 0.5]),
    ],
)
def test_normalise(cue: list[float], floor: float, expected: list[float]) -> None:
    found = normalise(row(*cue), all_of(row(*cue)), floor)
    torch.testing.assert_close(found, row(*expected))


def test_normalise_looks_at_valid_tokens_alone() -> None:
    valid = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(normalise(row(*PRIOR), valid, 0), row(0, 0.5, 1, 0))


def test_rounding_noise_on_a_constant_cue_stays_noise() -> None:
    cue = 1 / 256 + 1e-9 * torch.randn(1, 256, generator=drawn())
    assert float(normalise(cue, all_of(cue), 0).std()) < 0.03


def test_combine() -> None:
    prior, learned = row(*PRIOR)[:, None], row(*LEARNED)
    attention, mask = combine(prior, learned, all_of(learned), 0)
    torch.testing.assert_close(attention, row(1, 0.25, 1, 1.5))
    torch.testing.assert_close(mask, row(0.6, 0, 0.6, 1))
    _, floored = combine(prior, learned, all_of(learned), 1)
    torch.testing.assert_close(floored, row(0.5, 0.125, 0.5, 0.75))
    for changed in ((3 * prior + 7, learned), (prior, 0.1 * learned + 2)):
        torch.testing.assert_close(combine(*changed, all_of(learned), 0)[1], mask)
    _, alone = combine(prior, None, all_of(learned), 0)
    torch.testing.assert_close(alone, row(0, 0.25, 0.5, 1))


def test_maps_of_a_prior_are_normalised_each() -> None:
    prior = torch.stack([row(*PRIOR), 100 * row(*LEARNED)], dim=1)
    _, mask = combine(prior, None, all_of(row(*PRIOR)), 0)
    torch.testing.assert_close(mask, row(0.6, 0, 0.6, 1))


def test_strengths_of_equal_energy() -> None:
    mask, valid = row(0.6, 0, 0.6, 1), all_of(row(*PRIOR))
    own = strength(mask, 0.5, 0.1, valid)
    torch.testing.assert_close(own, row(0.4, 0.1, 0.4, 0.6))
    assert float(own.square().sum()) == pytest.approx(0.69)
    ones = torch.ones_like(own)
    torch.testing.assert_close(equal_energy(ones, own, ones, valid), 0.415331 * ones, atol=1e-6, rtol=0)
    uneven = equal_energy(ones, own, row(1, 2, 1, 1), valid)
    torch.testing.assert_close(uneven, 0.320713 * ones, atol=1e-6, rtol=0)
    part = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(
        equal_energy(ones, strength(mask, 0.5, 0.1, part), ones, part),
        row(0.331662, 0.331662, 0.331662, 0),
        atol=1e-6,
        rtol=0,
    )
    opposite = row(0.3, 0.6, 0.3, 0.1)
    torch.testing.assert_close(
        equal_energy(opposite, own, ones, valid), 1.120065 * opposite, atol=1e-6, rtol=0
    )


KINDS = ("uniform", "shuffled", "inverted", "fixed", "attention")


def guided(kind: str, prior: Tensor, learned: Tensor, valid: Tensor, unit: Tensor | None = None) -> Guidance:
    guide = make_guide(noise=kind, contrast_floor=0)
    guide.begin(prior.shape[1])
    guide.keep_prior(prior[:, None].flip(0), valid)
    found: Guidance = guide(prior[:, None], learned, 0.5, valid, drawn(), unit)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_has_the_energy_of_attention(kind: str) -> None:
    prior, learned = torch.rand(4, 256, generator=drawn(1)), torch.rand(4, 256, generator=drawn(2))
    valid = torch.rand(4, 256, generator=drawn(3)) < 0.8
    found = guided(kind, prior, learned, valid)
    wanted = guided("attention", prior, learned, valid)
    torch.testing.assert_close(found.strength.square().sum(1), wanted.strength.square().sum(1))
    assert not bool(found.strength[~valid].any()) and not bool(found.mask[~valid].any())
    noise = torch.randn(4, 256, 384, generator=drawn(4))
    realised = [(own.strength[:, :, None] * noise).square().sum((1, 2)) for own in (found, wanted)]
    torch.testing.assert_close(realised[0], realised[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["uniform", "shuffled", "inverted", "fixed"])
def test_controls_weigh_the_energy_by_the_unit_of_each_token(kind: str) -> None:
    prior, learned = torch.rand(2, 64, generator=drawn(1)), torch.rand(2, 64, generator=drawn(2))
    unit = torch.rand(2, 64, generator=drawn(3)) + 0.5
    found, wanted = (guided(k, prior, learned, all_of(prior), unit).strength for k in (kind, "attention"))
    torch.testing.assert_close((found * unit).square().sum(1), (wanted * unit).square().sum(1))


def test_controls_lie_where_they_say() -> None:
    prior, learned = torch.rand(2, 64, generator=drawn(1)), torch.rand(2, 64, generator=drawn(2))
    valid = all_of(prior)
    own = guided("attention", prior, learned, valid).strength
    uniform = guided("uniform", prior, learned, valid).strength
    assert float((uniform - uniform[:, :1]).abs().max()) == 0
    inverted = guided("inverted", prior, learned, valid).strength
    assert float(torch.corrcoef(torch.stack([own[0], inverted[0]]))[0, 1]) == pytest.approx(-1, abs=1e-5)
    shuffled = guided("shuffled", prior, learned, valid)
    assert not torch.equal(shuffled.strength, own)
    torch.testing.assert_close(shuffled.strength.sort(dim=1).values, own.sort(dim=1).values)
    fixed = guided("fixed", prior, learned, valid)
    torch.testing.assert_close(fixed.mask[0], fixed.mask[1])
    assert not torch.equal(guided("attention", prior, learned, valid).mask[0], fixed.mask[0])


def test_shuffling_moves_mask_and_attention_together() -> None:
    prior, learned = torch.rand(2, 64, generator=drawn(1)), torch.rand(2, 64, generator=drawn(2))
    found = guided("shuffled", prior, learned, all_of(prior))
    torch.testing.assert_close(found.mask.argsort(1), found.attention.argsort(1))


def test_shuffled_places_leave_invalid_tokens_where_they_are() -> None:
    valid = torch.tensor([[True, False, True, True, False, True], [True] * 6])
    places = shuffled_places(valid, drawn(2))
    assert places[0, [1, 4]].tolist() == [1, 4]
    assert sorted(places[0, [0, 2, 3, 5]].tolist()) == [0, 2, 3, 5]
    assert sorted(places[1].tolist()) == list(range(6))
    assert not torch.equal(shuffled_places(valid, drawn(3)), places)


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_fixed_mask_is_that_of_the_mean_cues(floor: float) -> None:
    guide = make_guide(noise="fixed", contrast_floor=floor)
    priors = torch.rand(6, 3, 16, generator=drawn(1)) + 0.5
    valid = torch.ones(6, 16, dtype=torch.bool)
    for part in (slice(0, 4), slice(4, 6)):
        guide.keep_prior(priors[part], valid[part])
    guide.begin(16)
    first, second = torch.rand(2, 16, generator=drawn(2)), torch.rand(2, 16, generator=drawn(3))
    for number, learned in enumerate((first, second)):
        guide(priors[:2], learned, 1.0, valid[:2], drawn())
        guide.after_step(Step(number, 10), nn.Identity())
    found: Guidance = guide(priors[:2], second, 1.0, valid[:2], drawn())

    def norm(cue: Tensor, own_floor: float = floor) -> Tensor:
        return normalise(cue, torch.ones_like(cue, dtype=torch.bool), own_floor)

    each = torch.stack([norm(priors[:, k]) for k in range(3)]).mean(0)
    mean_learned = norm((0.99 * first.mean(0) + 0.01 * second.mean(0))[None])
    if floor:  # it acts once
        expected = (each.mean(0, keepdim=True) + mean_learned) / 2
    else:
        expected = norm(norm(norm(each).mean(0, keepdim=True)) + mean_learned)
    torch.testing.assert_close(found.mask[:1], expected)


def test_the_mean_of_priors_counts_each_token_where_it_is_valid() -> None:
    guide = make_guide(noise="fixed", cues="prior", contrast_floor=0)
    priors = torch.tensor([[[0.0, 1, 2, 9]], [[0.0, 2, 1, 9]], [[0.0, 1, 1, 1]]])
    valid = torch.tensor([[True, True, True, False]] * 2 + [[True] * 4])
    guide.keep_prior(priors[:1], valid[:1])
    guide.keep_prior(priors[1:], valid[1:])
    torch.testing.assert_close(guide.mean_prior, torch.tensor([0, (0.5 + 1 + 1) / 3, (1 + 0.5 + 1) / 3, 1.0]))


def test_several_processes_refuse_a_running_mean() -> None:
    guide = make_guide(noise="fixed", cues="learned")
    guide.begin(4)
    guide(None, torch.rand(1, 4), 1.0, torch.ones(1, 4, dtype=torch.bool), drawn())
    with pytest.raises(ConfigError, match="several processes"):
        guide.after_step(Step(0, 10, rank=1), nn.Identity())


def test_binarise_takes_the_largest_and_of_equal_ones_the_first() -> None:
    tokens = torch.tensor([[0.0, 1, 2, 3]])
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    quarter = picture_sigma(tokens, "attention", 0.25, 1.0, (2, 2), valid)[0, 0]
    assert quarter.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert int(picture_sigma(tokens, "attention", 0.3, 1.0, (2, 2), valid).sum()) == 5
    flat = torch.full((1, 2, 2), 0.5)
    assert binarise(flat, 0.5, torch.ones(1, 2, 2, dtype=torch.bool))[0].tolist() == [
        [True, True],
        [False] * 2,
    ]
    lowest = picture_sigma(tokens, "inverted", 0.25, 1.0, (2, 2), valid)[0, 0]
    assert lowest.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize(
    ("ratio", "count"), [(0.1, 6554), (0.3, 19661), (0.5, 32768), (0.0, 0), (1.0, 65536)]
)
def test_binarise_counts(ratio: float, count: int) -> None:
    values = torch.rand(2, 256, 256, generator=drawn())
    chosen = binarise(values, ratio, torch.ones(2, 256, 256, dtype=torch.bool))
    assert chosen.sum(dim=(1, 2)).tolist() == [count, count]
    if 0 < count < 65536:
        assert float(values[chosen].min()) >= float(values[~chosen].min())
        assert float(values[0][chosen[0]].min()) > float(values[0][~chosen[0]].max())


def test_invalid_pixels_are_never_disturbed() -> None:
    valid = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    valid[..., 4:] = False
    tokens = torch.tensor([[0.0, 9, 1, 9]])
    chosen = picture_sigma(tokens, "attention", 0.5, 0.2, (2, 2), valid)
    assert int((chosen > 0).sum()) == 16 and not bool(chosen[~valid].any())
    even = picture_sigma(tokens, "uniform", 0.5, 0.2, (2, 2), valid)
    assert not bool(even[~valid].any())
    torch.testing.assert_close(even.square().sum(), chosen.square().sum())


@pytest.mark.parametrize(("ratio", "sigma"), [(0.1, 0.063246), (0.3, 0.109545), (0.5, 0.141421)])
def test_uniform_noise_of_pictures(ratio: float, sigma: float) -> None:
    valid = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    even = picture_sigma(torch.rand(1, 16), "uniform", ratio, 0.2, (4, 4), valid)
    assert float(even.max()) == pytest.approx(sigma, abs=2e-6) and float(even.min()) == float(even.max())


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, 0), (1, 0.001001), (250, 0.250250), (499, 0.499499), (500, 0.500501), (999, 1)],
)
def test_linear_schedule(number: int, expected: float) -> None:
    assert linear(0, 1, number / 999) == pytest.approx(expected, abs=1e-6)


def test_schedules_of_alpha() -> None:
    assert linear(0.1, 0.5, 499 / 999) == pytest.approx(0.2998, abs=1e-6)
    assert linear(0, 1, 250 / 999, ramp=0.5) == pytest.approx(0.500501, abs=1e-6)
    assert linear(0, 1, 500 / 999, ramp=0.5) == 1
    config = GuideConfig(alpha_start=0.2, alpha_end=1.0)
    assert [config.alpha(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.6, 1.0])
    turned = config.model_copy(update={"alpha_schedule": "reversed"})
    assert [turned.alpha(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2])
    constant = config.model_copy(update={"alpha_schedule": "constant"})
    assert [constant.alpha(share) for share in (0.0, 1.0)] == pytest.approx([0.6, 0.6])
    assert constant.model_copy(update={"alpha_constant": 0.9}).alpha(0.3) == 0.9


def test_momentum() -> None:
    found = [momentum_at(t, 0.999) for t in (0, 1, 9, 90, 990, 8990, 20000)]
    assert found == pytest.approx([0.1, 2 / 11, 10 / 19, 0.91, 0.991, 0.999, 0.999])
    assert momentum_at(8989, 0.999) < 0.999
    source, slow = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(source.weight)
    nn.init.ones_(slow.weight)
    for t in range(10):
        follow(slow, source, momentum_at(t, 0.999))
    assert float(slow.weight.detach()) == pytest.approx(
        math.factorial(10) * math.factorial(9) / math.factorial(19)
    )
    assert float(slow.weight.detach()) == pytest.approx(1.08251e-5, rel=1e-4)


def test_a_frozen_copy_does_not_learn() -> None:
    source = nn.Linear(2, 2)
    slow = frozen_copy(source)
    assert not any(parameter.requires_grad for parameter in slow.parameters())
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_masks_do_not_hang_on_batch_mates() -> None:
    prior, learned = torch.rand(4, 2, 64, generator=drawn(1)), torch.rand(4, 64, generator=drawn(2))
    valid = torch.ones(4, 64, dtype=torch.bool)
    together, _ = combine(prior, learned, valid, 0)
    prior[1:] *= 1000
    alone, _ = combine(prior[:1], learned[:1], valid[:1], 0)
    torch.testing.assert_close(together[:1], alone)


def test_a_cut_prior_is_not_flattened_by_one_token() -> None:
    prior = torch.rand(1, 1, 400, generator=drawn(1))
    prior[0, 0, 7] = 1000
    valid = torch.ones(1, 400, dtype=torch.bool)
    masks = []
    for clip in (None, 0.99):
        guide = make_guide(cues="prior", prior_clip=clip, contrast_floor=0)
        masks.append(guide(prior, None, 1.0, valid, drawn()).mask)
    assert float(masks[0].median()) < 0.01 and 0.3 < float(masks[1].median()) < 0.7


def test_only_the_cues_asked_for_count() -> None:
    prior, learned = torch.rand(1, 1, 16, generator=drawn(1)), torch.rand(1, 16, generator=drawn(2))
    valid = torch.ones(1, 16, dtype=torch.bool)
    for cues, own in (("prior", prior[:, 0]), ("learned", learned)):
        guide = make_guide(cues=cues, contrast_floor=0)
        torch.testing.assert_close(guide(prior, learned, 0.0, valid, drawn()).mask, normalise(own, valid, 0))


def test_guides_refuse_what_means_nothing() -> None:
    good = torch.rand(2, 16)
    valid = torch.ones(2, 16, dtype=torch.bool)
    with pytest.raises(DataError, match="NaN"):
        normalise(good.index_fill(1, torch.tensor([3]), torch.nan), valid, 0)
    with pytest.raises(DataError, match="one token"):
        normalise(good[:, :1], valid[:, :1], 0)
    nothing = valid.clone()
    nothing[1] = False
    with pytest.raises(DataError, match="no valid token"):
        normalise(good, nothing, 0)
    with pytest.raises(ValidationError):
        GuideConfig.model_validate({"noise": "atention"})
