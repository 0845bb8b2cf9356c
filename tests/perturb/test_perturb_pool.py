"""The pool: which members run, in what order numbers are drawn, and its form as a config field."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from torch import Tensor

from fettle.perturb.feature_drop import FeatureDrop
from fettle.perturb.feature_noise import FeatureNoise
from fettle.perturb.gaussian import Gaussian
from fettle.perturb.perturbation import MemberConfig
from fettle.perturb.pool import NAMED_POOLS, Member, Nothing, PoolConfig
from fettle.perturb.schedules import Linear
from fettle.perturb.token_mask import TokenMask

GRID = (3, 4)
N = 12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(num: int, seed: int = 1) -> Tensor:
    return torch.randn(num, N, 5, generator=seeded(seed))


def pool_of(*members: tuple[MemberConfig, float], **fields: Any) -> PoolConfig:
    rows = [{"perturbation": member, "weight": weight} for member, weight in members]
    return PoolConfig.model_validate({"members": rows, **fields})


# Three members that are told apart by what they leave of a picture of ones
KEEPS_SIGN = FeatureNoise(range=0.3)  # some number in 0.7..1.3
HALF = TokenMask(share=(0.5, 0.5))  # 0 in half of the tokens
ALL = TokenMask(share=(1, 1))  # 0
THREE = (KEEPS_SIGN, HALF, ALL)


def who_ran(disturbed: Tensor) -> list[int]:
    """Number of the member of THREE that made each picture of ones; -1 for none of them."""
    zeros = (disturbed == 0).all(dim=2).sum(dim=1).tolist()
    whole = (disturbed == 1).all(dim=2).all(dim=1).tolist()
    return [-1 if one else {0: 0, N // 2: 1, N: 2}[count] for one, count in zip(whole, zeros, strict=True)]


def runs_of(pool: PoolConfig, calls: int, num: int = 1) -> list[int]:
    generator, ones = seeded(), torch.ones(num, N, 5)
    return [who for _ in range(calls) for who in who_ran(pool(ones, GRID, generator))]


ALONE = (Gaussian(), FeatureNoise(), FeatureDrop(), TokenMask(choice="bernoulli"), TokenMask(choice="block"))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("composition", ["one", "chain", "base_plus_one"])
@pytest.mark.parametrize("member", ALONE, ids=repr)
def test_pool_of_one_member_is_that_member_bit_for_bit(
    member: MemberConfig, composition: str, granularity: str
) -> None:
    clean, first, second = features(7), seeded(), seeded()
    pool = pool_of((member, 1), composition=composition, granularity=granularity)
    assert torch.equal(pool(clean, GRID, first), member(clean, GRID, second))
    assert torch.equal(first.get_state(), second.get_state())


def test_equal_weights_run_equally_often() -> None:
    runs = runs_of(pool_of(*((member, 1) for member in THREE)), calls=3000)
    assert [runs.count(who) / 3000 for who in range(3)] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_weights_count_in_proportion() -> None:
    runs = runs_of(pool_of((KEEPS_SIGN, 5), (HALF, 3), (ALL, 2)), calls=3000)
    assert [runs.count(who) / 3000 for who in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


@pytest.mark.parametrize("composition", ["one", "chain", "base_plus_one"])
def test_weight_zero_never_runs(composition: str) -> None:
    pool = pool_of((ALL, 0), (KEEPS_SIGN, 1), (HALF, 0), composition=composition)
    assert set(runs_of(pool, calls=200)) == {0}


def test_a_choice_among_one_weight_draws_nothing() -> None:
    clean, first, second = features(4), seeded(), seeded()
    pool = pool_of((ALL, 0), (Gaussian(), 3), (HALF, 0))
    assert torch.equal(pool(clean, GRID, first), Gaussian()(clean, GRID, second))
    assert torch.equal(first.get_state(), second.get_state())


def test_batch_granularity_gives_a_batch_one_member() -> None:
    pool = pool_of(*((member, 1) for member in THREE))
    generator = seeded()
    runs = [who_ran(pool(torch.ones(16, N, 5), GRID, generator)) for _ in range(30)]
    assert all(len(set(who)) == 1 for who in runs)
    assert {who[0] for who in runs} == {0, 1, 2}


def test_sample_granularity_gives_each_picture_its_own() -> None:
    pool = pool_of(*((member, 1) for member in THREE), granularity="sample")
    who = who_ran(pool(torch.ones(64, N, 5), GRID, seeded()))
    assert set(who) == {0, 1, 2}


def test_base_plus_one_runs_the_first_always_and_one_of_the_rest() -> None:
    pool = pool_of((KEEPS_SIGN, 1), (HALF, 1), (ALL, 1), (Nothing(), 1), composition="base_plus_one")
    runs = runs_of(pool, calls=900)
    assert -1 not in runs
    assert [runs.count(who) / 900 for who in range(3)] == pytest.approx([1 / 3] * 3, abs=0.05)


def test_chain_runs_members_in_their_order() -> None:
    clean = features(3)
    pool = pool_of((Gaussian(), 1), (FeatureDrop(), 1), composition="chain")
    generator = seeded()
    by_hand = FeatureDrop()(Gaussian()(clean, GRID, generator), GRID, generator)
    assert torch.equal(pool(clean, GRID, seeded()), by_hand)


def test_chain_runs_each_member_by_its_own_probability() -> None:
    pool = pool_of((KEEPS_SIGN, 0.8), (ALL, 0.25), composition="chain", granularity="sample")
    runs = runs_of(pool, calls=10, num=200)
    shares = [runs.count(who) / 2000 for who in (2, 0, -1)]
    assert shares == pytest.approx([0.25, 0.75 * 0.8, 0.75 * 0.2], abs=0.03)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_prob_is_how_often_the_pool_runs_at_all(granularity: str) -> None:
    pool = pool_of((ALL, 1), prob=0.3, granularity=granularity)
    runs = runs_of(pool, calls=1000, num=2)
    assert runs.count(2) / 2000 == pytest.approx(0.3, abs=0.05)
    together = [first == second for first, second in zip(runs[::2], runs[1::2], strict=True)]
    assert all(together) is (granularity == "batch")


def test_draws_come_in_the_documented_order() -> None:
    """Apply or not, then the choice, then the member's own draws."""
    clean, generator = features(2), seeded(3)
    pool = pool_of((Gaussian(), 1), (KEEPS_SIGN, 3), prob=0.9)
    assert float(torch.rand(1, generator=generator, dtype=torch.float64)) < 0.9
    weights = torch.tensor([1, 3], dtype=torch.float64)
    number = int(torch.multinomial(weights, 1, replacement=True, generator=generator))
    by_hand = (Gaussian(), KEEPS_SIGN)[number](clean, GRID, generator)
    assert torch.equal(pool(clean, GRID, seeded(3)), by_hand)


IDLE = (
    PoolConfig(),
    PoolConfig(composition="base_plus_one", granularity="sample"),
    pool_of((Gaussian(), 0), (FeatureDrop(), 0)),
    pool_of((Gaussian(), 1), prob=0),
    pool_of((Nothing(), 1)),
)


@pytest.mark.parametrize("pool", IDLE, ids=repr)
def test_pool_that_does_nothing_gives_the_same_tensor_and_draws_nothing(pool: PoolConfig) -> None:
    clean, generator = features(2), seeded()
    before = generator.get_state()
    assert pool(clean, GRID, generator) is clean
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("name", NAMED_POOLS)
def test_strength_zero_gives_the_same_tensor_and_draws_nothing(name: str) -> None:
    clean, generator = features(2), seeded()
    before = generator.get_state()
    assert NAMED_POOLS[name](clean, GRID, generator, strength=0) is clean
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("name", NAMED_POOLS)
def test_clean_target_is_untouched_and_a_seed_repeats(name: str, granularity: str) -> None:
    pool = NAMED_POOLS[name].model_copy(update={"granularity": granularity})
    clean = features(9)
    before = hashlib.sha256(clean.numpy().tobytes()).hexdigest()
    for seed in range(12):
        assert torch.equal(pool(clean, GRID, seeded(seed)), pool(clean, GRID, seeded(seed)))
    assert hashlib.sha256(clean.numpy().tobytes()).hexdigest() == before


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from((*ALONE, Nothing())), st.floats(0, 1)), max_size=4),
    st.sampled_from(["one", "chain", "base_plus_one"]),
    st.sampled_from(["batch", "sample"]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_any_pool_leaves_clean_input_and_invalid_tokens_untouched(
    members: list[tuple[MemberConfig, float]], composition: str, granularity: str, prob: float, seed: int
) -> None:
    pool = pool_of(*members, composition=composition, granularity=granularity, prob=prob)
    clean, valid = features(4, seed), torch.rand(4, N, generator=seeded(seed)) < 0.7
    before = clean.clone()
    disturbed = pool(clean, GRID, seeded(seed), valid=valid, guide=torch.rand(4, N, generator=seeded(seed)))
    assert torch.equal(clean, before)
    assert torch.equal(disturbed[~valid], clean[~valid])
    assert PoolConfig.model_validate_json(pool.model_dump_json()) == pool


def test_guide_and_valid_go_with_their_pictures() -> None:
    """With a draw a picture the members see some pictures only, and must see these pictures' own masks."""
    pool = pool_of((ALL, 1), (Nothing(), 1), granularity="sample")
    valid = torch.rand(40, N, generator=seeded(5)) < 0.5
    guide = (torch.rand(40, N, generator=seeded(6)) < 0.5).float()
    hidden = (pool(torch.ones(40, N, 2), GRID, seeded(), valid=valid) == 0).all(dim=2)
    for row, inside in zip(hidden, valid, strict=True):
        assert torch.equal(row, inside) or not bool(row.any())
    assert 5 < int(hidden.any(dim=1).sum()) < 35
    guided = (pool(torch.ones(40, N, 2), GRID, seeded(), guide=guide) == 0).all(dim=2)
    for row, weights in zip(guided, guide, strict=True):
        assert torch.equal(row, weights > 0) or not bool(row.any())


# As a config field


class Settings(BaseModel):
    """A method's settings as far as the pool goes."""

    pool: PoolConfig = NAMED_POOLS["gaussian"]


@pytest.mark.parametrize("name", NAMED_POOLS)
def test_named_pools_are_taken_by_name_and_survive_json(name: str) -> None:
    given_by_name = Settings.model_validate({"pool": name})
    assert given_by_name.pool == NAMED_POOLS[name]
    assert Settings.model_validate_json(given_by_name.model_dump_json()) == given_by_name
    assert Settings.model_validate(given_by_name.model_dump()) == given_by_name


def test_named_pools_are_the_specifications() -> None:
    kinds = {name: [m.perturbation.kind for m in pool.members] for name, pool in NAMED_POOLS.items()}
    jitter, rest = "gaussian", ["feature_noise", "feature_drop"]
    assert kinds == {
        "none": [],
        "gaussian": [jitter],
        "fpfnet": [jitter, *rest],
        "base_plus_one": [jitter, *rest, "nothing"],
    }
    for pool in NAMED_POOLS.values():
        assert {member.weight for member in pool.members} <= {1.0}
        assert (pool.granularity, pool.prob, pool.schedule(0), pool.schedule(1)) == ("batch", 1, 1, 1)
    assert NAMED_POOLS["fpfnet"].composition == "one"


def test_a_pool_is_given_by_its_fields() -> None:
    pool = PoolConfig.model_validate_json(
        '{"members": [{"perturbation": {"kind": "feature_drop", "rule": "ratio_abs"}, "weight": 2}],'
        ' "granularity": "sample", "schedule": {"kind": "linear", "start": 0.5}}'
    )
    assert pool.members == (Member(perturbation=FeatureDrop(rule="ratio_abs"), weight=2),)
    assert pool.schedule == Linear(start=0.5, end=1)


REFUSED: tuple[tuple[object, str], ...] = (
    ("gausian", "Did you mean 'gaussian'"),
    ({"members": [{"perturbation": {"kind": "jitter"}}]}, "feature_noise"),
    ({"members": [{"perturbation": {"kind": "gaussian", "alpha": 20}}]}, "alpha"),
    ({"members": [{"perturbation": {"kind": "gaussian"}, "weight": -1}]}, "weight"),
    ({"members": [{"perturbation": {"kind": "gaussian"}, "weight": float("nan")}]}, "weight"),
    ({"composition": "two"}, "base_plus_one"),
    ({"prob": 1.5}, "prob"),
    ({"colour": 1}, "colour"),
    (
        {"composition": "chain", "members": [{"perturbation": {"kind": "nothing"}, "weight": 2}]},
        "probability",
    ),
)


@pytest.mark.parametrize(("value", "word"), REFUSED, ids=lambda part: str(part)[:40])
def test_a_wrong_pool_is_refused_by_its_field(value: object, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Settings.model_validate({"pool": value})


def test_configs_are_frozen() -> None:
    for config, field in itertools.product(NAMED_POOLS.values(), ("members", "prob")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, field, None)
