"""UniAD: the network's sizes and start, that nothing copies its input, and the method around it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import cast, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call

from conftest import TINY_LEVELS, textured
from fettle.backbones import load_backbone, registry
from fettle.errors import ConfigError, DataError
from fettle.layers.attention import MultiHeadAttention, neighbour_mask
from fettle.layers.token_grid import aligned_to, enlarged, pooled_maximum
from fettle.methods.registry import find_method, make_config
from fettle.methods.uniad import (
    DecoderLayer,
    Fusion,
    Reconstruction,
    Uniad,
    UniadConfig,
    mean_squared_error,
    plain_norm,
)
from fettle.model_parts import learnt_tensors, load_learnt
from fettle.protocols import BackboneSpec, Batch, FeatureBatch, Level, Run, Step, Trained
from fettle.training import learning_rate

MODES = cast("tuple[Fusion, ...]", get_args(Fusion))
FORBIDDEN = ("output + memory", "same depth at the output", "query stream", "input residual")
PAPER = cast(UniadConfig, Uniad.presets["paper"].config)
each_mode = pytest.mark.parametrize("mode", MODES)


def make_head(
    config: UniadConfig | None = None,
    *,
    channels: int = 24,
    grid: tuple[int, int] = (10, 10),
    seed: int = 0,
    **settings: object,
) -> Reconstruction:
    """A small head with seeded weights, in eval mode; or one of another configuration."""
    small = {"width": 32, "heads": 4, "ffn": 64, **settings}
    config = config or UniadConfig.model_validate(small)
    head = Reconstruction(channels, grid, config)
    head.initialise(torch.Generator().manual_seed(seed))
    return head.eval()


def with_mode(config: UniadConfig, mode: Fusion) -> UniadConfig:
    return config.model_copy(update={"fusion": mode})


def random_tokens(head: Reconstruction, count: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    height, width = head.grid
    return torch.randn(count, height * width, head.project_in.in_features, generator=generator)


def all_valid(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def rebuild(head: Reconstruction, tokens: Tensor) -> Tensor:
    rebuilt: Tensor = head(tokens, all_valid(tokens))
    return rebuilt


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- sizes and start


@each_mode
def test_parameters_of_the_paper_are_the_same_in_every_mode(mode: Fusion) -> None:
    with torch.device("meta"):
        assert count(Reconstruction(272, (14, 14), with_mode(PAPER, mode))) == 7_717_392


@pytest.mark.parametrize(
    ("preset", "channels", "expected"),
    [("paper", 272, 7_779_344), ("paper", 448, 7_869_632), ("compact", 448, 1_108_800)],
)
def test_parameters_on_a_grid_of_16(preset: str, channels: int, expected: int) -> None:
    config = cast(UniadConfig, Uniad.presets[preset].config)
    with torch.device("meta"):
        assert count(Reconstruction(channels, (16, 16), config)) == expected


def test_parameters_of_each_block() -> None:
    with torch.device("meta"):
        head = Reconstruction(272, (14, 14), PAPER)
    layer = head.decoder[0]
    assert isinstance(layer, DecoderLayer)
    expected = {
        head.project_in: 69_888,
        head.project_out: 69_904,
        head.positions: 3_584,
        layer.read_memory: 263_168,
        layer.feed_forward: 525_568,
        head.encoder[0]: 789_760,
        layer: 1_103_616,
        head.norm: 512,
    }
    assert {module: count(module) for module in expected} == expected


def test_initialisation_is_that_of_the_paper() -> None:
    head = make_head(PAPER, channels=272, grid=(14, 14))
    for module in head.modules():
        if isinstance(module, MultiHeadAttention):
            assert 0.0760 < float(module.in_proj_weight.detach().abs().max()) < 0.07655
            assert not module.in_proj_bias.detach().any()
        elif isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.99 * bound < float(module.weight.detach().abs().max()) <= bound
            assert not module.bias.detach().any()
        elif isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all()) and not module.bias.detach().any()
        elif isinstance(module, DecoderLayer):
            assert float(module.queries.detach().std()) == pytest.approx(1, abs=0.01)
    positions = head.positions().detach()
    assert float(positions.min()) >= 0 and float(positions.max()) < 1


def test_layers_are_drawn_independently() -> None:
    head = make_head()
    first, second = cast("list[DecoderLayer]", list(head.decoder))
    assert not torch.equal(first.queries, second.queries)
    assert not torch.equal(first.read_memory.in_proj_weight, second.read_memory.in_proj_weight)


@each_mode
def test_rebuilt_features_ignore_batch_mates(mode: Fusion) -> None:
    head = make_head(fusion=mode)
    tokens = random_tokens(head, 3)
    tokens[1] *= 100
    together = rebuild(head, tokens)
    for i in range(3):
        torch.testing.assert_close(rebuild(head, tokens[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)


def test_modes_differ() -> None:
    heads = [make_head(fusion=mode) for mode in MODES]
    outputs = [rebuild(head, random_tokens(head)) for head in heads]
    for (i, one), (j, other) in product(enumerate(outputs), repeat=2):
        assert i == j or not torch.allclose(one, other)


@pytest.mark.parametrize("wrong", ["output", "query", "input_residual", "encoder-decoder"])
def test_wiring_that_copies_its_input_is_refused_by_type(wrong: str) -> None:
    with pytest.raises(ValidationError, match="'encoder_input', 'decoder', 'encoder_decoder', 'skip'"):
        UniadConfig.model_validate({"fusion": wrong})
    with pytest.raises(ConfigError, match=f"Field 'fusion' of method 'uniad' cannot be '{wrong}'"):
        make_config(find_method("uniad"), "compact", {"fusion": wrong})


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValidationError, match="3 heads do not divide a width of 128"):
        UniadConfig(heads=3)


# --- the shortcut


def forbidden(head: Reconstruction, tokens: Tensor, wiring: str) -> Tensor:
    """The head's forward pass with a wiring that carries encoder tokens past the mask."""
    mask = neighbour_mask(head.grid, head.window, tokens.device)
    position = head.positions()
    encoded = [head.project_in(tokens)]
    for layer in head.encoder:
        encoded.append(layer(encoded[-1], position, mask))
    memory = encoded[-1]
    decoded: list[Tensor] = []
    for number, layer in enumerate(head.decoder, 1):
        partner = encoded[len(head.encoder) + 1 - number]
        previous = decoded[-1] if decoded else memory
        start = cast(DecoderLayer, layer).queries
        if wiring == "query stream":
            start = start + plain_norm(partner)
        decoded.append(functional_call(layer, {"queries": start}, (previous, memory, position, mask)))
    output = decoded[-1]
    if wiring == "output + memory":
        output = plain_norm(output + memory)
    elif wiring == "same depth at the output":
        pairs = zip(decoded, reversed(encoded), strict=False)
        output = plain_norm(torch.stack([d + e for d, e in pairs]).sum(dim=0))
    output = head.norm(output)
    if wiring == "input residual":
        output = output + encoded[0]
    return cast(Tensor, head.project_out(output))


def silence(attentions: Sequence[MultiHeadAttention]) -> None:
    for attention in attentions:
        nn.init.zeros_(attention.out_proj.weight)
        nn.init.zeros_(attention.out_proj.bias)


def unmask(attention: MultiHeadAttention) -> None:
    masked = attention.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return masked(query, key, value, torch.ones_like(mask))

    attention.forward = forward  # type: ignore[method-assign]  # the fault that the test must see


def one_step_head(form: str, grid: tuple[int, int], **settings: object) -> Reconstruction:
    """A head in which inputs reach outputs by one attention step of the decoder, if at all (9.4)."""
    layers = {"A": 2, "B": 1, "C": 2}[form]
    head = make_head(grid=grid, window=7, decoder_layers=layers, **settings)
    silence([layer.attention for layer in head.encoder])  # type: ignore[misc]  # ModuleList forgets the type
    decoder = cast("list[DecoderLayer]", list(head.decoder))
    if form == "A":
        silence([layer.read_previous for layer in decoder])
    else:
        silence([layer.read_memory for layer in decoder])
        silence([layer.read_previous for layer in decoder[:-1]])
    return head


def gradients(forward: Callable[[Tensor], Tensor], tokens: Tensor, token: int) -> Tensor:
    """|d (v . r_token) / d f|, the largest over channels of each input token: (N,)."""
    leaf = tokens.clone().requires_grad_(True)
    probe = torch.randn(tokens.shape[2], generator=torch.Generator().manual_seed(9))
    (gradient,) = torch.autograd.grad(forward(leaf)[0, token] @ probe, leaf)
    return gradient[0].abs().amax(dim=1)


def inside_and_outside(
    head: Reconstruction, forward: Callable[[Tensor], Tensor] | None = None
) -> tuple[float, float]:
    """Largest gradients of a corner and an inner output on tokens in and beyond their window."""
    tokens = random_tokens(head)
    allowed = neighbour_mask(head.grid, head.window, tokens.device)
    inside = outside = 0.0
    for token in (0, head.grid[1] * (head.grid[0] // 2) + head.grid[1] // 2):
        found = gradients(forward or (lambda x: rebuild(head, x)), tokens, token)
        inside = max(inside, float(found[~allowed[token]].max()))
        outside = max(outside, float(found[allowed[token]].max()))
    return inside, outside


GRIDS = pytest.mark.parametrize("grid", [(10, 10), (10, 8)])
FORMS = [("A", mode) for mode in MODES] + [("B", "none"), ("C", "skip"), ("C", "full")]


@GRIDS
@pytest.mark.parametrize(("form", "mode"), FORMS)
def test_output_never_sees_its_own_window(form: str, mode: Fusion, grid: tuple[int, int]) -> None:
    inside, outside = inside_and_outside(one_step_head(form, grid, fusion=mode))
    assert inside == 0.0
    assert outside > 1e-3


@GRIDS
@pytest.mark.parametrize("wiring", FORBIDDEN)
def test_forbidden_wiring_is_seen(wiring: str, grid: tuple[int, int]) -> None:
    head = one_step_head("A", grid)
    inside, _ = inside_and_outside(head, lambda tokens: forbidden(head, tokens, wiring))
    assert inside > 1e-2


@pytest.mark.parametrize(("form", "mode"), [("A", "none"), ("B", "none"), ("C", "skip"), ("C", "full")])
def test_missing_decoder_mask_is_seen(form: str, mode: Fusion) -> None:
    head = one_step_head(form, (10, 10), fusion=mode)
    for layer in cast("list[DecoderLayer]", list(head.decoder)):
        unmask(layer.read_memory if form == "A" else layer.read_previous)
    inside, _ = inside_and_outside(head)
    assert inside > 1e-2


def test_encoder_mask_alone_guards_nothing() -> None:
    inside, outside = inside_and_outside(one_step_head("A", (10, 10), mask_encoder=False))
    assert inside == 0.0 and outside > 1e-3


def own_share(forward: Callable[[Tensor], Tensor], tokens: Tensor, of: Sequence[int]) -> Tensor:
    """S_ii (9.3) of some tokens of one picture (1, N, C), each in a copy of the picture: (len(of),)."""
    copies = tokens.expand(len(of), -1, -1).clone().requires_grad_(True)
    probe = torch.randn(tokens.shape[2], generator=torch.Generator().manual_seed(9))
    rows = torch.arange(len(of))
    (gradient,) = torch.autograd.grad((forward(copies)[rows, torch.tensor(of)] @ probe).sum(), copies)
    energy = gradient.square().sum(dim=2)  # (len(of), N)
    return energy[rows, torch.tensor(of)] / energy.sum(dim=1)


CORNERS_AND_INNER = (0, 13, 182, 195, 45, 60, 90, 105, 120, 150)  # of 14 x 14


@each_mode
def test_own_token_share_is_small_at_the_start(mode: Fusion) -> None:
    head = make_head(grid=(14, 14), width=64, channels=64, encoder_layers=4, decoder_layers=4, fusion=mode)
    share = own_share(lambda x: rebuild(head, x), random_tokens(head), CORNERS_AND_INNER)
    assert float(share.max()) < 0.02


@pytest.mark.parametrize("wiring", FORBIDDEN)
def test_own_token_share_of_a_forbidden_wiring_is_large(wiring: str) -> None:
    head = make_head(grid=(14, 14), width=64, channels=64, encoder_layers=4, decoder_layers=4)
    share = own_share(lambda x: forbidden(head, x, wiring), random_tokens(head), CORNERS_AND_INNER)
    assert float(share.mean()) > 0.9


# --- the method


class FixedFeatures(nn.Module):
    """A backbone of one level at stride 16 whose features are chosen: (1, C, h, w) for any picture."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", features)
        levels = (Level("stride16", features.shape[1], 16),)
        self.spec = BackboneSpec("fixed", "random", "", "", levels, 16, (0,) * 3, (1,) * 3)  # type: ignore[arg-type]

    def forward(self, pictures: Tensor, levels: Sequence[str]) -> dict[str, Tensor]:
        return {"stride16": self.get_buffer("fixed").expand(len(pictures), -1, -1, -1)}


class Stream:
    def __init__(self, batches: Sequence[FeatureBatch]) -> None:
        self.batches = batches
        self.num_pictures = sum(len(batch.keys) for batch in batches)

    def __iter__(self) -> Iterator[FeatureBatch]:
        return iter(self.batches)


TINY = {"width": 16, "heads": 2, "ffn": 32, "encoder_layers": 1, "decoder_layers": 2, "window": 3}


def unfitted(name: str = "uniad", **settings: object) -> Uniad:
    """A tiny method on the tiny backbone."""
    method_class = cast("type[Uniad]", find_method(name))
    config = cast(UniadConfig, make_config(method_class, "compact", {**TINY, **settings}))
    levels = method_class.choose_levels(TINY_LEVELS, config)
    method = method_class(load_backbone("tiny", levels, weights="random"), config, levels)
    return method.eval()


def good_pictures(count: int = 6, height: int = 64, width: int = 96) -> Tensor:
    """(count, 3, height, width) in 0..1."""
    pixels = [torch.from_numpy(textured(i, height, width)) for i in range(count)]
    return torch.stack(pixels).permute(0, 3, 1, 2).float().contiguous() / 255


def whole(pictures: Tensor) -> Tensor:
    return torch.ones(len(pictures), 1, *pictures.shape[-2:], dtype=torch.bool)


def stream_of(method: Uniad, pictures: Tensor, valid: Tensor | None = None, size: int = 4) -> Stream:
    valid = whole(pictures) if valid is None else valid
    batches = []
    for first in range(0, len(pictures), size):
        part = slice(first, first + size)
        keys = tuple(str(first + i) for i in range(len(pictures[part])))
        features = method.features(pictures[part], valid[part])
        batches.append(FeatureBatch(features, valid[part], keys, keys))
    return Stream(batches)


def prepared(name: str = "uniad", seed: int = 0, pictures: Tensor | None = None, **settings: object) -> Uniad:
    method = unfitted(name, **settings)
    method.prepare(stream_of(method, good_pictures() if pictures is None else pictures), Run(seed=seed))
    return method


def batch_of(method: Uniad, pictures: Tensor, valid: Tensor | None = None) -> Batch:
    valid = whole(pictures) if valid is None else valid
    return Batch(method.features(pictures, valid), valid)


def train(method: Uniad, batch: Batch, steps: int, lr: float = 1e-3) -> list[float]:
    """The losses of a plain training."""
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=lr)
    values = []
    method.train()
    for number in range(steps):
        step = Step(number, steps)
        torch.manual_seed(step.stream_seed("torch"))
        (loss,) = method.losses(batch, step)
        optimiser.zero_grad()
        loss.value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
        values.append(float(loss.value.detach()))
    method.eval()
    return values


def held_out(method: Uniad, batch: Batch) -> float:
    """The normalised loss."""
    with torch.no_grad():
        loss = method.held_out_loss(batch)
    return float(loss.value) / loss.baseline


def test_method_is_a_trained_one() -> None:
    method = unfitted()
    assert isinstance(method, Trained)
    assert method.traits.trained and method.traits.multi_class and method.traits.fixed_grid


@pytest.mark.parametrize(
    ("backbone", "names", "channels"),
    [
        ("tf_efficientnet_lite2", ["stride2", "stride4", "stride8", "stride16"], 208),
        ("tf_efficientnet_b4", ["stride2", "stride4", "stride8", "stride16"], 272),
        ("resnet18", ["stride4", "stride8", "stride16"], 448),
        ("vit_small_patch14", ["block3", "block6", "block9"], 3 * 384),
    ],
)
def test_levels_of_known_backbones(backbone: str, names: list[str], channels: int) -> None:
    offered = registry.find_entry(backbone).levels
    chosen = Uniad.choose_levels(offered, UniadConfig())
    assert list(chosen) == names
    assert sum(level.channels for level in offered if level.name in chosen) == channels


def test_levels_asked_for_are_taken() -> None:
    assert Uniad.choose_levels(TINY_LEVELS, UniadConfig(levels=("stride8",))) == ("stride8",)


@pytest.mark.parametrize("align", ["mean", "corners"])
def test_features_are_levels_side_by_side_at_stride_16(align: str) -> None:
    method = unfitted(align=align)
    pictures = good_pictures(2)
    tokens = method.features(pictures, whole(pictures))["tokens"]
    assert tokens.shape == (2, 36, 4, 6)
    levels = method.backbone(pictures, method.levels)
    torch.testing.assert_close(tokens[:, 20:], levels["stride16"])
    corner = (
        levels["stride4"][..., 0, 0] if align == "corners" else levels["stride4"][..., :4, :4].mean((2, 3))
    )
    torch.testing.assert_close(tokens[:, :8, 0, 0], corner)


def test_coarser_level_is_spread_over_the_grid() -> None:
    level = torch.arange(4.0).view(1, 1, 2, 2)
    assert aligned_to(level, (4, 4), "corners")[0, 0, 0, 3] == 1
    assert aligned_to(level, (4, 4), "mean")[0, 0, 3, 0] == 2


def test_window_is_one_number_or_two() -> None:
    assert UniadConfig.model_validate({"window": 5}).window == (5, 5)
    assert UniadConfig.model_validate({"window": [3, 7]}).window == (3, 7)
    with pytest.raises(ValidationError):
        UniadConfig.model_validate({"window": 0})


def test_configuration_survives_json() -> None:
    for preset in Uniad.presets.values():
        text = preset.config.model_dump_json()
        assert UniadConfig.model_validate_json(text) == preset.config


def test_level_scale_brings_every_level_to_mean_square_one() -> None:
    method = unfitted()
    stream = stream_of(method, good_pictures())
    record = method.prepare(stream, Run())
    tokens = torch.cat([batch.features["tokens"] for batch in stream]) * method.channel_scale[:, None, None]
    for level in tokens.split([8, 12, 16], dim=1):
        assert float(level.square().mean()) == pytest.approx(1, rel=1e-4)
    spread = float((tokens - tokens.mean(dim=0)).square().mean())
    assert record.facts["mean_feature_mse"] == pytest.approx(spread, rel=1e-4)
    assert record.facts["grid"] == [4, 6] and record.facts["channels"] == 36
    assert record.facts["parameters"] == count(method.head)
    assert not record.warnings


def test_level_scaling_can_be_off() -> None:
    assert bool((prepared(level_scaling="none").channel_scale == 1).all())


def test_padding_counts_for_nothing_in_prepare() -> None:
    pictures = good_pictures(6, 64, 96)
    valid = whole(pictures)
    valid[..., 64:] = False
    method = unfitted()
    stream = stream_of(method, pictures, valid)
    record = method.prepare(stream, Run())
    tokens = torch.cat([batch.features["tokens"] for batch in stream])[..., :4]
    tokens = tokens * method.channel_scale[:, None, None]
    assert float(tokens[:, :8].square().mean()) == pytest.approx(1, rel=1e-4)
    spread = float((tokens - tokens.mean(dim=0)).square().mean())
    assert record.facts["mean_feature_mse"] == pytest.approx(spread, rel=1e-4)


def test_patches_with_nobody_left_to_look_at_are_reported() -> None:
    pictures = good_pictures(2)
    valid = whole(pictures)
    valid[..., 32:] = False  # two columns of tokens
    valid[..., 16:, :] = False  # one row
    method = unfitted()
    record = method.prepare(stream_of(method, pictures, valid), Run())
    assert len(record.warnings) == 1 and "100.0% of the patches" in record.warnings[0]


def test_same_seed_draws_the_same_weights() -> None:
    first, again, other = prepared(seed=3), prepared(seed=3), prepared(seed=4)
    for name, tensor in first.head.state_dict().items():
        assert torch.equal(tensor, again.head.state_dict()[name]), name
    assert not torch.equal(first.head.project_in.weight, other.head.project_in.weight)


def test_one_picture_has_no_mean_to_compare_with() -> None:
    one, two = unfitted(), unfitted()
    assert one.prepare(stream_of(one, good_pictures(1)), Run()).facts["mean_feature_mse"] == 0
    facts = two.prepare(stream_of(two, good_pictures(2)), Run()).facts
    assert isinstance(facts["mean_feature_mse"], float) and facts["mean_feature_mse"] > 1e-6


def test_no_picture_is_refused() -> None:
    with pytest.raises(DataError, match="no good picture to learn from"):
        unfitted().prepare([], Run())  # type: ignore[arg-type]  # an empty stream


def test_features_that_are_nan_are_refused() -> None:
    method = unfitted()
    pictures = good_pictures(3)
    pictures[1, 0, 5, 5] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        method.prepare(stream_of(method, pictures), Run())


def test_window_that_does_not_fit_the_grid_is_refused_before_training() -> None:
    method = unfitted(window=7)
    with pytest.raises(ConfigError, match="grid of 4 x 6 tokens a window of 7 x 7"):
        method.prepare(stream_of(method, good_pictures()), Run())


def test_picture_of_another_size_is_refused() -> None:
    method = prepared()
    pictures = good_pictures(1, 64, 64)
    with pytest.raises(ConfigError, match=r"fitted on a grid of \[4, 6\], not \[4, 4\]"):
        method(pictures, whole(pictures))


def test_backbone_never_trains() -> None:
    method = prepared().train()
    assert method.training and method.head.training
    assert not any(module.training for module in cast(nn.Module, method.backbone).modules())
    trained = {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in method.head.parameters()}


def test_clean_features_stay_clean() -> None:
    method = prepared().train()
    batch = batch_of(method, good_pictures(2))
    before = batch.features["tokens"].clone()
    list(method.losses(batch, Step(0, 10)))
    assert torch.equal(batch.features["tokens"], before)


def test_target_is_clean() -> None:
    """With a head that gives back what it gets, the loss is the perturbation's own size."""
    method = prepared(dropout=0)
    batch = batch_of(method, good_pictures(2))

    class Echo(nn.Module):
        grid = method.head.grid

        def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
            return tokens

    method.head = cast(Reconstruction, Echo())
    (loss,) = method.train().losses(batch, Step(0, 10))
    clean = batch.features["tokens"].flatten(2).transpose(1, 2) * method.channel_scale
    size = float(clean.square().mean())
    assert float(loss.value) == pytest.approx(1.2127**2 * size, rel=0.1)
    assert float(method.held_out_loss(batch).value) == 0


def test_each_step_perturbs_anew_and_repeats_by_its_number() -> None:
    method = prepared(dropout=0).train()
    batch = batch_of(method, good_pictures(2))
    with torch.no_grad():
        values = [float(next(method.losses(batch, Step(number, 10))).value) for number in (0, 1, 0)]
    assert values[0] == values[2] != values[1]


def test_padding_does_not_enter_the_loss() -> None:
    method = prepared()
    pictures = good_pictures(2)
    valid = whole(pictures)
    valid[..., 64:] = False
    batch = batch_of(method, pictures, valid)
    plain = held_out(method, batch)
    batch.features["tokens"][..., 4:] = 1000.0
    assert held_out(method, batch) == pytest.approx(plain, rel=1e-6)


def test_mean_squared_error_is_over_valid_tokens() -> None:
    clean = torch.zeros(2, 3, 4)
    rebuilt = torch.tensor([1.0, 2.0, 5.0]).view(1, 3, 1).expand(2, 3, 4)
    assert float(mean_squared_error(rebuilt, clean, all_valid(clean))) == pytest.approx(10)
    valid = torch.tensor([[True, False, False], [True, True, False]])
    assert float(mean_squared_error(rebuilt, clean, valid)) == pytest.approx((1 + 1 + 4) / 3)


def test_few_pictures_can_be_learnt_by_heart() -> None:
    """Their features have nothing in common, so the mean of them explains nothing of what differs."""
    method = unfitted(pool="none", dropout=0, width=32, heads=4, ffn=64, decoder_layers=1)
    features = {"tokens": torch.randn(4, 36, 4, 6, generator=torch.Generator().manual_seed(0))}
    valid = torch.ones(4, 1, 64, 96, dtype=torch.bool)
    method.prepare(Stream([FeatureBatch(features, valid, tuple("abcd"), tuple("abcd"))]), Run())
    batch = Batch(features, valid)
    assert held_out(method, batch) > 1
    train(method, batch, 300, lr=3e-3)
    assert held_out(method, batch) < 0.1


def test_prepare_keeps_the_mode() -> None:
    """A fresh head in training mode would drop out at inspection."""
    method = prepared()
    assert not any(module.training for module in method.modules())
    method.train().prepare(stream_of(method, good_pictures()), Run())
    assert all(module.training for module in method.head.modules())


def test_pool_changes_the_training_only() -> None:
    jittered, plain = prepared(pool="gaussian"), prepared(pool="none")
    pictures = good_pictures(3)
    one, other = (method(pictures, whole(pictures)) for method in (jittered, plain))
    assert torch.equal(one.anomaly_map, other.anomaly_map) and torch.equal(one.score, other.score)
    batch = batch_of(jittered, pictures)
    assert train(jittered, batch, 1) != train(plain, batch, 1)


def test_network_is_told_no_product() -> None:
    assert list(inspect.signature(Uniad.forward).parameters) == ["self", "pictures", "valid"]
    assert list(inspect.signature(Reconstruction.forward).parameters) == ["self", "tokens", "valid"]
    assert unfitted().needs(Step(0, 1)) == frozenset()
    method = prepared(pool="none")
    batch = batch_of(method, good_pictures(3))
    told = batch._replace(products=("a", "b", "c"))
    losses = [next(iter(method.losses(each, Step(0, 1)))).value for each in (batch, told)]
    assert torch.equal(*losses)


def test_state_goes_into_a_fresh_method() -> None:
    method = prepared()
    train(method, batch_of(method, good_pictures(3)), 3)
    method.settle(torch.linspace(0, 5, 100))
    fresh = unfitted()
    load_learnt(fresh, {name: tensor.clone() for name, tensor in learnt_tensors(method).items()})
    pictures = good_pictures(2)
    one, other = (each(pictures, whole(pictures)) for each in (method, fresh))
    assert torch.equal(one.anomaly_map, other.anomaly_map) and torch.equal(one.score, other.score)
    energy = method.patch_energy(pictures, whole(pictures))
    assert torch.equal(energy, fresh.patch_energy(pictures, whole(pictures)))


def test_state_of_another_width_does_not_go_in() -> None:
    with pytest.raises(ValueError, match=r"has shape"):
        load_learnt(unfitted(), learnt_tensors(prepared(width=32)))


@pytest.mark.parametrize("name", ["uniad", "fpfnet"])
def test_learning_rate_of_the_presets(name: str) -> None:
    """Paper: 1e-4, a tenth of it for the last fifth. Compact: a warm-up from 1/n before that."""
    presets = find_method(name).presets
    paper, compact = (cast(UniadConfig, presets[preset].config) for preset in ("paper", "compact"))
    assert (paper.epochs, paper.batch, paper.clip, paper.weight_decay) == (1000, 8, 0.1, 1e-4)
    rates = [learning_rate(paper, Step(number, 1000)) for number in (0, 799, 800, 999)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
    assert (compact.steps, compact.epochs) == (4000, None)
    rates = [learning_rate(compact, Step(number, 4000)) for number in (0, 99, 199, 3199, 3200)]
    assert rates == pytest.approx([5e-6, 5e-4, 1e-3, 1e-3, 1e-4])


# --- map and score


def with_error(side: int = 14, place: tuple[int, int] = (0, 0), align: str = "corners") -> Uniad:
    """A method that is wrong by 0.5 in all 272 channels of one token."""
    config = UniadConfig.model_validate({"align": align, "level_scaling": "none"})
    method = Uniad(FixedFeatures(torch.randn(1, 272, side, side)), config, ("stride16",))

    class Wrong(nn.Module):
        grid = (side, side)

        def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
            wrong = torch.zeros(1, side * side, 1)
            wrong[0, place[0] * side + place[1]] = 0.5
            return tokens + wrong

    method.head = cast(Reconstruction, Wrong())
    return method.eval()


def test_map_of_a_hand_made_error() -> None:
    method = with_error()
    pictures = torch.zeros(1, 3, 224, 224)
    expected = 0.5 * 272**0.5
    energy = method.patch_energy(pictures, whole(pictures))[0]
    assert float(energy[0, 0]) == pytest.approx(expected, rel=1e-4)
    energy[0, 0] = 0
    assert float(energy.abs().max()) < 1e-3
    maps = method(pictures, whole(pictures))
    assert (
        float(maps.anomaly_map.max()) == float(maps.anomaly_map[0, 0, 0]) == pytest.approx(8.2462, rel=1e-4)
    )
    window_mean = float(maps.anomaly_map[0, :16, :16].mean())
    assert float(maps.score) == pytest.approx(window_mean, rel=1e-5)
    assert 0.2 * 8.2462 < float(maps.score) <= 8.2462


def test_map_lies_on_the_picture_where_cells_are_averaged() -> None:
    """An error in token (3, 5) peaks in the middle of that cell."""
    pictures = torch.zeros(1, 3, 224, 224)
    anomaly_map = with_error(place=(3, 5), align="mean")(pictures, whole(pictures)).anomaly_map[0]
    assert float(anomaly_map.max()) == pytest.approx(8.2462 * (1 - 1 / 32) ** 2, rel=1e-4)
    rows, columns = (anomaly_map > 0.99 * anomaly_map.max()).nonzero(as_tuple=True)
    assert (float(rows.float().mean()), float(columns.float().mean())) == (3 * 16 + 7.5, 5 * 16 + 7.5)


@pytest.mark.parametrize("align", ["mean", "corners"])
def test_constant_error_is_the_map_and_the_score(align: str) -> None:
    valid = torch.ones(1, 1, 224, 224, dtype=torch.bool)
    anomaly_map = enlarged(torch.full((1, 14, 14), 3.5), valid, align)  # type: ignore[arg-type]
    torch.testing.assert_close(anomaly_map, torch.full((1, 224, 224), 3.5))
    assert float(pooled_maximum(anomaly_map, valid, (16, 16))) == pytest.approx(3.5)


def test_score_windows_have_no_border_and_lie_at_every_pixel() -> None:
    anomaly_map = torch.zeros(4, 224, 224)
    anomaly_map[0, 0, 0] = anomaly_map[1, 223, 223] = anomaly_map[2, 101, 57] = 1.0
    anomaly_map[3, 208:, 208:] = 1.0  # just the last of 209 x 209 windows
    valid = torch.ones(4, 1, 224, 224, dtype=torch.bool)
    score = pooled_maximum(anomaly_map, valid, (16, 16))
    torch.testing.assert_close(score, torch.tensor([1 / 256, 1 / 256, 1 / 256, 1.0]))


@pytest.mark.parametrize("side", [(1, 1), (3, 3), (5, 16), (16, 2), (64, 64)])
def test_score_windows_are_averaged_whole(side: tuple[int, int]) -> None:
    draws = torch.Generator().manual_seed(0)
    anomaly_map = torch.rand(2, 48, 40, generator=draws)
    valid = torch.rand(2, 1, 48, 40, generator=draws) < 0.8
    anomaly_map *= valid[:, 0]
    high, wide = min(side[0], 48), min(side[1], 40)
    found = pooled_maximum(anomaly_map, valid, side)
    for one in range(2):
        windows = anomaly_map[one].double().unfold(0, high, 1).unfold(1, wide, 1)
        shares = valid[one, 0].double().unfold(0, high, 1).unfold(1, wide, 1)
        expected = (windows.mean(dim=(2, 3)) / shares.mean(dim=(2, 3)).clamp_min(0.5)).amax()
        assert float(found[one]) == pytest.approx(float(expected), rel=1e-6)


def test_pooling_of_the_score_can_be_set() -> None:
    pictures = good_pictures(2)
    maps = prepared(score_pool=1)(pictures, whole(pictures))
    assert torch.equal(maps.score, maps.anomaly_map.flatten(1).amax(dim=1))
    pooled = prepared()(pictures, whole(pictures))
    assert torch.equal(pooled.anomaly_map, maps.anomaly_map)
    assert bool((pooled.score < maps.score).all())


@pytest.mark.parametrize("align", ["mean", "corners"])
def test_what_is_not_valid_neither_scores_nor_spreads(align: str) -> None:
    valid = torch.ones(1, 1, 64, 96, dtype=torch.bool)
    valid[..., 64:] = False
    error = torch.ones(1, 4, 6)
    error[..., 4:] = 1000.0
    anomaly_map = enlarged(error, valid, align)  # type: ignore[arg-type]
    assert not anomaly_map[..., 64:].any()
    torch.testing.assert_close(anomaly_map[..., :64], torch.ones(1, 64, 64))
    assert float(pooled_maximum(anomaly_map, valid, (16, 16))) == pytest.approx(1)


def test_window_with_a_few_valid_pixels_does_not_win_by_one_of_them() -> None:
    anomaly_map, valid = torch.zeros(1, 64, 64), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    valid[..., :2, :] = True  # a strip of two rows: an eighth of a window
    anomaly_map[:, :2] = 1.0
    assert float(pooled_maximum(anomaly_map, valid, (16, 16))) == pytest.approx(0.25)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_what_is_outside_the_region_changes_nothing_inside(mode: str) -> None:
    method = prepared(fusion=mode, pictures=good_pictures(4, 64, 160))
    pictures = good_pictures(1, 64, 160)
    valid = whole(pictures)
    valid[..., 64:] = False
    ruined = pictures.clone()
    ruined[..., 112:] = 0
    one, other = method(pictures, valid), method(ruined, valid)
    torch.testing.assert_close(one.anomaly_map, other.anomaly_map, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.score, other.score, rtol=1e-5, atol=1e-6)
    assert not one.anomaly_map[..., 64:].any()


def test_patch_energy_agrees_with_finite_differences() -> None:
    method = copy.deepcopy(prepared()).double()
    pictures = good_pictures(1).double()
    valid = whole(pictures)
    leaf = pictures.clone().requires_grad_(True)
    method.patch_energy(leaf, valid).sum().backward()  # type: ignore[no-untyped-call]  # torch
    assert leaf.grad is not None and float(leaf.grad.abs().max()) > 1e-4
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        direction = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (
                float(method.patch_energy(pictures + s * direction, valid).sum()) for s in (1e-5, -1e-5)
            )
        assert float((leaf.grad * direction).sum()) == pytest.approx((up - down) / 2e-5, rel=1e-2)


# --- slow


@pytest.mark.slow
@each_mode
def test_own_token_share_of_the_papers_head(mode: Fusion) -> None:
    head = make_head(with_mode(PAPER, mode), channels=272, grid=(14, 14))
    share = own_share(lambda x: rebuild(head, x), random_tokens(head), CORNERS_AND_INNER)
    assert float(share.mean()) < 0.0075 and float(share.max()) < 0.02


@pytest.mark.slow
def test_own_token_share_stays_small_in_training() -> None:
    """The mean over all tokens; single tokens may become hubs (9.3)."""
    pictures = good_pictures(8, 224, 224)
    method = prepared(pictures=pictures, window=7, fusion="encoder_decoder", encoder_layers=2)
    batch = batch_of(method, pictures)
    train(method, batch, 100, lr=2e-3)
    tokens = batch.features["tokens"][:1].flatten(2).transpose(1, 2) * method.channel_scale
    share = own_share(lambda x: rebuild(method.head, x), tokens, range(196))
    assert float(share.mean()) < max(0.02, 4 / 196)


@pytest.mark.slow
def test_paper_preset_at_full_size() -> None:
    preset = Uniad.presets["paper"]
    config = cast(UniadConfig, preset.config)
    assert preset.backbone is not None and preset.size == 224
    entry = registry.find_entry(preset.backbone)
    levels = Uniad.choose_levels(entry.levels, config)
    method = Uniad(load_backbone(preset.backbone, levels, weights="random"), config, levels).eval()
    pictures = good_pictures(2, 224, 224)
    with torch.no_grad():
        record = method.prepare(stream_of(method, pictures), Run())
    assert record.facts["grid"] == [14, 14] and record.facts["parameters"] == 7_717_392
    with torch.no_grad():
        batch = batch_of(method, pictures)
    train(method, batch, 1, lr=config.lr)
    with torch.no_grad():
        maps = method(pictures, whole(pictures))
    assert maps.anomaly_map.shape == (2, 224, 224) and bool(torch.isfinite(maps.score).all())
