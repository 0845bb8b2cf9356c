"""AGPNet: the decoder's size, what gradients flow through, the switches, and the method around it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from conftest import TINY_LEVELS, textured, write_good
from fettle.backbones import load_backbone
from fettle.backbones.registry import find_entry
from fettle.bench.cost import multiply_adds
from fettle.detector import Detector
from fettle.errors import ConfigError, UsageError
from fettle.layers.feature_statistics import FeatureStatistics
from fettle.layers.pixel_map import pixel_map
from fettle.layers.token_decoder import TokenDecoder
from fettle.layers.token_grid import score_of_map
from fettle.methods.agpnet import AGPNet, AGPNetConfig
from fettle.methods.registry import make_config
from fettle.model_parts import learnt_tensors, load_learnt
from fettle.perturb.attention import Guidance
from fettle.protocols import Batch, FeatureBatch, Level, Run, Step

PAPER = cast(AGPNetConfig, AGPNet.presets["paper"].config)
SMALL = {"width": 32, "heads": 2, "depth": 2, "image_every": 1, "alpha_end": 1.0, "beta": 0.2, "steps": 40}


def count(module: nn.Module, *, trained: bool = True) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(number: int = 4, size: int = 64, first: int = 0) -> Tensor:
    views = [torch.from_numpy(textured(first + i, size, size)) for i in range(number)]
    return (torch.stack(views).permute(0, 3, 1, 2).float() / 255).contiguous()


def all_valid(views: Tensor) -> Tensor:
    return torch.ones(len(views), 1, *views.shape[-2:], dtype=torch.bool)


class Stream:
    """Features of some pictures in one batch."""

    def __init__(self, method: AGPNet, views: Tensor) -> None:
        self.method, self.views = method, views
        self.num_pictures = len(views)

    def __iter__(self) -> Iterator[FeatureBatch]:
        valid = all_valid(self.views)
        keys = tuple(str(i) for i in range(len(self.views)))
        yield FeatureBatch(self.method.features(self.views, valid), valid, keys, keys)


def prepared(views: Tensor | None = None, seed: int = 0, **settings: object) -> AGPNet:
    """A method on the tiny backbone that has walked some pictures and drawn its weights."""
    config = AGPNetConfig.model_validate({**SMALL, **settings})
    levels = AGPNet.choose_levels(TINY_LEVELS, config)
    method = AGPNet(load_backbone("tiny", levels, weights="random"), config, levels)
    with torch.no_grad():
        method.prepare(Stream(method, pictures() if views is None else views), Run(seed=seed))
    return method.train()


def batch_of(method: AGPNet, views: Tensor | None = None) -> Batch:
    views = pictures() if views is None else views
    with torch.no_grad():
        return Batch(method.features(views, all_valid(views)), all_valid(views), views)


def loss_and_gradients(method: AGPNet, batch: Batch, step: Step) -> tuple[float, list[Tensor]]:
    method.zero_grad()
    (loss,) = method.losses(batch, step)
    loss.value.backward()  # type: ignore[no-untyped-call]
    return float(loss.value.detach()), [
        cast(Tensor, p.grad).clone() for p in method.decoder.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 7_344_000), ({"out_norm": True}, 7_344_768), ({"depth": 2}, 3_795_072), ({"depth": 8}, 14_441_856)],
)
def test_parameters_of_the_paper_preset(settings: dict[str, object], expected: int) -> None:
    sizes = {"width": 384, "heads": 6, "depth": 4, **settings}
    assert count(TokenDecoder(384, (16, 16), **sizes)) == expected  # type: ignore[arg-type]
    assert (PAPER.width, PAPER.heads, PAPER.depth) == (384, 6, 4)


def test_parameters_of_a_block_and_of_compact() -> None:
    assert count(TokenDecoder(384, (16, 16), width=384, heads=6, depth=4).blocks[0]) == 1_774_464
    compact = AGPNetConfig()
    sizes = {"width": compact.width, "heads": compact.heads, "depth": compact.depth}
    assert count(TokenDecoder(472, (16, 16), **sizes)) == 550_744


def test_taps() -> None:
    choose = AGPNet.choose_levels
    pyramid = [Level(f"stride{s}", 8 * s, s) for s in (2, 4, 8, 16, 32)]
    assert choose(pyramid, AGPNetConfig()) == ("stride8", "stride16")
    assert choose(pyramid[:3], AGPNetConfig()) == ("stride4", "stride8")
    blocks = [*(Level(f"block{i}", 384, 16) for i in range(1, 13)), Level("final", 384, 16)]
    assert choose(blocks, PAPER) == ("block3", "block6", "block9", "block12")
    assert choose(blocks, AGPNetConfig(taps=("block2",))) == ("block2",)
    assert choose([*blocks[:3], blocks[-1]], AGPNetConfig()) == ("block1", "block2", "block3")
    assert choose(pyramid[3:4], AGPNetConfig()) == ("stride16",)
    with pytest.raises(ConfigError, match="taps"):
        choose(pyramid[4:], AGPNetConfig())
    with pytest.raises(ValidationError, match="taps"):
        AGPNetConfig(taps=())


def test_fields_that_do_not_go_together_are_told_in_words() -> None:
    with pytest.raises(ConfigError, match=r"^Method 'agpnet': heads 3 do not divide width 128: choose"):
        make_config(AGPNet, "compact", {"heads": 3})


def test_a_backbone_without_a_readable_cue_serves_where_none_is_asked_for() -> None:
    backbone = load_backbone("vit_small_patch16_18x2_224", ["block1", "block2"], weights="random")
    views = torch.rand(1, 3, 32, 32)
    for settings in ({"noise": "none"}, {"cues": "learned"}):
        method = AGPNet(backbone, AGPNetConfig.model_validate(settings), ["block1", "block2"])
        with torch.no_grad():
            assert set(method.features(views, all_valid(views))) == {"tokens"}
    with pytest.raises(UsageError, match="cannot be read"):
        AGPNet(backbone, AGPNetConfig(), ["block1", "block2"]).features(views, all_valid(views))


def test_target_is_layer_normed_at_each_tap() -> None:
    method = prepared()
    tokens = batch_of(method).features["tokens"]  # (B, 12 + 16, 4, 4)
    assert tokens.shape == (4, 28, 4, 4) and not tokens.requires_grad
    for level in tokens.split([12, 16], dim=1):
        torch.testing.assert_close(level.mean(dim=1), torch.zeros(4, 4, 4), atol=1e-4, rtol=0)
        torch.testing.assert_close(level.var(dim=1, unbiased=False), torch.ones(4, 4, 4), atol=1e-3, rtol=0)


def test_equal_widths_are_summed_and_others_refuse_it() -> None:
    backbone = load_backbone("vit_tiny_patch16_224", ["block1", "block2"], weights="random")
    method = AGPNet(backbone, AGPNetConfig(), ["block1", "block2"])
    views = torch.rand(1, 3, 64, 64, generator=drawn())
    with torch.no_grad():
        tokens = method.features(views, all_valid(views))["tokens"]
        levels = backbone(views, ["block1", "block2"])
    normed = [F.layer_norm(own.movedim(1, -1), (192,), eps=1e-6).movedim(-1, 1) for own in levels.values()]
    torch.testing.assert_close(tokens, normed[0] + normed[1])
    assert method.sums and method.channels == 192 and not prepared().sums
    with pytest.raises(ConfigError, match="cannot be summed"):
        prepared(fuse="sum")


def test_an_identity_decoder_has_no_error() -> None:
    method = prepared(noise="none")
    decoder = TokenDecoder(28, (4, 4), width=28, heads=2, depth=2)
    for block in decoder.blocks:
        for layer in (block.attention.proj, block.fc2):  # type: ignore[union-attr]
            nn.init.zeros_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)
    nn.init.eye_(decoder.project_out.weight)
    nn.init.zeros_(decoder.project_out.bias)
    method.decoder = decoder
    views = pictures()
    with torch.no_grad():
        assert float(method._error(views, all_valid(views)).max()) <= 1.01e-6
        assert float(next(method.losses(batch_of(method), Step(0, 10))).value) == 0


def test_loss_of_an_identity_decoder_is_the_noise() -> None:
    method = prepared(levels="feature", cues="prior", alpha_end=0.0, beta=0.5)
    method.decoder.forward = lambda tokens, valid, grid: tokens  # type: ignore[method-assign,assignment]
    batch = batch_of(method, pictures(16))
    louder = batch._replace(features={**batch.features, "tokens": 2 * batch.features["tokens"]})  # RMS 2
    losses = [float(next(method.losses(louder, Step(i, 40))).value) for i in range(8)]
    assert sum(losses) / 8 == pytest.approx(1.0, rel=0.02)


def test_the_second_term_has_both_disturbances_and_the_clean_target() -> None:
    method = prepared(cues="prior", ratio_start=1.0, ratio_end=1.0)
    batch, step = batch_of(method), Step(20, 40)
    clean, valid = method._tokens(batch.features["tokens"], batch.valid)
    unit = method._unit(clean, valid)
    guidance = method._guidance(batch, clean, valid, step, unit)
    views = cast(Tensor, batch.pictures)
    noise = torch.randn(views.shape, generator=step.generator("noise/pictures"))
    with torch.no_grad():
        of_pictures = method.features(views + 0.2 * noise, batch.valid)["tokens"].flatten(2).transpose(1, 2)
    draws = [
        torch.randn(clean.shape, generator=step.generator(name))
        for name in ("noise/features", "noise/features of pictures")
    ]
    weight = (guidance.strength * unit)[:, :, None]
    seen: list[Tensor] = []
    method.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    (loss,) = method.losses(batch, step)
    torch.testing.assert_close(seen[0], clean + weight * draws[0])
    torch.testing.assert_close(seen[1], of_pictures + weight * draws[1])
    terms = [(method.decoder(own, valid, (4, 4)) - clean).square().mean() for own in seen[:2]]
    torch.testing.assert_close(loss.value, (terms[0] + terms[1]) / 2)


@pytest.mark.parametrize("momentum", [0.999, 0.0])
def test_no_gradient_through_masks_backbone_and_momentum(
    momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = prepared(momentum=momentum)
    batch, step = batch_of(method), Step(20, 40)
    value, inside = loss_and_gradients(method, batch, step)
    kept: list[Guidance] = []
    guidance_of = method._guidance

    def keep(*arguments: Any) -> Guidance:
        kept.append(guidance_of(*arguments))
        return kept[-1]

    monkeypatch.setattr(method, "_guidance", keep)
    loss_and_gradients(method, batch, step)
    constant = Guidance(*(torch.tensor(part.tolist()) for part in kept[0]))
    monkeypatch.setattr(method, "_guidance", lambda *arguments: constant)
    given_value, given = loss_and_gradients(method, batch, step)
    assert given_value == value and len(given) == len(inside) > 10
    assert all(torch.equal(a, b) for a, b in zip(inside, given, strict=True))
    assert not kept[0].mask.requires_grad and not kept[0].strength.requires_grad
    frozen = [*method.guide.parameters(), *cast(nn.Module, method.backbone).parameters()]
    assert (len(list(method.guide.parameters())) > 0) == (momentum > 0)
    assert all(not p.requires_grad and p.grad is None for p in frozen)


def test_no_noise_equals_noise_of_strength_nought() -> None:
    batch = batch_of(prepared())
    nothing = {"alpha_start": 0.0, "alpha_end": 0.0, "beta": 0.0, "ratio_start": 0.0, "ratio_end": 0.0}
    plain, plain_gradients = loss_and_gradients(prepared(noise="none"), batch, Step(3, 40))
    found, gradients = loss_and_gradients(prepared(**nothing), batch, Step(3, 40))
    assert found == pytest.approx(plain, rel=1e-5)
    for a, b in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "shuffled", "inverted", "fixed", "attention"])
@pytest.mark.parametrize("levels", ["feature", "image", "both"])
def test_every_noise_trains_and_repeats(kind: str, levels: str) -> None:
    found = []
    for _ in range(2):
        method = prepared(noise=kind, levels=levels)
        found.append(loss_and_gradients(method, batch_of(method), Step(30, 40)))
    assert found[0][0] == found[1][0]
    plain = prepared(noise="none")
    assert found[0][0] != loss_and_gradients(plain, batch_of(plain), Step(30, 40))[0]
    other = prepared(noise=kind, levels=levels)
    assert loss_and_gradients(other, batch_of(other), Step(31, 40))[0] != found[0][0]


def test_noise_modes_see_the_same_draws() -> None:
    def difference(kind: str) -> Tensor:
        method = prepared(noise=kind, levels="feature")
        seen: list[Tensor] = []
        method.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        batch = batch_of(method)
        next(method.losses(batch, Step(30, 40)))
        return seen[0] - batch.features["tokens"].flatten(2).transpose(1, 2)

    attention, uniform = difference("attention"), difference("uniform")
    torch.testing.assert_close(attention.sign(), uniform.sign())
    torch.testing.assert_close(attention.square().sum(), uniform.square().sum(), rtol=0.1, atol=0)


def test_pictures_are_asked_for_only_when_they_are_disturbed() -> None:
    def asked(**settings: object) -> list[bool]:
        method = prepared(**settings)
        return [bool(method.needs(Step(number, 40))) for number in range(5)]

    assert asked(levels="feature") == [False] * 5
    assert asked(noise="none") == [False] * 5
    assert asked(image_every=2) == [True, False, True, False, True]
    assert asked(levels="image", image_every=3) == [True] * 5
    assert asked(noise="none", augment="flip") == [True] * 5


def test_momentum_follows_after_a_step_and_the_cue_comes_from_it() -> None:
    method = prepared(cues="learned")
    momentum = cast(TokenDecoder, method.guide.slow)
    before = copy.deepcopy(momentum)
    with torch.no_grad():
        for p in method.decoder.parameters():
            p.add_(1.0)
    batch = batch_of(method)
    clean, valid = method._tokens(batch.features["tokens"], batch.valid)
    looked = method._cues(batch, clean, valid)[1]
    torch.testing.assert_close(looked, before.looked_at(clean, valid, (4, 4), "all"))
    method.after_step(Step(9, 40))  # momentum 10 / 19
    for slow, first, own in zip(
        momentum.parameters(), before.parameters(), method.decoder.parameters(), strict=True
    ):
        torch.testing.assert_close(slow, first + (own - first) * 9 / 19)


def test_without_momentum_the_cue_is_the_decoders_own() -> None:
    method = prepared(cues="learned", momentum=0.0)
    assert method.guide.slow is None
    batch = batch_of(method)
    clean, valid = method._tokens(batch.features["tokens"], batch.valid)
    looked = method._cues(batch, clean, valid)[1]
    torch.testing.assert_close(looked, method.decoder.looked_at(clean, valid, (4, 4), "all"))
    assert "own" in method.explain(pictures(), all_valid(pictures())).words
    with pytest.raises(ValidationError, match="momentum"):
        AGPNetConfig(momentum=0.0, infer_with="momentum")


def test_looked_at_is_the_mean_over_layers_and_sums_to_one() -> None:
    method = prepared()
    batch = batch_of(method)
    clean, valid = method._tokens(batch.features["tokens"], batch.valid)
    both = method.decoder.looked_at(clean, valid, (4, 4), "all")
    last = method.decoder.looked_at(clean, valid, (4, 4), "last")
    torch.testing.assert_close(both.sum(1), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(last.sum(1), torch.ones(4), atol=1e-5, rtol=0)
    single = copy.deepcopy(method.decoder)
    single.blocks = single.blocks[:1]
    first = single.looked_at(clean, valid, (4, 4), "all")
    torch.testing.assert_close(both, (first + last) / 2)


def test_answers_need_no_momentum_decoder() -> None:
    method = prepared().eval()
    views = pictures()
    with torch.no_grad():
        expected = method(views, all_valid(views))
        assert method.guide.slow is not None
        method.guide.slow = None
        found = method(views, all_valid(views))
    assert torch.equal(found.anomaly_map, expected.anomaly_map) and torch.equal(found.score, expected.score)


@pytest.mark.filterwarnings("ignore")
def test_the_traced_graph_uses_no_momentum_weight() -> None:
    method = prepared().eval()
    views = pictures(1)
    with torch.no_grad():
        traced = torch.export.export(method, (views, all_valid(views)))
    names = traced.graph_signature.inputs_to_parameters
    used = {names[node.name] for node in traced.graph.nodes if node.name in names and node.users}
    own = {f"decoder.{name}" for name, _ in method.decoder.named_parameters()}
    assert own <= used and not any("slow" in name for name in used)


def test_the_momentum_decoder_can_answer() -> None:
    method = prepared(infer_with="momentum").eval()
    views = pictures()
    with torch.no_grad():
        before = method(views, all_valid(views)).score
        for p in method.decoder.parameters():
            p.zero_()
        assert torch.equal(method(views, all_valid(views)).score, before)


def test_scores() -> None:
    values = torch.arange(400.0).reshape(2, 10, 20)
    valid = torch.ones(2, 10, 20, dtype=torch.bool)
    valid[1, 5:] = False  # values 200..299 are valid
    assert score_of_map(values, valid, "max").tolist() == [199, 299]
    assert score_of_map(values, valid, "top1%").tolist() == [198.5, 299]
    assert score_of_map(values, valid, "mean").tolist() == [99.5, 249.5]


def test_noise_units() -> None:
    clean = torch.randn(2, 16, 8, generator=drawn())
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, 8:] = False
    unit = prepared()._unit(clean, valid)
    assert float(unit[0, 0]) == pytest.approx(float(clean[0, :8].square().mean().sqrt()))
    token = prepared(noise_unit="token_rms")._unit(clean, valid)
    torch.testing.assert_close(token, clean.square().mean(2).sqrt())
    assert bool((prepared(noise_unit="one")._unit(clean, valid) == 1).all())


def test_schedule_by_epochs_is_a_staircase() -> None:
    method = prepared(pictures(8), schedule_unit="epoch", batch=4)
    staircase = pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert [method._share(Step(number, 8)) for number in range(8)] == staircase
    in_two_processes = prepared(pictures(8), schedule_unit="epoch", batch=2, epochs=4)
    assert [in_two_processes._share(Step(number, 8)) for number in range(8)] == staircase


def test_padding_gets_no_noise_and_no_say() -> None:
    method = prepared(levels="feature")
    views = pictures()
    valid = all_valid(views)
    valid[..., 48:] = False  # the last column of tokens
    with torch.no_grad():
        features = method.features(views, valid)
    seen: list[Tensor] = []
    method.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    next(method.losses(Batch(features, valid), Step(30, 40)))
    moved = (seen[0] - features["tokens"].flatten(2).transpose(1, 2)).abs().sum(2).reshape(4, 4, 4)
    assert float(moved[..., 3].max()) == 0 and float(moved[..., :3].min()) > 0
    changed = views.clone()
    changed[..., 60:] = 0.5  # inside the padding, and out of reach of the network's last valid token
    with torch.no_grad():
        before, after = method.eval()(views, valid), method(changed, valid)
    torch.testing.assert_close(before.score, after.score, rtol=0.05, atol=0)


def test_a_grid_that_was_not_fitted_is_refused_unless_positions_are_waves() -> None:
    wide = pictures(1)[..., :32]
    with pytest.raises(ConfigError, match=r"grid of \[4, 4\], not \[4, 2\]"):
        prepared().eval()(wide, all_valid(wide))
    with torch.no_grad():
        found = prepared(positions="waves").eval()(wide, all_valid(wide))
    assert found.anomaly_map.shape == (1, 64, 32)


def test_turned_pictures_give_their_own_features() -> None:
    method = prepared(augment="turn", levels="feature")
    batch = batch_of(method)
    found = method._turned(batch, Step(1, 40))
    assert found.pictures is not None and batch.pictures is not None
    flips = [
        turn(view)
        for view in batch.pictures
        for turn in (lambda v: v, lambda v: v.flip(-1), lambda v: v.flip(-2), lambda v: v.flip(-1, -2))
    ]
    every = [*flips, *(view.transpose(-1, -2) for view in flips)]
    assert all(any(torch.equal(view, other) for other in every) for view in found.pictures)
    assert not torch.equal(found.pictures, batch.pictures)
    torch.testing.assert_close(found.features["tokens"], batch_of(method, found.pictures).features["tokens"])


def test_explanation() -> None:
    method = prepared(contrast_floor=0.0, ratio_end=0.25).eval()
    views = pictures()
    found = method.explain(views, all_valid(views))
    assert list(found.maps) == ["prior", "learned", "mask", "mask_image", "error"]
    for name, values in found.maps.items():
        assert values.shape == (4, 64, 64) and bool(values.isfinite().all()), name
        assert name == "error" or (float(values.min()) >= 0 and float(values.max()) <= 1), name
    assert found.maps["mask_image"].sum((1, 2)).tolist() == [1024] * 4
    assert found.numbers["alpha"] == [0.0, 1.0] and "not part of the verdict" in found.words
    alone = prepared(noise="none").eval().explain(views, all_valid(views))
    assert list(alone.maps) == ["error"]
    feature = prepared(levels="feature").eval().explain(views, all_valid(views))
    assert list(feature.maps) == ["prior", "learned", "mask", "error"]  # no picture was ever disturbed
    even = prepared(noise="uniform").eval().explain(views, all_valid(views))
    assert "mask_image" not in even.maps and "placed none" in even.words
    with torch.no_grad():
        expected = pixel_map(method._error(views, all_valid(views)), all_valid(views), 0)
    torch.testing.assert_close(found.maps["error"], expected)


def test_one_picture_has_no_baseline_and_several_do() -> None:
    one = prepared(pictures(1))
    assert next(one.losses(batch_of(one, pictures(1)), Step(0, 40))).baseline == 0
    several = prepared()
    seen = FeatureStatistics()
    seen.add(batch_of(several).features["tokens"], torch.ones(4, 4, 4, dtype=torch.bool), 4)
    assert several._baseline == pytest.approx(seen.spread(torch.ones(28)))


@pytest.mark.parametrize("settings", [{"noise": "fixed"}, {"momentum": 0.0}, {"positions": "waves"}])
def test_what_was_learnt_is_kept(settings: dict[str, object]) -> None:
    method = prepared(**settings)
    loss_and_gradients(method, batch_of(method), Step(0, 40))
    method.after_step(Step(0, 40))
    method.eval()
    fresh = AGPNet(method.backbone, method.config, method.levels).eval()
    load_learnt(fresh, {name: tensor.clone() for name, tensor in learnt_tensors(cast(Any, method)).items()})
    views = pictures(first=50)
    with torch.no_grad():
        assert torch.equal(fresh(views, all_valid(views)).score, method(views, all_valid(views)).score)
    for name, values in method.explain(views, all_valid(views)).maps.items():
        assert torch.equal(values, fresh.explain(views, all_valid(views)).maps[name]), name


def test_cached_equals_uncached_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 10)
    settings = {**SMALL, "steps": 8, "batch": 4, "image_every": 2, "noise": "fixed"}

    def fit(**more: object) -> dict[str, Tensor]:
        fitted = Detector.fit(
            good, method="agpnet", settings=settings, backbone="tiny", weights="random", size=64, **more
        )
        return learnt_tensors(fitted.method)

    class Stop(Exception):
        pass

    def stop_after_five(what: str, done: int, total: int) -> None:
        if what == "training" and done == 5:
            raise Stop

    uncached = fit(cache_mib=0)
    cached = fit(cache_dir=tmp_path / "cache")
    with pytest.raises(Stop):
        fit(training_dir=tmp_path / "state", progress=stop_after_five)
    words: list[str] = []
    resumed = fit(training_dir=tmp_path / "state", say=words.append)
    assert any("goes on from step 5" in sentence for sentence in words)
    for name, tensor in uncached.items():
        assert torch.equal(cached[name], tensor), name
        assert torch.equal(resumed[name], tensor), name


def test_weight_decay_is_for_linear_layers_alone() -> None:
    from fettle.training_state import TrainingState

    method = prepared()
    groups = TrainingState(method, 10, method.config).optimizer.param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    linear = {id(m.weight) for m in method.decoder.modules() if isinstance(m, nn.Linear)}
    assert decayed == linear
    assert sum(len(group["params"]) for group in groups) == len(list(method.decoder.parameters()))


def test_paper_preset_at_full_size() -> None:
    preset = AGPNet.presets["paper"]
    entry = find_entry(str(preset.backbone))
    levels = AGPNet.choose_levels(entry.levels, preset.config)
    backbone = load_backbone(preset.backbone, levels, weights="random")
    method = AGPNet(backbone, preset.config, levels)
    views = torch.rand(2, 3, preset.size, preset.size, generator=drawn())
    with torch.no_grad():
        record = method.prepare(Stream(method, views), Run())
    assert record.facts["parameters"] == 7_344_000
    assert (record.facts["cue"], record.facts["grid"], record.facts["channels"]) == ("cls", [16, 16], 384)
    value, gradients = loss_and_gradients(method.train(), batch_of(method, views), Step(500, 1000))
    assert 0 < value < 100 and len(gradients) == len(list(method.decoder.parameters()))
    method.after_step(Step(500, 1000))
    method.eval()
    with torch.no_grad():
        assert bool(method(views, all_valid(views)).anomaly_map.isfinite().all())
        one = views[:1]
        of_backbone = multiply_adds(lambda: backbone(one, levels))
        of_all = multiply_adds(lambda: method(one, all_valid(one)))
    assert of_backbone == pytest.approx(6.14e9, rel=0.001)  # attention's share is 0.61
    assert of_all == pytest.approx(8.19e9, rel=0.001)
