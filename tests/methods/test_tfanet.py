"""TFA-Net: its templates, what it hides and learns, every switch, and the method around the network."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from conftest import TINY_LEVELS, textured, write_good
from fettle.backbones import load_backbone
from fettle.backbones.registry import find_entry
from fettle.detector import Detector
from fettle.errors import ConfigError, DataError, ModelFolderError
from fettle.images.decode import file_sha256
from fettle.layers.patches import patchify
from fettle.layers.template_aggregation import TemplateAggregation, Tokens
from fettle.layers.template_maps import difference
from fettle.methods.registry import make_config
from fettle.methods.tfanet import TFANet, TFANetConfig
from fettle.model_parts import learnt_tensors, load_learnt
from fettle.perturb.token_mask import keep_indices
from fettle.protocols import Batch, FeatureBatch, FitRecord, FramedPicture, Level, Run, Step

SMALL: dict[str, object] = {
    **{"patch": 2, "width": 32, "heads": 4, "depth": 2, "steps": 40},
    **{"rebuild_width": 16, "rebuild_heads": 4, "rebuild_depth": 1},
}
STEP = Step(3, 40)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(number: int = 4, size: int = 64, first: int = 0) -> Tensor:
    views = [torch.from_numpy(textured(first + i, size, size)) for i in range(number)]
    return (torch.stack(views).permute(0, 3, 1, 2).float() / 255).contiguous()


def all_valid(views: Tensor) -> Tensor:
    return torch.ones(len(views), 1, *views.shape[-2:], dtype=torch.bool)


def framed(views: Tensor, **fields: Any) -> FramedPicture:
    """A picture (1, 3, H, W) as a stream gives it."""
    size = (views.shape[-2], views.shape[-1])
    whole: dict[str, Any] = {"valid": all_valid(views), "sha256": "ab" * 32, "size": size}
    return FramedPicture(pixels=views, **{**whole, "keeps_aspect": True, **fields})


class Stream:
    """Features of some pictures in batches of three, rounded through half precision as real ones are.

    Picture i has the path "i.png" unless paths are given; `files` are pictures that are none of the stream.
    """

    def __init__(
        self,
        method: TFANet,
        views: Tensor,
        *,
        paths: Sequence[str] = (),
        products: Sequence[str] = (),
        valid: Tensor | None = None,
        files: dict[str, FramedPicture] | None = None,
    ) -> None:
        self.method, self.views = method, views
        self.num_pictures = len(views)
        self.paths = tuple(paths) or tuple(f"{i}.png" for i in range(len(views)))
        self.products = tuple(products) or ("",) * len(views)
        self.valid = all_valid(views) if valid is None else valid
        self.files = files or {}

    def __iter__(self) -> Iterator[FeatureBatch]:
        for first in range(0, len(self.views), 3):
            part = slice(first, first + 3)
            views, valid, paths = self.views[part], self.valid[part], self.paths[part]
            with torch.no_grad():
                fused = self.method.features(views, valid)["fused"].half().float()
            yield FeatureBatch({"fused": fused}, valid, paths, paths, paths, self.products[part])

    def framed(self, path: str) -> FramedPicture:
        if path in self.files:
            return self.files[path]
        number = self.paths.index(path)
        own = slice(number, number + 1)
        return framed(self.views[own], valid=self.valid[own], sha256=path)  # which is its key here


def unprepared(**settings: object) -> TFANet:
    config = TFANetConfig.model_validate({**SMALL, **settings})
    levels = TFANet.choose_levels(TINY_LEVELS, config)
    return TFANet(load_backbone("tiny", levels, weights="random"), config, levels)


def fit(views: Tensor | None = None, *, seed: int = 0, stream: Any = None, **settings: object) -> Any:
    """A method that has walked some pictures and drawn its weights, in eval mode; and its record."""
    method = unprepared(**settings)
    walked = Stream(method, pictures() if views is None else views, **(stream or {}))
    record = method.prepare(walked, Run(seed=seed))
    return method.eval(), record


def prepared(views: Tensor | None = None, **more: Any) -> TFANet:
    return cast(TFANet, fit(views, **more)[0])


def batch_of(method: TFANet, views: Tensor | None = None, products: Sequence[str] = ()) -> Batch:
    views = pictures(first=10) if views is None else views
    with torch.no_grad():
        return Batch(method.features(views, all_valid(views)), all_valid(views), None, tuple(products))


def loss_of(method: TFANet, batch: Batch, step: Step = STEP) -> float:
    with torch.no_grad():
        (loss,) = method.train().losses(batch, step)
    method.eval()
    return float(loss.value)


@torch.no_grad()
def map_of(method: TFANet, views: Tensor | None = None) -> Tensor:
    views = pictures(first=10) if views is None else views
    return method(views, all_valid(views)).anomaly_map


def names(method: TFANet) -> list[str]:
    return [template.name for template in method.templates()]


def near_equal(number: int, odd: int | None = None) -> Tensor:
    """Pictures of one part that differ by noise, and one of something else."""
    views = pictures(1).repeat(number, 1, 1, 1)
    views += 0.02 * torch.randn(views.shape, generator=seeded(5))
    if odd is not None:
        views[odd] = 1 - pictures(1, first=77)[0].flip(-1) * 0.9
    return views.clamp(0, 1)


# --- the cached template


def test_cached_tokens_are_those_of_the_template_alone() -> None:
    method = prepared(template="first")
    with torch.no_grad():
        alone = method.features(pictures(1), all_valid(pictures(1)))["fused"].half().float()
        tokens = method.net.embed(method._normed(alone.contiguous()))
    assert torch.equal(method.bank.tokens, tokens)


def test_cached_equals_recomputed() -> None:
    method = prepared(template="first")
    expected = map_of(method)
    with torch.no_grad():
        alone = method.features(pictures(1), all_valid(pictures(1)))["fused"].half().contiguous()
        method.bank.fused, method.bank.tokens = alone, torch.zeros_like(method.bank.tokens)
    assert not torch.equal(map_of(method), expected)
    method.eval()
    assert torch.equal(map_of(method), expected)


def test_tokens_follow_the_weights_when_training_ends() -> None:
    method = prepared().train()
    before = method.bank.tokens.clone()
    with torch.no_grad():
        method.net.embedding.weight.mul_(2)
    assert torch.equal(method.bank.tokens, before)
    assert not torch.equal(method.eval().bank.tokens, before)


def test_a_prepared_method_answers_before_it_is_sent_to_eval_mode() -> None:
    method = unprepared().train()
    method.prepare(Stream(method, pictures()), Run())
    assert torch.equal(map_of(method), map_of(copy.deepcopy(method).eval()))


def test_without_input_tokens_nothing_depends_on_the_input() -> None:
    method = prepared()
    with torch.no_grad():
        fused = method.target(pictures(2, first=10))
        which, none = torch.zeros(2, dtype=torch.long), torch.zeros(2, 1, 64, 64, dtype=torch.bool)
        assert torch.equal(*method.rebuild(fused, none, which))
        assert not torch.equal(*method.rebuild(fused, ~none, which))


def test_a_picture_answers_the_same_alone_and_in_a_batch() -> None:
    method = prepared()
    together = map_of(method)
    for i in range(4):
        alone = map_of(method, pictures(first=10)[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


# --- features


def test_fused_levels_lie_side_by_side_on_the_finest_grid() -> None:
    method, views = unprepared(align="corners"), pictures(2)
    fused = method.features(views, all_valid(views))["fused"]
    levels = method.backbone(views, ("stride4", "stride8", "stride16"))
    assert fused.shape == (2, 8 + 12 + 16, 16, 16)
    assert torch.equal(fused[:, :8], levels["stride4"])
    expected = nn.functional.interpolate(levels["stride16"], (16, 16), mode="bilinear", align_corners=True)
    assert torch.equal(fused[:, 20:], expected)


@pytest.mark.parametrize(("size", "grid"), [(64, 16), (128, 32), (256, 32)])
def test_the_grid_has_no_more_than_32_places_a_side(size: int, grid: int) -> None:
    method, views = unprepared(), torch.rand(1, 3, size, size // 2, generator=seeded())
    assert method.features(views, all_valid(views))["fused"].shape[-2:] == (grid, grid // 2)


def test_a_grid_without_whole_patches_is_told() -> None:
    with pytest.raises(ConfigError, match=r"16 x 16 positions has no whole patches of 3.*--set patch=1"):
        prepared(patch=3, grid_stride=4)


@pytest.mark.parametrize(
    ("sides", "grid"),
    [((64, 64), (16, 16)), ((256, 256), (32, 32)), ((224, 288), (24, 32)), ((448, 608), (22, 32))],
)
def test_the_grid_keeps_the_shape_and_has_whole_patches(sides: Any, grid: Any) -> None:
    method = unprepared()
    assert method._fuse.grid(sides) == grid
    views = torch.rand(1, 3, *sides, generator=seeded())
    with torch.no_grad():
        assert method.features(views, all_valid(views))["fused"].shape[-2:] == grid


def test_a_stride_longer_than_the_picture_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 x 0 positions"):
        prepared(grid_stride=200)


def test_standard_features_have_no_mean_and_unit_deviation() -> None:
    method = prepared()
    with torch.no_grad():
        fused = method.target(pictures())
    torch.testing.assert_close(fused.mean(dim=(0, 2, 3)), torch.zeros(36), atol=1e-2, rtol=0)
    torch.testing.assert_close(fused.std(dim=(0, 2, 3)), torch.ones(36), atol=1e-2, rtol=0)


def test_a_channel_that_never_changes_is_not_blown_up() -> None:
    method = unprepared()
    stem = cast(Any, method.backbone).net.stem
    with torch.no_grad():
        stem.weight[0], stem.bias[0] = 0, 0.5
    method.prepare(Stream(method, pictures()), Run())
    assert float(method.channel_deviation[0]) == pytest.approx(
        1e-6 * float(method.channel_deviation.max()), rel=1e-3
    )
    assert bool(map_of(method.eval()).isfinite().all())


def test_padding_has_no_say_in_the_scale() -> None:
    views, valid = pictures(), all_valid(pictures())
    valid[..., 32:] = False
    cut = prepared(views, stream={"valid": valid})
    ruined = views.clone()
    ruined[..., 56:] = 0  # out of reach of the network's last valid place
    again = prepared(ruined, stream={"valid": valid})
    with torch.no_grad():
        seen = [method.target(pictures(2, first=10)) for method in (cut, again, prepared())]
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)


def test_features_that_are_nan_are_refused() -> None:
    views = pictures()
    views[2, :, 5, 5] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        prepared(views)


def test_unit_features_have_unit_length() -> None:
    method = prepared(feature_norm="l2")
    with torch.no_grad():
        torch.testing.assert_close(method.target(pictures()).norm(dim=1), torch.ones(4, 16, 16))


@pytest.mark.parametrize("feature_norm", ["none", "standard", "l2"])
def test_the_baseline_is_what_predicting_the_mean_costs(feature_norm: str) -> None:
    method, record = fit(feature_norm=feature_norm)
    with torch.no_grad():
        fused = torch.cat([method._normed(batch.features["fused"]) for batch in Stream(method, pictures())])
        target, guess = patchify(fused, 2), patchify(fused.mean(dim=0, keepdim=True), 2).expand(4, -1, -1)
    cosine = (target * guess).sum(2) / target.norm(dim=2) / guess.norm(dim=2)
    expected = 5 * (1 - cosine).mean() + (target - guess).square().mean()
    assert record.facts["mean_cost"] == pytest.approx(float(expected), rel=1e-3)
    (loss,) = method.train().losses(batch_of(method), STEP)
    assert loss.baseline == record.facts["mean_cost"]


def test_one_picture_has_no_baseline() -> None:
    assert fit(pictures(1))[1].facts["mean_cost"] == 0


# --- which template


def test_first_is_the_smallest_path_as_text() -> None:
    paths = ["b/2.png", "b/10.png", "a/9.png", "b/1.png"]
    assert names(prepared(template="first", stream={"paths": paths})) == ["9.png"]
    assert names(prepared(template="first", stream={"paths": ["b3", "b20", "b4", "b5"]})) == ["b20"]


def test_medoid_has_the_least_summed_distance_of_pooled_features() -> None:
    views = pictures(7) * torch.linspace(0.5, 1, 7)[:, None, None, None]
    method = prepared(views)
    with torch.no_grad():
        vectors = nn.functional.normalize(method.target(views).mean(dim=(2, 3)), dim=1).double()
    best = int((1 - vectors @ vectors.T).sum(dim=1).argmin())
    assert names(method) == [f"{best}.png"]


def test_mean_is_of_features_at_each_place_and_shows_that_of_pixels() -> None:
    method, record = fit(template="mean")
    (template,) = method.templates()
    assert (template.name, template.sha256, template.product) == ("mean of 4", "", "")
    torch.testing.assert_close(template.pixels, pictures().mean(dim=0), atol=0.5 / 255 + 1e-6, rtol=0)
    with torch.no_grad():
        mean = method.features(pictures(), all_valid(pictures()))["fused"].mean(dim=0)
    torch.testing.assert_close(method.bank.fused[0].float(), mean, atol=1e-3, rtol=0)
    assert 0 < record.facts["variance_left_by_mean"] < 0.5 and record.warnings == []


def test_mean_warns_where_parts_are_not_aligned() -> None:
    views = torch.cat([pictures(1).roll(8 * i, dims=3) for i in range(8)])
    record = fit(views, template="mean")[1]
    (warning,) = record.warnings
    assert warning.startswith("Unusual template: the mean of 8 pictures leaves") and "medoid" in warning


def test_variance_left_by_the_mean_is_within_places_over_all() -> None:
    method, record = fit(pictures(6), template="mean", feature_norm="none")
    with torch.no_grad():
        fused = method.features(pictures(6), all_valid(pictures(6)))["fused"].double()
    left = (fused - fused.mean(dim=0)).square().sum() / (
        (fused - fused.mean(dim=(0, 2, 3), keepdim=True)).square().sum()
    )
    assert record.facts["variance_left_by_mean"] == pytest.approx(float(left), rel=0.01)


def test_noise_follows_the_seed() -> None:
    one, same, other = (prepared(template="noise", seed=seed) for seed in (0, 0, 1))
    shown = [method.templates()[0].pixels for method in (one, same, other)]
    assert torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])
    assert names(one) == ["noise"] and 0.2 < float(shown[0].std()) < 0.35


def test_learned_tokens_are_no_picture_and_are_trained() -> None:
    method, record = fit(template="learned")
    plain = fit()[1]
    assert method.templates() == [] and len(method.bank) == 0
    assert record.facts["parameters"] - plain.facts["parameters"] == 64 * 32
    (loss,) = method.train().losses(batch_of(method), STEP)
    loss.value.backward()
    assert bool(method.learned.grad.any())


def test_a_file_is_shown_by_its_name_and_hash() -> None:
    given = framed(pictures(1, first=50), sha256="cd" * 32)
    method = prepared(
        template="file", template_file="/somewhere/else/gold.png",
        stream={"files": {"/somewhere/else/gold.png": given}},
    )  # fmt: skip
    (template,) = method.templates()
    assert (template.name, template.sha256) == ("gold.png", "cd" * 32)
    torch.testing.assert_close(template.pixels, pictures(1, first=50)[0], atol=1e-6, rtol=0)
    assert method.config.model_dump(mode="json")["template_file"] == "gold.png"


@pytest.mark.parametrize(
    ("size", "refused"), [((64, 64), False), ((64, 65), False), ((64, 66), True), ((70, 64), True)]
)
def test_a_file_of_another_aspect_is_refused(size: tuple[int, int], refused: bool) -> None:
    def fitted(keeps_aspect: bool) -> TFANet:
        given = framed(pictures(1), size=size, keeps_aspect=keeps_aspect)
        files = {"files": {"gold.png": given}}
        return prepared(template="file", template_file="gold.png", stream=files)

    assert names(fitted(True)) == ["gold.png"]
    if not refused:
        assert names(fitted(False)) == ["gold.png"]
        return
    with pytest.raises(ConfigError, match=r"'gold\.png' is .* Crop it to their shape"):
        fitted(False)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_template_is_normalised_unless_as_published(normalised: bool) -> None:
    method = unprepared(template="first", template_normalised=normalised)
    entered: list[Tensor] = []
    stem = cast(Any, method.backbone).net.stem
    stem.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    method.prepare(Stream(method, pictures()), Run())
    alone = [seen for seen in entered if len(seen) == 1][-1]  # the stream's last batch has one picture, too
    expected = (pictures(1) - 0.5) / 0.25 if normalised else pictures(1)
    matching = [torch.allclose(seen, expected, atol=1e-6) for seen in entered if len(seen) == 1]
    assert alone.shape == expected.shape and any(matching)
    assert torch.allclose(method.templates()[0].pixels, pictures(1)[0], atol=1e-6)


# --- several templates


def two_products() -> tuple[Tensor, list[str]]:
    """Five pictures of a bright and five of a dark product, in turn."""
    views = pictures(10)
    views[1::2] *= 0.3
    return views, ["bright", "dark"] * 5


def of_two(**settings: object) -> TFANet:
    views, products = two_products()
    return prepared(views, stream={"products": products}, **settings)


def used(method: TFANet, views: Tensor) -> list[int]:
    with torch.no_grad():
        remarks = method(views, all_valid(views)).remarks
    assert remarks is not None
    return cast("list[int]", remarks[:, 0].int().tolist())


def test_each_product_has_a_template_of_its_own() -> None:
    method = of_two()
    assert [template.product for template in method.templates()] == ["bright", "dark"]
    means = [float(template.pixels.mean()) for template in method.templates()]
    assert means[0] > 2 * means[1]


def test_one_bank_for_all_has_a_single_template() -> None:
    method = of_two(template_bank="one")
    assert [template.product for template in method.templates()] == [""]


def test_several_medoids_a_product() -> None:
    method = of_two(bank_size=2)
    assert [template.product for template in method.templates()] == ["bright"] * 2 + ["dark"] * 2
    assert len(set(names(method))) == 4


def test_a_picture_picks_the_template_of_its_product() -> None:
    views = pictures(4, first=30)
    views[1::2] *= 0.3
    assert used(of_two(), views) == [0, 1, 0, 1]


def test_a_bank_of_one_equals_the_single_template_bit_for_bit() -> None:
    single, bank = prepared(), prepared(stream={"products": ["plate"] * 4})
    assert torch.equal(map_of(single), map_of(bank))
    batch = batch_of(single)
    assert loss_of(single, batch) == loss_of(bank, batch._replace(products=("plate",) * 4))
    assert [template.product for template in bank.templates()] == ["plate"]


def test_the_order_of_templates_changes_nothing_but_their_numbers() -> None:
    views, products = two_products()
    turned = ["z" if name == "bright" else name for name in products]
    straight, moved = (prepared(views, stream={"products": own}) for own in (products, turned))
    shown = pictures(4, first=30)
    shown[1::2] *= 0.3
    assert used(straight, shown) == [0, 1, 0, 1] and used(moved, shown) == [1, 0, 1, 0]
    torch.testing.assert_close(map_of(moved, shown), map_of(straight, shown), rtol=1e-5, atol=1e-5)


def test_training_compares_with_the_own_products_template_where_products_are_told() -> None:
    method = of_two()
    bright = pictures(2, first=30)
    told = [loss_of(method, batch_of(method, bright, [name] * 2)) for name in ("bright", "dark")]
    assert told[0] != told[1]
    assert loss_of(method, batch_of(method, bright)) == told[0]
    assert loss_of(method, batch_of(method, bright, ["unheard of"] * 2)) == told[0]


def test_a_remark_names_the_template_and_its_product() -> None:
    method = of_two()
    template = method.templates()[1]
    expected = f"compared with template '{template.name}' of dark"
    assert method.remark([1, 0.5]) == (expected,)
    assert method.remark([1, 0.019]) == (f"{expected}, though another is about as near",)


def test_the_margin_is_a_difference_of_cosines() -> None:
    method, views = of_two(), pictures(2, first=30)
    with torch.no_grad():
        remarks = method(views, all_valid(views)).remarks
        vectors = nn.functional.normalize(method.target(views).mean(dim=(2, 3)), dim=1)
    ordered = (vectors @ method.bank.vectors.T).sort(dim=1, descending=True).values
    assert remarks is not None
    torch.testing.assert_close(remarks[:, 1], ordered[:, 0] - ordered[:, 1])


def test_a_single_template_needs_no_remark() -> None:
    assert prepared()(pictures(1), all_valid(pictures(1))).remarks is None


# --- unusual templates


def unusual(record: FitRecord) -> list[str]:
    assert all(warning.startswith("Unusual template: ") for warning in record.warnings)
    return record.warnings


def test_an_odd_file_among_the_good_pictures_warns_by_name_and_with_three_better_ones() -> None:
    views = near_equal(21, odd=4)
    stream = {"files": {"odd.png": framed(views[4:5], sha256="4.png")}}  # one of them, by another path
    record = fit(views, template="file", template_file="odd.png", stream=stream)[1]
    (whole,) = [warning for warning in unusual(record) if "good pictures' middle" in warning]
    assert "'odd.png'" in whole and "--set template=medoid" in whole and "'4.png'" not in whole
    assert whole.count(".png'") == 4
    assert cast(float, record.facts["template_z"]) > 3 and cast(float, record.facts["template_rank"]) > 0.95


def test_an_odd_file_that_is_none_of_the_good_pictures_warns() -> None:
    stream = {"files": {"odd.png": framed(near_equal(2, odd=1)[1:])}}
    record = fit(near_equal(20), template="file", template_file="odd.png", stream=stream)[1]
    assert any("'odd.png' is farther" in warning for warning in unusual(record))


def test_each_product_has_its_own_usual_pictures() -> None:
    views = torch.cat([near_equal(10, odd=0), 1 - near_equal(10)])
    products = ("bolt",) * 10 + ("nut",) * 10
    record = fit(views, template="first", stream={"products": products})[1]
    assert unusual(record) and all("of bolt" in warning for warning in unusual(record))


@pytest.mark.parametrize("norm", ["none", "standard", "l2"])
def test_a_medoid_passes_whatever_the_norm(norm: str) -> None:
    record = fit(near_equal(20), feature_norm=norm)[1]
    assert unusual(record) == [] and cast(float, record.facts["template_rank"]) < 0.2


def test_an_odd_first_picture_among_near_equal_ones_warns() -> None:
    record = fit(near_equal(21, odd=0), template="first")[1]
    assert any("'0.png' is farther" in warning for warning in unusual(record))


@pytest.mark.parametrize("odd", [0, 7, 20])
def test_a_medoid_is_never_the_odd_one_and_passes(odd: int) -> None:
    method, record = fit(near_equal(21, odd=odd))
    assert names(method) != [f"{odd}.png"]
    assert unusual(record) == [] and cast(float, record.facts["template_rank"]) < 0.95


def test_a_medoid_of_all_but_equal_pictures_passes() -> None:
    views = pictures(1).repeat(12, 1, 1, 1)
    views[:, :, 3, 3] += torch.linspace(0, 0.004, 12)[:, None]
    assert unusual(fit(views)[1]) == []


def test_a_template_with_a_spot_warns_of_the_place() -> None:
    spotted = near_equal(1)
    spotted[..., 40:52, 8:20] = 1 - spotted[..., 40:52, 8:20]
    stream = {"files": {"spot.png": framed(spotted)}}
    record = fit(near_equal(20), template="file", template_file="spot.png", stream=stream)[1]
    (local,) = [warning for warning in unusual(record) if "at the same place" in warning]
    assert "'spot.png'" in local
    told = re.search(r"most of all (\d+)% from its top and (\d+)% from its left", local)
    assert told is not None
    row, column = int(told[1]), int(told[2])
    assert 55 <= row <= 85 and 5 <= column <= 35


@pytest.mark.parametrize("number", [10, 30])
def test_a_spot_in_one_of_the_good_pictures_warns_however_few_they_are(number: int) -> None:
    views = near_equal(number)
    views[0, :, 40:52, 8:20] = 1 - views[0, :, 40:52, 8:20]
    record = fit(views, template="first")[1]
    assert any("at the same place" in warning for warning in unusual(record))


@pytest.mark.parametrize("template", ["medoid", "first"])
def test_under_eight_pictures_are_not_enough_to_tell(template: str) -> None:
    record = fit(near_equal(7, odd=0), template=template)[1]
    assert record.facts["template_check"] == "not enough pictures" and record.warnings == []
    assert "template_check" not in fit(near_equal(8), template=template)[1].facts


# --- another template


def test_a_new_template_equals_a_model_that_was_fitted_with_it() -> None:
    given = framed(pictures(1, first=50), sha256="cd" * 32)
    fitted = prepared(template="file", template_file="gold.png", stream={"files": {"gold.png": given}})
    changed = prepared()
    before = map_of(changed)
    changed.set_template(given, "gold.png")
    assert not torch.equal(map_of(changed), before)
    assert torch.equal(map_of(changed), map_of(fitted))
    for name in ("png", "png_ends", "labels", "fused", "valid", "vectors", "tokens"):
        assert torch.equal(getattr(changed.bank, name), getattr(fitted.bank, name)), name


def test_a_new_template_of_a_product_leaves_the_others() -> None:
    method = of_two()
    before, tokens = method.templates(), method.bank.tokens.clone()
    method.set_template(framed(pictures(1, first=50)), "gold.png", "dark")
    after = method.templates()
    assert [(own.name, own.product) for own in after] == [(before[0].name, "bright"), ("gold.png", "dark")]
    assert torch.equal(after[0].pixels, before[0].pixels)
    torch.testing.assert_close(method.bank.tokens[0], tokens[0])
    assert not torch.allclose(method.bank.tokens[1], tokens[1], atol=1e-3)
    shown = pictures(1, first=50)
    assert used(method, shown) == [1]


@pytest.mark.parametrize(
    ("settings", "product", "words"),
    [
        ({}, "nut", "0 templates of product 'nut'"),
        ({}, "", "has 2 templates, and one is replaced"),
        ({"bank_size": 2}, "dark", "2 templates of product 'dark'"),
        ({"template": "learned"}, "", "Fit with a template that is a picture"),
    ],
)
def test_a_new_template_in_no_ones_place_is_refused(settings: Any, product: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        of_two(**settings).set_template(framed(pictures(1)), "gold.png", product)


def test_a_new_template_of_another_aspect_is_refused_and_changes_nothing() -> None:
    method = prepared()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"'wide\.png' is 1\.25 wide for 1 high, the good pictures are 1\.00"
    ):
        method.set_template(framed(pictures(1), size=(64, 80), keeps_aspect=False), "wide.png")
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())


# --- the loss


def target() -> tuple[Tensor, Tensor]:
    """Tokens (B, N, E), and all of them valid."""
    return torch.randn(2, 16, 12, generator=seeded()), torch.ones(2, 16, dtype=torch.bool)


@pytest.mark.parametrize(("factor", "direction", "distance"), [(1, 0, 0), (2, 0, 1), (-1, 2, 4), (0, 1, 1)])
@pytest.mark.parametrize(("lambda_dir", "lambda_dis"), [(5.0, 1.0), (0.0, 1.0), (5.0, 0.0)])
def test_loss_of_a_multiple_of_the_target(
    factor: float, direction: float, distance: float, lambda_dir: float, lambda_dis: float
) -> None:
    tokens, valid = target()
    square = float(tokens.square().mean())
    found = float(
        prepared(lambda_dir=lambda_dir, lambda_dis=lambda_dis)._cost(factor * tokens, tokens, valid)
    )
    assert found == pytest.approx(lambda_dir * direction + lambda_dis * distance * square, abs=1e-5)


def test_loss_is_a_mean_over_valid_tokens() -> None:
    tokens, valid = target()
    valid[0, 5:] = False
    wrong = tokens.clone()
    wrong[0, 5:] = 100
    assert float(prepared()._cost(wrong, tokens, valid)) == pytest.approx(0, abs=1e-5)
    wrong[0, 0] *= -1
    alone = 10 + 4 * float(tokens[0, 0].square().mean())
    assert float(prepared()._cost(wrong, tokens, valid)) == pytest.approx(alone / 21, rel=1e-4)


def test_loss_of_a_batch_of_no_valid_token_is_nought() -> None:
    tokens, valid = target()
    assert float(prepared()._cost(2 * tokens, tokens, ~valid)) == 0


def test_the_loss_is_on_all_tokens_and_of_clean_features() -> None:
    method = prepared().train()
    batch = batch_of(method)
    with torch.no_grad():
        fused = method._normed(batch.features["fused"])
        every = torch.ones(4, 64, dtype=torch.bool)
        ratio = torch.full((4,), 0.5, dtype=torch.float64)
        kept, counts = keep_indices(every, ratio, STEP.generator("mask"))
        seen = Tokens(method.net.embed(fused), every).chosen(kept, counts)
        values = method.net.embed(method.target_of_templates()).expand(4, -1, -1)
        rebuilt, wanted = method.net(seen, Tokens(values, every), (8, 8)), patchify(fused, 2)
        rebuilt += patchify(method.place_mean, 2)
    cosine = (rebuilt * wanted).sum(2) / rebuilt.norm(dim=2) / wanted.norm(dim=2)
    expected = 5 * (1 - cosine).mean() + (rebuilt - wanted).square().mean()
    assert seen.values.shape == (4, 32, 32)
    assert loss_of(method, batch) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"mask_mode": "token"}, {"positions": "learned", "cls_token": True}]
)
def test_a_step_reaches_every_weight_of_the_network_and_none_of_the_backbone(settings: Any) -> None:
    method = prepared(**settings).train()
    (loss,) = method.losses(batch_of(method), STEP)
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert all(bool(p.grad.any()) for p in method.net.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in method.net.parameters())
    assert all(p.grad is None and not p.requires_grad for p in cast(nn.Module, method.backbone).parameters())


def test_a_method_asks_for_no_pictures_and_gives_one_loss() -> None:
    method = prepared().train()
    assert method.needs(STEP) == frozenset() and len(list(method.losses(batch_of(method), STEP))) == 1


# --- hiding in training


@pytest.mark.parametrize("mask_mode", ["drop", "token"])
@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75, "random"])
def test_what_is_hidden_follows_seed_and_step(mask_mode: str, mask_ratio: object) -> None:
    method = prepared(mask_mode=mask_mode, mask_ratio=mask_ratio)
    batch = batch_of(method)
    first = loss_of(method, batch)
    assert loss_of(method, batch) == first
    others = [Step(4, 40), Step(3, 40, seed=1), Step(3, 40, rank=1)]
    assert all(loss_of(method, batch, other) != first for other in others)


def test_with_nothing_hidden_all_steps_are_alike() -> None:
    method = prepared(mask_ratio=0)
    batch = batch_of(method)
    assert loss_of(method, batch) == loss_of(method, batch, Step(4, 40, seed=1))


def test_nothing_is_hidden_in_inspection_or_of_held_out_pictures() -> None:
    masked, plain = prepared(), prepared(mask_ratio=0)
    masked.net.load_state_dict(plain.net.state_dict())
    assert torch.equal(map_of(masked), map_of(plain)) and torch.equal(map_of(masked), map_of(masked))
    batch = batch_of(masked)
    held_out, same = (float(own.held_out_loss(batch).value.detach()) for own in (masked, plain))
    assert held_out == same == pytest.approx(loss_of(plain, batch))


def test_the_global_generator_is_neither_asked_nor_moved() -> None:
    method = prepared()
    batch = batch_of(method)
    torch.manual_seed(1)
    first, before = loss_of(method, batch), torch.get_rng_state()
    map_of(method)
    torch.manual_seed(2)
    assert loss_of(method, batch) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_hides_at_most_nine_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    method = prepared(mask_ratio="random").train()
    fused, valid = torch.randn(200, 36, 16, 16, generator=seeded()), torch.ones(200, 64, dtype=torch.bool)
    monkeypatch.setattr(method.net, "embed", lambda fused, hidden=None: torch.zeros(len(fused), 64, 32))
    seen = method._seen_in_training(fused, valid, STEP)
    share = seen.valid.sum(dim=1) / 64
    assert 6 / 64 <= float(share.min()) < 0.15 and 0.95 < float(share.max()) <= 1
    assert float(share.mean()) == pytest.approx(0.55, abs=0.05)


def test_tokens_that_are_not_valid_are_no_part_of_the_share() -> None:
    method = prepared().train()
    valid = torch.zeros(2, 64, dtype=torch.bool)
    valid[0, :20], valid[1, :40] = True, True
    fused = torch.randn(2, 36, 16, 16, generator=seeded())
    assert method._seen_in_training(fused, valid, STEP).valid.sum(dim=1).tolist() == [10, 20]


def test_a_pool_acts_on_features_before_they_are_hidden() -> None:
    plain, noisy = (
        prepared(mask_ratio=0),
        prepared(mask_ratio=0, pool={"members": [{"perturbation": {"kind": "gaussian"}}]}),
    )
    batch = batch_of(plain)
    assert loss_of(noisy, batch) != loss_of(plain, batch)
    assert loss_of(noisy, batch) == loss_of(noisy, batch) != loss_of(noisy, batch, Step(4, 40))
    assert torch.equal(map_of(noisy), map_of(plain))


# --- every switch


SWITCHES: list[dict[str, object]] = [
    *({"mask_ratio": ratio} for ratio in (0, 0.25, 0.75, "random")),
    *({"mask_ratio": ratio, "mask_mode": "token"} for ratio in (0.25, 0.5, 0.75, "random")),
    *({"template": kind} for kind in ("first", "mean", "noise", "learned")),
    {"template": "first", "template_normalised": False},
    {"discard": "keep_input", "mask_mode": "token"},
    {"discard": "no_template", "mask_mode": "token"},
    {"aggregation": "cross"},
    {"aggregation": "convolution", "mask_mode": "token"},
    *({"depth": 1}, {"rebuild_depth": 2}, {"patch": 1}, {"patch": 4}),
    *({"taps": ("stride8", "stride16")}, {"grid_stride": 8}, {"align": "corners"}),
    *({"feature_norm": "none"}, {"feature_norm": "l2"}),
    *({"positions": "learned", "cls_token": True}, {"cls_token": True}),
    *({"lambda_dir": 0.0}, {"lambda_dis": 0.0}),
    *({"fusion": fusion} for fusion in ("sum", "distance", "direction")),
    *({"score": score} for score in ("max", "mean", "top1%")),
    *({"smooth_sigma": 0.0}, {"residual": "template"}, {"residual": "none"}),
]


def answers(**settings: object) -> tuple[float, Tensor, Tensor]:
    """Loss of a step, map and score."""
    method = prepared(pictures(9), **settings)
    views = pictures(2, first=10)
    loss = loss_of(method, batch_of(method, views))
    with torch.no_grad():
        maps = method(views, all_valid(views))
    return loss, maps.anomaly_map, maps.score


@pytest.fixture(scope="module")
def default_answers() -> tuple[float, Tensor, Tensor]:
    return answers()


@pytest.mark.parametrize("settings", SWITCHES, ids=str)
def test_every_switch_changes_something_and_works(
    settings: dict[str, object], default_answers: tuple[float, Tensor, Tensor]
) -> None:
    loss, anomaly_map, score = answers(**settings)
    assert math.isfinite(loss) and bool(anomaly_map.isfinite().all()) and bool(score.isfinite().all())
    assert anomaly_map.shape == (2, 64, 64)
    plain_loss, plain_map, plain_score = default_answers
    same = loss == plain_loss and torch.equal(anomaly_map, plain_map) and torch.equal(score, plain_score)
    assert not same


def test_learned_positions_begin_as_fixed_ones_and_are_trained() -> None:
    fixed, (learned, record) = fit(), fit(positions="learned")
    assert torch.equal(map_of(learned), map_of(fixed[0]))
    assert record.facts["parameters"] - fixed[1].facts["parameters"] == 64 * (32 + 16)


@torch.no_grad()
def test_a_network_that_says_nothing_rebuilds_the_mean_of_each_place() -> None:
    views = pictures(6)
    method = prepared(views, residual="mean", feature_norm="none")
    nn.init.zeros_(method.net.project_out.weight)
    rebuilt = method.rebuild(method.target(views), all_valid(views), torch.zeros(6, dtype=torch.long))
    mean = method.target(views).mean(dim=0)
    torch.testing.assert_close(rebuilt, mean.expand_as(rebuilt), atol=2e-3, rtol=2e-3)


def test_a_residual_adds_the_templates_features() -> None:
    method = prepared(template="first", residual="template", fusion="distance")
    for part in (method.net.project_out.weight, method.net.project_out.bias):
        nn.init.zeros_(part)
    with torch.no_grad():
        energy = method.patch_energy(pictures(1), all_valid(pictures(1)))
    assert float(energy.abs().max()) < 1e-6  # the picture is the template: nothing is left to rebuild


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "learned", "residual": "template"}, "'learned' has none"),
        ({"discard": "keep_input"}, "set mask_mode=token"),
        ({"discard": "no_template"}, "set mask_mode=token"),
        ({"lambda_dir": 0, "lambda_dis": 0}, "nothing would be learnt"),
        ({"template": "file"}, "give both or none"),
        ({"template_file": "gold.png"}, "give both or none"),
        ({"template": "first", "bank_size": 2}, "set bank_size=1"),
        ({"heads": 3}, "3 heads do not divide a width of 128"),
        ({"mask_ratio": 1}, "mask_ratio"),
        ({"mask_ratio": "often"}, "mask_ratio"),
        ({"fusion": "mean_of_max"}, "fusion"),
        ({"template": "average"}, "template"),
        ({"width": 30}, "multiple of 4"),
        ({"pool": "adaptive"}, "pool"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_told_in_words(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        make_config(TFANet, "compact", settings)
    assert str(refused.value).endswith("--set.")


def test_nothing_hidden_needs_no_mask_token() -> None:
    assert TFANetConfig(discard="keep_input", mask_ratio=0).mask_mode == "drop"


# --- maps and scores


def error_of(method: TFANet, views: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and direction at each fused position, by their formulas."""
    fused = method.target(views)
    rebuilt = method.rebuild(fused, all_valid(views), torch.zeros(len(views), dtype=torch.long))
    cosine = (fused * rebuilt).sum(1) / fused.norm(dim=1) / rebuilt.norm(dim=1)
    return (fused - rebuilt).square().mean(dim=1), 1 - cosine


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["product", "sum", "distance", "direction"])
def test_energy_joins_distance_and_direction(fusion: str) -> None:
    method, views = prepared(fusion=fusion), pictures(2, first=10)
    distance, direction = error_of(method, views)
    expected = {
        **{"product": direction * distance, "sum": 5 * direction + distance},
        **{"distance": distance, "direction": direction},
    }[fusion]
    torch.testing.assert_close(method.patch_energy(views, all_valid(views)), expected)


@torch.no_grad()
def test_calibrated_sum_is_in_units_of_rare_good_places() -> None:
    method, views = prepared(fusion="calibrated_sum"), pictures(2, first=10)
    assert method.units.tolist() == [1, 1]
    valid = all_valid(views)
    valid[..., 32:] = False
    method.finish(Stream(method, views, valid=valid))
    seen = method.features(views, valid)["fused"].half().float()
    which = torch.zeros(2, dtype=torch.long)
    found = difference(method._normed(seen), method.rebuild(method._normed(seen), valid, which))
    for unit, part in zip(method.units, found, strict=True):
        expected = part[:, :, :8].flatten(1).quantile(0.99, dim=1).mean()
        torch.testing.assert_close(unit, expected)
    distance, direction = error_of(method, views)
    expected = distance / method.units[0] + direction / method.units[1]
    torch.testing.assert_close(method.patch_energy(views, all_valid(views)), expected)


@torch.no_grad()
@pytest.mark.parametrize("align", ["mean", "corners"])
def test_maps_are_enlarged_and_blurred_before_they_are_joined(align: str) -> None:
    from scipy import ndimage

    method, views = prepared(align=align, smooth_sigma=8.0), pictures(2, first=10)
    parts = []
    for part in error_of(method, views):
        large = nn.functional.interpolate(
            part[:, None], (64, 64), mode="bilinear", align_corners=align == "corners"
        )
        blurred = [ndimage.gaussian_filter(one[0].numpy(), 2.0, mode="reflect", truncate=4) for one in large]
        parts.append(torch.from_numpy(np.stack(blurred)))
    torch.testing.assert_close(map_of(method, views), parts[0] * parts[1], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_score_is_the_maps_deviation_over_valid_pixels() -> None:
    method, views = prepared(), pictures(2, first=10)
    valid = all_valid(views)
    valid[..., 40:] = False
    maps = method(views, valid)
    expected = maps.anomaly_map[..., :40].flatten(1).std(dim=1, unbiased=False)
    torch.testing.assert_close(maps.score, expected)
    assert not bool(maps.anomaly_map[..., 40:].any())


def test_energy_has_a_gradient_in_the_picture_and_none_in_weights_of_the_backbone() -> None:
    method, views = prepared(), pictures(1, first=10).requires_grad_(True)
    method.patch_energy(views, all_valid(views)).sum().backward()  # type: ignore[no-untyped-call]
    assert views.grad is not None and bool(views.grad.any())
    assert all(p.grad is None for p in cast(nn.Module, method.backbone).parameters())


# --- the shortcut


def own_share(method: TFANet, token: int) -> float:
    """Share of |d p_i / d f_j|^2 that lies in cell j = i, from eight random directions of p_i."""
    fused = method.target(pictures(1, first=10)).detach().requires_grad_(True)
    which = torch.zeros(1, dtype=torch.long)
    rebuilt = patchify(method.rebuild(fused, all_valid(torch.zeros(1, 3, 64, 64)), which), 2)[0, token]
    own = total = 0.0
    for seed in range(8):
        direction = torch.randn(rebuilt.shape, generator=seeded(seed))
        (gradient,) = torch.autograd.grad((rebuilt * direction).sum(), fused, retain_graph=True)
        by_token = patchify(gradient, 2)[0].square().sum(dim=1)
        own, total = own + float(by_token[token]), total + float(by_token.sum())
    return own / total


@pytest.mark.parametrize("token", [0, 27, 63])
def test_no_token_copies_itself_unless_the_inputs_are_kept(token: int) -> None:
    assert 0.001 < own_share(prepared(cls_token=True), token) < 0.06  # all alike would be 1 / 64
    assert own_share(prepared(discard="keep_input", mask_mode="token"), token) > 0.3


# --- presets


@pytest.mark.parametrize("name", ["paper", "official"])
def test_published_presets_hold_the_specifications_values(name: str) -> None:
    preset = TFANet.presets[name]
    assert (preset.backbone, preset.frame, preset.size) == ("wide_resnet50_2.tv_in1k", "square", 256)
    masked = name == "paper"
    expected = {
        **{"taps": ("stride2", "stride4", "stride8", "stride16"), "pool_stem": True, "grid_stride": 4},
        **{"feature_norm": "none", "align": "corners", "patch": 4, "width": 768, "depth": 12, "heads": 12},
        **{"rebuild_width": 512, "rebuild_depth": 8, "rebuild_heads": 16, "cls_token": True},
        **{"positions": "sincos", "mask_ratio": 0.5 if masked else 0.0, "mask_mode": "drop"},
        **{"template": "first", "template_normalised": masked, "fusion": "product", "score": "std"},
        **{"smooth_sigma": 4.0, "lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, "decay": "all"},
        **{"schedule": "constant", "warmup": 0.0, "clip": 0.0, "ema": 0.0, "batch": 4, "epochs": 400},
        **{"lambda_dir": 5.0, "lambda_dis": 1.0, "aggregation": "joint", "discard": "template"},
        **{"residual": "none", "precision": "fp32"},
    }
    config = preset.config.model_dump()
    assert {field: config[field] for field in expected} == expected


def test_compact_holds_the_specifications_values() -> None:
    preset = TFANet.presets["compact"]
    assert (preset.backbone, preset.frame, preset.size) == (None, "auto", 256)
    expected = {
        **{"taps": None, "grid_stride": None, "feature_norm": "standard", "patch": 2},
        **{"width": 128, "depth": 4, "heads": 4, "rebuild_width": 128, "rebuild_depth": 2},
        **{"rebuild_heads": 4, "cls_token": False, "positions": "sincos", "mask_ratio": 0.5},
        **{"mask_mode": "drop", "template": "medoid", "template_normalised": True},
        **{"fusion": "product", "score": "std", "smooth_sigma": 4.0, "lr": 5e-4, "betas": (0.9, 0.95)},
        **{"weight_decay": 0.01, "schedule": "cosine", "warmup": 0.05, "clip": 1.0, "batch": 8},
        **{"steps": 2000, "epochs": None},
    }
    config = preset.config.model_dump()
    assert {field: config[field] for field in expected} == expected


@pytest.mark.parametrize("name", ["paper", "official"])
def test_published_presets_have_the_published_size(name: str) -> None:
    preset = TFANet.presets[name]
    entry = find_entry(str(preset.backbone))
    levels = TFANet.choose_levels(entry.levels, preset.config)
    offered = {level.name: level for level in entry.levels}
    assert sum(offered[name].channels for name in levels) == 1856
    with torch.device("meta"):
        net = TemplateAggregation(1856, (16, 16), cast(TFANetConfig, preset.config))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 148_711_936


def test_taps() -> None:
    choose = TFANet.choose_levels
    pyramid = [Level(f"stride{s}", 8 * s, s) for s in (2, 4, 8, 16, 32)]
    assert choose(pyramid, TFANetConfig()) == ("stride4", "stride8", "stride16")
    assert choose(pyramid[:2], TFANetConfig()) == ("stride2", "stride4")
    blocks = [*(Level(f"block{i}", 384, 16) for i in range(1, 13)), Level("final", 384, 16)]
    assert choose(blocks, TFANetConfig()) == ("block3", "block6", "block9")
    assert choose(blocks, TFANetConfig(taps=("block2",))) == ("block2",)
    with pytest.raises(ConfigError, match="taps"):
        choose(pyramid[4:], TFANetConfig())
    with pytest.raises(ValidationError, match="taps"):
        TFANetConfig(taps=())


# --- what is seen inside


def test_explanation() -> None:
    method, views = prepared(template="first"), pictures(2, first=10)
    found = method.explain(views, all_valid(views))
    assert list(found.maps) == ["adoption", "taken", "adoption_peak", "error"]
    for name, values in found.maps.items():
        assert values.shape == (2, 64, 64) and bool(values.isfinite().all()), name
        assert name == "error" or (float(values.min()) >= 0 and float(values.max()) <= 1), name
    assert 0.3 < float(found.maps["adoption"].mean()) < 0.7  # half-way is as from all alike
    shown = found.pictures["template"]
    assert shown.shape == (2, 3, 64, 64)
    torch.testing.assert_close(shown, pictures(1).expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    assert "no part of the score" in found.words and found.numbers["templates"] == 1


def test_the_explained_error_is_that_of_the_map_unblurred() -> None:
    method, views = prepared(), pictures(2, first=10)
    with torch.no_grad():
        energy = method.patch_energy(views, all_valid(views))  # its scale is raw
    expected = nn.functional.interpolate(energy[:, None], (64, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(method.explain(views, all_valid(views)).maps["error"], expected)


def test_each_picture_is_explained_beside_its_own_template() -> None:
    method = of_two()
    views = pictures(2, first=30)
    views[1] *= 0.3
    shown = method.explain(views, all_valid(views)).pictures["template"]
    for own, template in zip(shown, method.templates(), strict=True):
        assert torch.equal(own, template.pixels)


def test_what_may_not_be_looked_at_is_not_adopted() -> None:
    method, views = prepared(), pictures(1, first=10)
    valid = all_valid(views)
    valid[..., 32:] = False
    adoption = method.explain(views, valid).maps["adoption"]
    assert float(adoption[..., 40:].max()) == 0 and float(adoption[..., :24].min()) > 0.3


def test_a_key_that_no_query_matches_is_adopted_little() -> None:
    """All ask the same, and keys are against it by how much they look like the picture's first corner."""
    method, views = prepared(depth=1, heads=1), pictures(1, first=10)
    block = cast(Any, method.net.aggregation[0])
    with torch.no_grad():
        seen = block.norm1(method.net.embed(method.target(views)))[0]
        strange = seen[0] / seen[0].norm()
        block.attention.qkv.weight[:64], block.attention.qkv.bias[:64] = 0, 0
        block.attention.qkv.bias[0] = 1  # the query
        block.attention.qkv.weight[32] = -8 * strange  # the key
    adoption = method.explain(views, all_valid(views)).maps["adoption"][0]
    alike = (seen @ strange).unflatten(0, (8, 8))
    strangest, usual = adoption[4, 4], adoption[4::8, 4::8][alike < alike.median()]
    assert float(alike[0, 0]) == pytest.approx(float(alike.max()))
    assert float(strangest) < 0.1 and float(usual.mean()) > 0.4


def test_explained_blocks_can_be_chosen() -> None:
    method, views = prepared(), pictures(1, first=10)
    first, second, both = (
        method.explain(views, all_valid(views), blocks=blocks).maps["taken"] for blocks in ([0], [1], None)
    )
    torch.testing.assert_close(both, (first + second) / 2)
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "maps", "shown"),
    [
        ({"template": "learned"}, ["adoption", "taken", "adoption_peak", "error"], []),
        ({"discard": "keep_input", "mask_mode": "token"}, ["error"], ["template"]),
        ({"aggregation": "cross"}, ["adoption", "taken", "adoption_peak", "error"], ["template"]),
        ({"aggregation": "convolution", "mask_mode": "token"}, ["error"], ["template"]),
    ],
)
def test_explanation_of_ablations(settings: Any, maps: list[str], shown: list[str]) -> None:
    found = prepared(**settings).explain(pictures(1), all_valid(pictures(1)))
    assert list(found.maps) == maps and list(found.pictures) == shown


# --- kept and read again


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bank_size": 2},
        {"template": "learned"},
        {"positions": "learned", "cls_token": True},
        {"mask_mode": "token"},
    ],
    ids=str,
)
def test_what_was_learnt_is_kept(settings: dict[str, object]) -> None:
    method = of_two(**settings)
    fresh = TFANet(method.backbone, method.config, method.levels)
    load_learnt(fresh, {name: tensor.clone() for name, tensor in learnt_tensors(cast(Any, method)).items()})
    fresh.eval()
    assert torch.equal(map_of(fresh), map_of(method))
    for own, other in zip(fresh.templates(), method.templates(), strict=True):
        assert own[:3] == other[:3] and torch.equal(own.pixels, other.pixels)


@pytest.mark.parametrize(
    "labels", ["[", "5", '[["a", "b"]]', "[]", '[["a","b",""],["c","d",""]]', "\xff", "[" * 9999]
)
def test_damaged_labels_are_told(labels: str) -> None:
    method = prepared()
    method.bank.labels = torch.frombuffer(bytearray(labels.encode("latin-1")), dtype=torch.uint8)
    for ask in (
        method.templates,
        lambda: method.remark([0, 1.0]),
        lambda: method.explain(pictures(1), all_valid(pictures(1))),
    ):
        with pytest.raises(ModelFolderError, match="Fit it again"):
            ask()


def test_a_damaged_picture_is_told() -> None:
    method = prepared()
    method.bank.png = method.bank.png[:100]
    with pytest.raises(ModelFolderError, match="template is damaged"):
        method.templates()


def test_an_altered_table_of_ends_is_told() -> None:
    method = of_two()
    method.bank.png_ends = method.bank.png_ends.flip(0)
    with pytest.raises(ModelFolderError, match="template is damaged"):
        method.templates()


QUICK: dict[str, Any] = {"method": "tfanet", "backbone": "tiny", "weights": "random", "size": 64}
TINIEST = {**SMALL, "width": 16, "depth": 1, "batch": 4, "steps": 8}


def test_a_saved_model_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    Image.fromarray(textured(50)).save(tmp_path / "gold.png")
    settings = {**TINIEST, "template": "file", "template_file": str(tmp_path / "gold.png")}
    detector = Detector.fit(write_good(tmp_path / "good", 8), settings=settings, **QUICK)
    detector.save(tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    loaded = Detector.load(tmp_path / "model")
    assert [template.name for template in loaded.templates()] == ["gold.png"]
    assert cast(TFANet, loaded.method).config.template_file == Path("gold.png")


def test_a_missing_file_is_told_before_the_training(tmp_path: Path) -> None:
    from fettle.errors import PictureError

    settings = {**TINIEST, "template": "file", "template_file": str(tmp_path / "nowhere.png")}
    with pytest.raises(PictureError, match=r"nowhere\.png"):
        Detector.fit(write_good(tmp_path / "good", 8), settings=settings, **QUICK)


def test_a_bank_that_does_not_fit_the_network_is_told(tmp_path: Path) -> None:
    detector = Detector.fit(write_good(tmp_path / "good", 8), settings=TINIEST, **QUICK)
    bank = cast(TFANet, detector.method).bank
    bank.fused = bank.fused[:, :3]
    detector.save(tmp_path / "model")
    with pytest.raises(ModelFolderError, match="is damaged"):
        Detector.load(tmp_path / "model")


@pytest.mark.parametrize(
    "more", [{}, {"early_stop": 0.9}, {"fusion": "calibrated_sum", "template": "first"}], ids=str
)
def test_resumed_equals_uninterrupted(more: dict[str, object], tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 10)
    settings = {**TINIEST, **more}

    class Stop(Exception):
        pass

    def stop_after_five(what: str, done: int, total: int) -> None:
        if what == "training" and done == 5:
            raise Stop

    def fitted(**others: Any) -> dict[str, Tensor]:
        return learnt_tensors(Detector.fit(good, settings=settings, **QUICK, **others).method)

    uncached = fitted(cache_mib=0)
    with pytest.raises(Stop):
        fitted(training_dir=tmp_path / "state", progress=stop_after_five)
    words: list[str] = []
    resumed = fitted(training_dir=tmp_path / "state", say=words.append)
    assert any("goes on from step 5" in sentence for sentence in words), words
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uncached.items())
    finished: list[str] = []
    again = fitted(training_dir=tmp_path / "state", say=finished.append)
    assert any("finished already" in sentence for sentence in finished), finished
    assert all(torch.equal(again[name], tensor) for name, tensor in uncached.items())


# --- a file of the user's

FEW_STEPS: dict[str, object] = {**SMALL, "steps": 2, "warmup": 0.0, "template": "file"}


def fitted_with(good: Path, file: Path) -> Detector:
    settings = {**FEW_STEPS, "template_file": str(file)}
    tiny: dict[str, object] = {"backbone": "tiny", "weights": "random", "size": 64, "cache_mib": 0}
    return Detector.fit(good, method="tfanet", settings=settings, **tiny)


def test_a_given_template_sets_no_threshold_and_counts_as_learnt_from(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 6)
    outside = write_good(tmp_path / "outside", 1, first_seed=900) / "000.png"
    usual = fitted_with(good, outside)
    assert file_sha256(outside)[:16] in cast("list[str]", usual.card["picture_keys"])
    held = usual.calibration.num_scores
    inside = [fitted_with(good, path).calibration.num_scores for path in good.iterdir()]
    assert sorted(inside) == [held - 1] * held + [held] * (6 - held)
