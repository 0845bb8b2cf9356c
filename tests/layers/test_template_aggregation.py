"""The network of TFA-Net: its size, what it may see, and what follows from permuting that."""

from __future__ import annotations

import copy
import math
from typing import cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fettle.errors import ConfigError
from fettle.layers.positions import wave_positions
from fettle.layers.template_aggregation import AggregationConfig, TemplateAggregation, Tokens
from fettle.layers.template_maps import adoption_maps
from fettle.layers.vit_block import SelfAttention, ViTBlock, seen_by_all

CHANNELS, GRID, N = 24, (8, 8), 64
TINY = {
    **{"patch": 2, "width": 32, "heads": 4, "depth": 3},
    **{"rebuild_width": 16, "rebuild_heads": 4, "rebuild_depth": 2, "cls_token": True},
}
PAPER = {
    **{"patch": 4, "width": 768, "heads": 12, "depth": 12},
    **{"rebuild_width": 512, "rebuild_heads": 16, "rebuild_depth": 8, "cls_token": True},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(**settings: object) -> TemplateAggregation:
    """The specification's tiny net, with CLS unless told otherwise."""
    net = TemplateAggregation(CHANNELS, GRID, AggregationConfig.model_validate({**TINY, **settings}))
    net.initialise(seeded())
    return net.eval()


def features(number: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(number, CHANNELS, 16, 16, generator=seeded(seed))


def all_of(values: Tensor) -> Tokens:
    return Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool))


def embedded(net: TemplateAggregation, number: int = 2) -> tuple[Tokens, Tokens]:
    """Tokens of inputs, and those of one template for all of them."""
    seen, template = net.embed(features(number)), net.embed(features(1, seed=2))
    return all_of(seen), all_of(template.expand(number, -1, -1))


def shuffled(seed: int = 3) -> Tensor:
    return torch.randperm(N, generator=seeded(seed))


def cells_of(order: Tensor, fused: Tensor) -> Tensor:
    """Features whose 2 x 2 patches are those of `fused` in another order."""
    cells = fused.unflatten(3, (8, 2)).unflatten(2, (8, 2)).transpose(3, 4).flatten(2, 3)  # (B, C, N, 2, 2)
    moved = cells[:, :, order].unflatten(2, GRID).transpose(3, 4)
    return moved.flatten(4, 5).flatten(2, 3)


def near(one: Tensor, other: Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=within, rtol=0)


def far_apart(one: Tensor, other: Tensor, least: float) -> bool:
    return float((one - other).detach().abs().max()) > least


def num_trained(channels: int, settings: dict[str, object]) -> int:
    config = AggregationConfig.model_validate(settings)
    grid = (64 // config.patch, 64 // config.patch)
    with torch.device("meta"):
        net = TemplateAggregation(channels, grid, config)
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


# --- size


@pytest.mark.parametrize(
    ("channels", "settings", "expected"),
    [
        (1856, {}, 148_711_936),
        (1856, {"positions": "learned"}, 149_040_896),
        (1856, {"cls_token": False}, 148_711_168),
        (1856, {"mask_mode": "token"}, 148_712_704),
        (1856, {"patch": 1}, 113_048_896),
        (1856, {"patch": 2}, 120_181_504),
        (1856, {"patch": 8}, 262_833_664),
        (960, {}, 130_347_520),
        (448, {}, 119_853_568),
        (512, {}, 121_165_312),
    ],
    ids=str,
)
def test_parameters_of_the_paper_preset_and_its_variants(
    channels: int, settings: dict[str, object], expected: int
) -> None:
    assert num_trained(channels, {**PAPER, **settings}) == expected


def test_parameters_of_compact() -> None:
    assert num_trained(448, {}) == 1_667_328


@pytest.mark.parametrize("cls_token", [False, True])
def test_parameters_are_the_formulas(cls_token: bool) -> None:
    c, k, d, depth, inner, inner_depth = CHANNELS, 2, 32, 3, 16, 2
    expected = (
        (k * k * c * d + d)
        + cls_token * d
        + depth * (12 * d * d + 13 * d)
        + 2 * d
        + (d * inner + inner)
        + inner_depth * (12 * inner * inner + 13 * inner)
        + 2 * inner
        + (inner + 1) * k * k * c
    )
    assert num_trained(c, {**TINY, "cls_token": cls_token}) == expected


def test_fixed_positions_are_no_part_of_the_state() -> None:
    assert not any("position" in name for name in tiny().state_dict())


def test_heads_that_do_not_divide_the_width_are_told() -> None:
    with pytest.raises(ValidationError, match="3 heads do not divide a width of 16"):
        AggregationConfig.model_validate({**TINY, "rebuild_heads": 3})


# --- positions


def paper_waves() -> Tensor:
    return wave_positions((16, 16), 768, torch.device("cpu"))


def test_the_first_place_is_all_sines_nought_then_all_cosines_one() -> None:
    half = [0.0] * 192 + [1.0] * 192
    assert paper_waves()[0].tolist() == half + half


def test_the_first_half_tells_the_column_and_the_second_the_row() -> None:
    waves, first = paper_waves(), torch.tensor([0.841471, 0.815251, 0.788593])
    near(waves[1, :3], first, 1e-6)
    near(waves[16, 384:387], first, 1e-6)
    assert torch.equal(waves[1, 384:], waves[0, 384:]) and torch.equal(waves[16, :384], waves[0, :384])


def test_every_place_has_the_same_length() -> None:
    near(paper_waves().norm(dim=1), torch.full((256,), 19.595918), 1e-4)


def test_input_and_template_have_the_same_positions() -> None:
    net = tiny()
    nn.init.zeros_(net.embedding.weight)
    placed = net.embed(features())
    expected = net.embedding.bias + wave_positions(GRID, 32, torch.device("cpu"))
    assert torch.equal(placed[0], expected) and torch.equal(placed[0], placed[1])


def test_learned_positions_begin_as_the_waves() -> None:
    fixed, learned = tiny(), tiny(positions="learned")
    assert torch.equal(fixed(*embedded(fixed), GRID), learned(*embedded(learned), GRID))
    assert fixed.positions.table is None and isinstance(learned.positions.table, nn.Parameter)


def test_learned_positions_refuse_another_grid_and_waves_do_not() -> None:
    wide = torch.cat([features(), features(seed=5)], dim=3)
    assert tiny().embed(wide).shape == (2, 128, 32)
    with pytest.raises(ConfigError, match="grid of 64 tokens, not 128"):
        tiny(positions="learned").embed(wide)


# --- hiding tokens of the input


def test_keeping_every_token_in_its_order_is_no_masking() -> None:
    net = tiny()
    seen, template = embedded(net)
    every = torch.arange(N).expand(2, -1)
    kept = seen.chosen(every, torch.ones(2, N, dtype=torch.bool))
    assert torch.equal(net(kept, template, GRID), net(seen, template, GRID))


def test_a_mask_over_keys_is_the_same_as_dropping_them() -> None:
    net = tiny()
    seen, template = embedded(net)
    rows = torch.stack([shuffled(4)[:40], shuffled(5)[:40]])
    dropped = seen.chosen(rows, torch.ones(2, 40, dtype=torch.bool))
    masked = Tokens(seen.values, torch.zeros(2, N, dtype=torch.bool).scatter(1, rows, True))
    near(net(dropped, template, GRID), net(masked, template, GRID))


def test_rows_that_fill_up_a_shorter_picture_count_for_nothing() -> None:
    net = tiny()
    seen, template = embedded(net)
    rows = torch.stack([shuffled(4)[:40], shuffled(5)[:40]])
    counts = torch.arange(40).expand(2, -1) < torch.tensor([[40], [10]])
    together = net(seen.chosen(rows, counts), template, GRID)
    alone = Tokens(seen.values[1:, rows[1, :10]], torch.ones(1, 10, dtype=torch.bool))
    near(together[1:], net(alone, Tokens(template.values[:1], template.valid[:1]), GRID))


def test_hidden_tokens_become_one_token_at_their_own_places() -> None:
    net = tiny(mask_mode="token")
    hidden = torch.zeros(2, N, dtype=torch.bool)
    hidden[0, [3, 9]] = True
    clean, masked = net.embed(features()), net.embed(features(), hidden)
    waves = wave_positions(GRID, 32, torch.device("cpu"))
    assert torch.equal(masked[~hidden], clean[~hidden])
    assert torch.equal(masked[0, [3, 9]], cast(Tensor, net.mask_token) + waves[[3, 9]])


# --- permutations


def test_the_order_of_placed_input_tokens_does_not_matter() -> None:
    net = tiny()
    seen, template = embedded(net)
    moved = all_of(seen.values[:, shuffled()])
    near(net(moved, template, GRID), net(seen, template, GRID))


def test_where_the_inputs_patches_lie_matters() -> None:
    net = tiny()
    seen, template = embedded(net)
    moved = all_of(net.embed(cells_of(shuffled(), features())))
    assert far_apart(net(moved, template, GRID), net(seen, template, GRID), 1e-3)


def test_where_the_templates_patches_lie_matters_more() -> None:
    net = tiny()
    seen, template = embedded(net)
    moved = all_of(net.embed(cells_of(shuffled(), features(1, seed=2))).expand(2, -1, -1))
    assert far_apart(net(seen, moved, GRID), net(seen, template, GRID), 0.5)


def test_template_tokens_permuted_with_the_inner_positions_permute_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, order = tiny(), shuffled()
    seen, template = embedded(net)
    expected = net(seen, template, GRID)[:, order]
    inner = wave_positions(GRID, 16, torch.device("cpu"))[order]
    monkeypatch.setattr(net.inner_positions, "forward", lambda tokens, grid: tokens + inner)
    near(net(seen, all_of(template.values[:, order]), GRID), expected)


def test_without_input_tokens_the_output_knows_nothing_of_the_input() -> None:
    net = tiny()
    seen, template = embedded(net)
    nothing = Tokens(seen.values[:, :0], seen.valid[:, :0])
    one, other = net(nothing, template, GRID)
    assert torch.equal(one, other) and not torch.equal(*net(seen, template, GRID))


def test_the_only_road_leads_through_attention_on_input_tokens() -> None:
    net = tiny()
    seen, template = embedded(net)
    unseen = Tokens(seen.values, torch.zeros_like(seen.valid))
    assert torch.equal(*net(unseen, template, GRID))


def test_an_input_equal_to_the_template_goes_through_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny()
    same = all_of(net.embed(features(1)))
    entered: list[Tensor] = []
    last = cast(ViTBlock, net.aggregation[-1])
    monkeypatch.setattr(last, "forward", lambda x, mask, asked: entered.append(x) or x[:, -asked:])
    net(same, same, GRID)
    whole = ViTBlock(32, 4, 1e-5)
    whole.load_state_dict(last.state_dict())
    left = net.aggregation_norm(whole(entered[0], torch.ones(1, 1, 1, 2 * N + 1, dtype=torch.bool)))
    near(left[:, :N], left[:, -N:])


# --- exactness


def test_a_picture_alone_or_in_a_batch() -> None:
    net = tiny()
    seen, template = embedded(net, 5)
    together = net(seen, template, GRID)
    for i in range(5):
        alone = [Tokens(part.values[i : i + 1], part.valid[i : i + 1]) for part in (seen, template)]
        near(net(*alone, GRID), together[i : i + 1])


@pytest.mark.parametrize("num_asked", [1, N, 2 * N])
def test_skipping_queries_of_the_last_block_leaves_its_answers(num_asked: int) -> None:
    block = cast(ViTBlock, tiny().aggregation[-1])
    x = torch.randn(2, 2 * N + 1, 32, generator=seeded(7))
    valid = torch.rand(2, 2 * N + 1, generator=seeded(8)) < 0.8
    mask = seen_by_all(valid)
    near(block(x, mask, num_asked), block(x, mask)[:, -num_asked:])


def test_the_network_is_that_of_plain_blocks() -> None:
    """Nothing skipped, the published order of the sequence, and torch's own layers."""
    net = tiny()
    seen, template = embedded(net)
    everywhere = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    cls = cast(Tensor, net.cls_token).expand(2, 1, -1)
    x = torch.cat([cls, seen.values, template.values], dim=1)
    for block in net.aggregation:
        x = block(x, everywhere)
    x = net.narrow(net.aggregation_norm(torch.cat([x[:, :1], x[:, -N:]], dim=1)))
    x = torch.cat([x[:, :1], x[:, 1:] + wave_positions(GRID, 16, torch.device("cpu"))], dim=1)
    for block in net.rebuilding:
        x = block(x, everywhere)
    near(net(seen, template, GRID), net.project_out(net.rebuilding_norm(x))[:, 1:])


def test_rectangular_grids_are_as_good() -> None:
    net, wide = tiny(), features(2)[:, :, :8]
    assert net.grid_of(wide) == (4, 8)
    tokens = all_of(net.embed(wide))
    assert net(tokens, tokens, (4, 8)).shape == (2, 32, 4 * CHANNELS)


# --- switches


def test_in_cross_only_template_tokens_ask() -> None:
    """Input tokens stay as they are: later blocks see them unchanged."""
    net = tiny(aggregation="cross")
    seen, template = embedded(net)
    entered: list[Tensor] = []
    for block in net.aggregation:
        block.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    net(seen, template, GRID)
    assert len(entered) == 3 and all(torch.equal(x[:, :N], seen.values) for x in entered)


def test_cross_is_not_joint() -> None:
    net = tiny()
    crossed = tiny(aggregation="cross")
    crossed.load_state_dict(net.state_dict())
    assert far_apart(net(*embedded(net), GRID), crossed(*embedded(net), GRID), 1e-2)


CONVOLVING = {"aggregation": "convolution", "cls_token": False}


def test_convolution_takes_from_nearby_places_alone() -> None:
    """Of two blocks, the template's token sees the input no further than two places away."""
    net = tiny(**CONVOLVING, depth=2)
    seen, template = embedded(net, 1)
    changed = seen.values.clone()
    changed[:, 3 * 8 + 3] += 1  # row 3, column 3
    moved = (
        (net._convolved(Tokens(changed, seen.valid), template, GRID).values
         - net._convolved(seen, template, GRID).values).abs().sum(dim=2)[0] > 1e-9
    ).reshape(GRID)  # fmt: skip
    near = torch.zeros(GRID, dtype=torch.bool)
    near[1:6, 1:6] = True
    assert torch.equal(moved, near)


def test_what_is_not_valid_is_not_convolved() -> None:
    net = tiny(**CONVOLVING)
    seen, template = embedded(net, 1)
    valid = seen.valid.clone()
    valid[:, 20:24] = False
    other = torch.where(valid[:, :, None], seen.values, 7.0)
    assert torch.equal(
        net(Tokens(seen.values, valid), template, GRID), net(Tokens(other, valid), template, GRID)
    )


@pytest.mark.parametrize("settings", [{"cls_token": True}, {"discard": "keep_input"}])
def test_convolution_refuses_what_it_has_no_place_for(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="convolution"):
        AggregationConfig.model_validate({**TINY, **CONVOLVING, **settings})


def test_keep_input_rebuilds_from_the_inputs_tokens() -> None:
    net = tiny(discard="keep_input", depth=1)
    seen, template = embedded(net)
    nothing = Tokens(template.values[:, :0], template.valid[:, :0])
    swapped = tiny(depth=1)
    near(net(seen, template, GRID), swapped(template, seen, GRID))
    assert far_apart(net(seen, nothing, GRID), net(seen, template, GRID), 1e-2)


def test_no_template_never_sees_one() -> None:
    net = tiny(discard="no_template")
    seen, template = embedded(net)
    assert torch.equal(net(seen, None, GRID), net(seen, template, GRID))


def test_the_cls_token_changes_the_output() -> None:
    with_cls, without = tiny(), tiny(cls_token=False)
    assert without.cls_token is None
    without.load_state_dict({n: t for n, t in with_cls.state_dict().items() if n != "cls_token"})
    seen, template = embedded(with_cls)
    found = [net(seen, template, GRID) for net in (with_cls, without)]
    assert found[0].shape == found[1].shape == (2, N, 96) and far_apart(found[0], found[1], 1e-3)


# --- how it starts


def test_weights_start_as_published() -> None:
    net = tiny()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))  # a qkv is one matrix
            largest = float(module.weight.detach().abs().max())
            assert 0.95 * bound < largest <= bound and not bool(module.bias.any())
        if isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all()) and not bool(module.bias.any()) and module.eps == 1e-5
    flat = net.embedding.weight.detach().flatten(1)
    assert 0.95 < float(flat.abs().max()) / math.sqrt(6 / sum(flat.shape)) <= 1
    bias = cast(Tensor, net.embedding.bias).detach().abs()
    assert float(bias.min()) > 0 and float(bias.max()) <= flat.shape[1] ** -0.5


def test_tokens_of_no_place_start_small() -> None:
    config = AggregationConfig(patch=1, width=2048, depth=1, cls_token=True, mask_mode="token")
    net = TemplateAggregation(1, (1, 1), config)
    net.initialise(seeded())
    for token in (net.cls_token, net.mask_token):
        assert float(cast(Tensor, token).detach().std()) == pytest.approx(0.02, rel=0.1)


def test_a_seed_repeats_the_weights_and_another_does_not() -> None:
    one, same, other = tiny(), tiny(), tiny()
    other.initialise(seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


# --- adoption


def attention_of(net: TemplateAggregation) -> tuple[Tensor, Tokens, Tokens]:
    seen, template = embedded(net)
    with torch.no_grad():
        return torch.stack(list(net.attention(seen, template))).mean(dim=0), seen, template


def test_uniform_attention_adopts_everything_alike() -> None:
    net = tiny()
    for part in net.modules():
        if isinstance(part, SelfAttention):
            nn.init.zeros_(part.qkv.weight)
            nn.init.zeros_(part.qkv.bias)
    attention, seen, template = attention_of(net)
    maps = adoption_maps(attention, seen.valid, template.valid, has_cls=True)
    near(2 * maps["adoption"], torch.ones(2, N), 1e-6)
    near(maps["taken"], torch.full((2, N), 64 / 129), 1e-6)
    near(maps["adoption_peak"], torch.ones(2, N), 1e-6)


def test_adoption_at_the_start_is_about_one() -> None:
    attention, seen, template = attention_of(tiny())
    adoption = 2 * adoption_maps(attention, seen.valid, template.valid, has_cls=True)["adoption"]
    assert 0.8 < float(adoption.min()) < float(adoption.max()) < 1.25


@pytest.mark.parametrize("aggregation", ["joint", "cross"])
def test_attention_is_what_each_block_really_does(aggregation: str) -> None:
    """Rows of template tokens, columns of input tokens, of a block's own input."""
    net = tiny(aggregation=aggregation)
    seen, template = embedded(net)
    entered: list[Tensor] = []
    for block in net.aggregation:
        block.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        net(seen, template, GRID)
        told = list(copy.deepcopy(net).attention(seen, template))
        for x, block, weights in zip(entered[:3], net.aggregation, told, strict=True):
            own = cast(ViTBlock, block)
            everywhere = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            whole = own.attention.weights(own.norm1(x), everywhere)
            near(weights, whole[:, -N:, :N], 1e-6)
