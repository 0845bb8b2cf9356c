"""FPFNet is UniAD with two switches: what they change, and that without them nothing is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from test_uniad import batch_of, good_pictures, prepared, train, whole

from conftest import write_good
from fettle.detector import Detector
from fettle.errors import ConfigError
from fettle.inspection import Inspection
from fettle.methods.fpfnet import FPFNet, FPFNetConfig
from fettle.methods.registry import find_method, make_config
from fettle.methods.uniad import Uniad, UniadConfig
from fettle.perturb.gaussian import Gaussian
from fettle.perturb.pool import NAMED_POOLS
from fettle.protocols import Step

OFF: dict[str, object] = {"pool": "gaussian", "fusion": "none"}


def test_both_switches_off_is_uniad_bit_for_bit() -> None:
    uniad, fpfnet = prepared("uniad"), prepared("fpfnet", **OFF)
    assert isinstance(fpfnet, FPFNet)
    pictures = good_pictures(4)
    batch = batch_of(uniad, pictures)

    def assert_same_state() -> None:
        first, second = uniad.state_dict(), fpfnet.state_dict()
        assert list(first) == list(second)
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name

    assert_same_state()
    assert train(uniad, batch, 5) == train(fpfnet, batch, 5)
    assert_same_state()
    one, other = (method(pictures, whole(pictures)) for method in (uniad, fpfnet))
    assert torch.equal(one.anomaly_map, other.anomaly_map) and torch.equal(one.score, other.score)


@pytest.mark.parametrize("switch", ["pool", "fusion"])
def test_each_switch_alone_changes_the_training(switch: str) -> None:
    uniad = prepared("uniad")
    fpfnet = prepared("fpfnet", **{name: value for name, value in OFF.items() if name != switch})
    for name, tensor in uniad.state_dict().items():  # the same start: neither has a parameter
        assert torch.equal(tensor, fpfnet.state_dict()[name]), name
    batch = batch_of(uniad, good_pictures(4))
    assert train(uniad, batch, 5) != train(fpfnet, batch, 5)


def test_both_share_cached_features() -> None:
    assert prepared("uniad").feature_key() == prepared("fpfnet").feature_key()


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_presets_are_those_of_uniad_with_the_switches_on(preset: str) -> None:
    ours, base = FPFNet.presets[preset], Uniad.presets[preset]
    assert (ours.backbone, ours.frame, ours.size) == (base.backbone, base.frame, base.size)
    config = cast(FPFNetConfig, ours.config)
    assert config.pool == NAMED_POOLS["fpfnet"] and config.fusion == "encoder_decoder"
    back = config.model_copy(update={"pool": NAMED_POOLS["gaussian"], "fusion": "none"})
    assert UniadConfig.model_validate(back.model_dump()) == base.config


def test_presets_can_be_changed_field_by_field() -> None:
    config = make_config(find_method("fpfnet"), "paper", {"pool": "base_plus_one", "fusion": "full"})
    assert isinstance(config, FPFNetConfig)
    assert config.pool == NAMED_POOLS["base_plus_one"] and config.fusion == "full"
    assert (config.width, config.epochs, config.lr, config.warmup) == (256, 1000, 1e-4, 0)
    assert FPFNetConfig.model_validate_json(config.model_dump_json()) == config


def test_traits_are_those_of_uniad() -> None:
    assert FPFNet.traits == Uniad.traits and FPFNet.name == "fpfnet"


# The pool guided by attention: a configuration, and nothing else


def guided_pool(**guide: object) -> dict[str, object]:
    return {**NAMED_POOLS["fpfnet"].model_dump(), "guide": {"contrast_floor": 0.0, **guide}}


@pytest.mark.parametrize("cues", ["prior", "learned", "both"])
def test_a_guided_pool_is_configuration_alone(cues: str) -> None:
    method = prepared("fpfnet", pool=guided_pool(cues=cues))
    batch = batch_of(method, good_pictures(4))
    clean, valid = method._tokens(batch.features["tokens"], batch.valid)
    guide = method._guidance(batch, clean, valid, Step(50, 100))
    assert guide is not None
    size = clean.square().mean(dim=2)
    torch.testing.assert_close((guide.square() * size).sum(dim=1), size.sum(dim=1))
    assert float(guide.std()) > 0.05
    found, plain = train(method, batch, 3), train(prepared("fpfnet"), batch, 3)
    assert found[0] == plain[0]  # alpha begins at 0: the guide is even
    assert found[2] != plain[2]
    assert method.guide is not None and (method.guide.slow is not None) == (cues != "prior")


def test_a_guided_jitter_has_the_energy_of_an_unguided_one() -> None:
    method = prepared("fpfnet", pool=guided_pool(cues="prior"))
    batch = batch_of(method, good_pictures(6))
    clean, valid = method._tokens(batch.features["tokens"], batch.valid)
    clean = clean * torch.linspace(0.2, 3, clean.shape[1])[None, :, None]  # tokens of very different size
    guide = method._guidance(batch, clean, valid, Step(99, 100))
    jitter, grid = Gaussian(), method.head.grid

    def energy(own: torch.Tensor | None) -> float:
        draws = [torch.Generator().manual_seed(seed) for seed in range(40)]
        return sum(float((jitter(clean, grid, one, guide=own) - clean).square().sum()) for one in draws)

    assert energy(guide) / energy(None) == pytest.approx(1, abs=0.02)


def test_dropout_has_no_say_in_what_is_looked_at() -> None:
    method = prepared("fpfnet", pool=guided_pool(cues="learned"), dropout=0.5).train()
    batch = batch_of(method, good_pictures(4))
    clean, valid = method._tokens(batch.features["tokens"], batch.valid)
    assert method.guide is not None
    both = [method.guide.learned(method.head, clean, valid, method.head.grid) for _ in range(2)]
    assert both[0] is not None and both[1] is not None and torch.equal(both[0], both[1])
    assert method.head.training and cast(torch.nn.Module, method.guide.slow).training


def test_the_momentum_copy_of_a_guided_pool_follows() -> None:
    method = prepared("fpfnet", pool=guided_pool(cues="learned"))
    assert method.guide is not None and method.guide.slow is not None
    before = [p.clone() for p in method.guide.slow.parameters()]
    with torch.no_grad():
        for p in method.head.parameters():
            p.add_(1)
    method.after_step(Step(0, 100))  # momentum 0.1
    for slow, first in zip(method.guide.slow.parameters(), before, strict=True):
        torch.testing.assert_close(slow, first + 0.9)
        assert not slow.requires_grad


def test_what_encoder_tokens_look_at_sums_to_one() -> None:
    method = prepared("fpfnet", pool=guided_pool(cues="learned"))
    batch = batch_of(method, good_pictures(4))
    clean, valid = method._tokens(batch.features["tokens"], batch.valid)
    looked = method.head.looked_at(clean, valid, method.head.grid, "all")
    torch.testing.assert_close(looked.sum(dim=1), torch.ones(4))
    assert not looked.requires_grad


def test_without_a_guide_nothing_is_added() -> None:
    method = prepared("fpfnet")
    assert set(batch_of(method, good_pictures(2)).features) == {"tokens"}
    assert method.guide is None and not any(name.startswith("guide") for name in method.state_dict())


def test_a_guided_model_answers_as_before_once_loaded(tmp_path: Path) -> None:
    settings = {"width": 32, "heads": 2, "ffn": 64, "window": 3, "steps": 5}
    fitted = Detector.fit(
        write_good(tmp_path / "good", 6),
        method="fpfnet",
        settings={**settings, "pool": guided_pool(noise="fixed")},
        backbone="tiny",
        weights="random",
        size=64,
    )
    fitted.save(tmp_path / "model")
    path = [tmp_path / "good" / "000.png"]
    answers = [next(one.inspect(path)) for one in (fitted, Detector.load(tmp_path / "model"))]
    assert isinstance(answers[0], Inspection) and isinstance(answers[1], Inspection)
    assert answers[0].score == answers[1].score


def test_a_guide_that_guides_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave the guide out"):
        prepared("fpfnet", pool=guided_pool(noise="none"))
