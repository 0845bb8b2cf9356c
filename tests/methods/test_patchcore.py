"""PatchCore: its embeddings, memory bank and scores (base-methods sections 3 and 10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import TINY_LEVELS, textured
from fettle.backbones import load_backbone
from fettle.errors import ConfigError, DataError, UsageError
from fettle.methods.patchcore import (
    PatchCore,
    PatchCoreConfig,
    pooled_embedding,
    reweighted,
    reweighted_score,
)
from fettle.methods.registry import make_config
from fettle.protocols import FeatureBatch, Level, Run

DIMS = 28  # 12 + 16 channels of the tiny backbone's two levels


def patchcore(**settings: object) -> PatchCore:
    config = make_config(PatchCore, "compact", settings)
    assert isinstance(config, PatchCoreConfig)
    levels = PatchCore.choose_levels(TINY_LEVELS, config)
    return PatchCore(load_backbone("tiny", levels, weights="random"), config, levels).eval()


class Stream:
    """Features as a fit would see them, one picture or more a batch."""

    def __init__(self, batches: Sequence[FeatureBatch]) -> None:
        self.batches = batches
        self.num_pictures = len({key for batch in batches for key in batch.keys})

    def __iter__(self) -> Iterator[FeatureBatch]:
        return iter(self.batches)


def one_picture(key: str, patches: Tensor, valid: Tensor | None = None, group: str = "") -> FeatureBatch:
    """Patches (D, h, w) of one picture of 8 h x 8 w px."""
    size = (8 * patches.shape[1], 8 * patches.shape[2])
    mask = torch.ones(1, 1, *size, dtype=torch.bool) if valid is None else valid
    return FeatureBatch({"patches": patches[None]}, mask, (key,), (group or key,))


def random_stream(num_pictures: int, side: int = 8, seed: int = 0) -> Stream:
    generator = torch.Generator().manual_seed(seed)
    return Stream(
        [
            one_picture(f"{i:02d}", torch.randn(DIMS, side, side, generator=generator))
            for i in range(num_pictures)
        ]
    )


def rows_of(stream: Stream) -> Tensor:
    return torch.cat([batch.features["patches"][0].flatten(1).T for batch in stream])


def pictures(*seeds: int) -> tuple[Tensor, Tensor]:
    batch = torch.from_numpy(np.stack([textured(seed) for seed in seeds])).permute(0, 3, 1, 2) / 255
    return batch.float().contiguous(), torch.ones(len(seeds), 1, 64, 64, dtype=torch.bool)


def fitted(**settings: object) -> PatchCore:
    """Fitted on six textured pictures."""
    method = patchcore(**settings)
    with torch.no_grad():
        patches = method.features(*pictures(*range(6)))["patches"]
    method.prepare(Stream([one_picture(str(i), one) for i, one in enumerate(patches)]), Run())
    return method


# --- embeddings


def literal_embedding(levels: Sequence[Tensor]) -> Tensor:
    """The official order: unfold 3 x 3, resize, adaptive pool to 1024 a level, stack, pool to 1024."""
    grid = levels[0].shape[-2:]
    pooled = []
    for level in levels:
        batch, channels, height, width = level.shape
        unfolded = F.unfold(level, 3, padding=1).view(batch, channels * 9, height, width)
        if (height, width) != tuple(grid):
            unfolded = F.interpolate(unfolded, size=grid, mode="bilinear", align_corners=False)
        rows = unfolded.flatten(2).transpose(1, 2)  # (B, h w, 9 C), in the order (c, ky, kx)
        pooled.append(F.adaptive_avg_pool1d(rows, 1024))
    return F.adaptive_avg_pool1d(torch.cat(pooled, dim=2), 1024)


def test_pooled_embedding_equals_the_literal_form() -> None:
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(1, 512, 28, 28, generator=generator)
    coarse = torch.rand(1, 1024, 14, 14, generator=generator)
    embedded = pooled_embedding(fine, coarse)[0].flatten(1).T
    assert embedded.shape == (784, 1024)
    torch.testing.assert_close(embedded, literal_embedding([fine, coarse])[0], rtol=0, atol=1e-6)


def test_concat_embedding_is_local_means_side_by_side() -> None:
    method = patchcore()
    batch, valid = pictures(3)
    with torch.no_grad():
        levels = method.backbone(batch, method.levels)
        patches = method.features(batch, valid)["patches"]
    assert patches.shape == (1, DIMS, 8, 8)
    kernel = torch.full((1, 1, 3, 3), 1 / 9)  # zeros outside count in the mean
    fine, coarse = (
        F.conv2d(level.transpose(0, 1), kernel, padding=1).transpose(0, 1) for level in levels.values()
    )
    coarse = F.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(patches, torch.cat([fine, coarse], dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", [("stride8", "stride16"), ("stride4", "stride8")])
def test_pooled_embedding_of_other_channels_is_refused(levels: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"512 and 1024 channels, not \[\d+, \d+\].*embedding=concat"):
        patchcore(embedding="pooled", levels=levels)


def test_levels_are_strides_8_and_16_or_middle_blocks() -> None:
    blocks = [Level(f"block{i}", 384, 14) for i in range(1, 13)] + [Level("final", 384, 14)]
    assert PatchCore.choose_levels(TINY_LEVELS, PatchCoreConfig()) == ("stride8", "stride16")
    assert PatchCore.choose_levels(blocks, PatchCoreConfig()) == ("block6", "block9")
    assert PatchCore.choose_levels(blocks, PatchCoreConfig(levels=("block2",))) == ("block2",)


# --- the bank


def test_bank_holds_every_patch_while_the_cap_allows() -> None:
    stream, method = random_stream(4), patchcore()
    method.prepare(stream, Run())
    torch.testing.assert_close(method.bank, rows_of(stream), rtol=0, atol=0)


def test_bank_is_a_choice_of_patches_as_they_are() -> None:
    stream, method = random_stream(4), patchcore(bank_rows=50)
    record = method.prepare(stream, Run())
    assert method.bank.shape == (50, DIMS) and record.facts["bank_rows"] == 50
    distance = torch.cdist(method.bank.double(), rows_of(stream).double())
    assert float(distance.amin(dim=1).max()) < 1e-6
    assert len(set(distance.argmin(dim=1).tolist())) == 50  # each once


@pytest.mark.parametrize(("ratio", "rows"), [(0.1, 25), (0.5, 128), (1.0, 256)])
def test_bank_ratio_is_a_share_of_all_patches(ratio: float, rows: int) -> None:
    method = patchcore(bank_ratio=ratio, bank_rows=0)
    method.prepare(random_stream(4), Run())
    assert len(method.bank) == rows


def test_bank_cap_holds_beside_the_ratio() -> None:
    method = patchcore(bank_ratio=0.5, bank_rows=40)
    method.prepare(random_stream(4), Run())
    assert len(method.bank) == 40


class Losing(Stream):
    """Without its second picture from the second walk on."""

    walks = 0

    def __iter__(self) -> Iterator[FeatureBatch]:
        self.walks += 1
        return (one for i, one in enumerate(self.batches) if self.walks == 1 or i != 1)


def test_a_picture_that_goes_while_it_is_learnt_from_is_named() -> None:
    batches = [one._replace(paths=(f"{one.keys[0]}.png",)) for one in random_stream(4).batches]
    with pytest.raises(DataError, match=r"'01\.png' was changed or removed"):
        patchcore(bank_rows=50).prepare(Losing(batches), Run())


def test_bank_ratio_counts_every_tile_of_a_picture() -> None:
    """Three pictures of four tiles each: the share is of 12 x 64 patches."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        FeatureBatch(
            {"patches": torch.randn(4, DIMS, 8, 8, generator=generator)},
            torch.ones(4, 1, 64, 64, dtype=torch.bool),
            (key,) * 4,
            (key,) * 4,
        )
        for key in "abc"
    ]
    method = patchcore(bank_ratio=0.25, bank_rows=0)
    method.prepare(Stream(batches), Run())
    assert len(method.bank) == 192


def test_bank_ratio_counts_valid_patches_only() -> None:
    valid = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    valid[..., :24] = True  # 3 of 8 columns of patches
    batches = [one_picture(key, torch.randn(DIMS, 8, 8), valid) for key in "abcde"]
    method = patchcore(bank_ratio=0.5, bank_rows=0)
    method.prepare(Stream(batches), Run())
    assert len(method.bank) == 60


@pytest.mark.parametrize("settings", [{}, {"score": "patch_max", "reweight": 3}])
def test_levels_on_their_own_grids_give_the_same_answers(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    method = fitted(**settings)
    asked: list[int] = []
    with torch.no_grad():
        expected = method(*pictures(20, 21))
        monkeypatch.setattr(
            "fettle.methods.patchcore.grids_pay", lambda levels: not asked.append(len(levels))
        )
        found = method(*pictures(20, 21))
    assert asked == [2]
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-5, atol=1e-6)


def test_ratio_that_gives_no_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"0\.10% of 64 patches is no row.*Raise bank_ratio"):
        patchcore(bank_ratio=0.001).prepare(random_stream(1), Run())


def test_no_picture_is_refused() -> None:
    with pytest.raises(DataError, match="no good picture"):
        patchcore().prepare(Stream([]), Run())


def test_memory_that_cannot_hold_the_bank_is_refused_with_what_is_needed() -> None:
    with pytest.raises(UsageError, match=r"Set memory_mib to at least \d+"):
        patchcore(bank_rows=200_000).prepare(random_stream(2), Run(memory_mib=16))


@pytest.mark.parametrize("rows", [4096, 30])
def test_tokens_outside_the_valid_part_never_enter_the_bank(rows: int) -> None:
    """They are marked by a value that no other patch has, and are the farthest of all."""
    batches = []
    for i in range(3):
        patches = torch.randn(DIMS, 8, 8, generator=torch.Generator().manual_seed(i))
        patches[:, :, 5:] = 1000.0
        valid = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        valid[..., 40:] = False
        batches.append(one_picture(str(i), patches, valid))
    method = patchcore(bank_rows=rows)
    method.prepare(Stream(batches), Run())
    assert len(method.bank) == min(rows, 3 * 40)
    assert float(method.bank.max()) < 100


def test_token_with_one_valid_pixel_enters_the_bank() -> None:
    valid = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    valid[0, 0, 63, 0] = True
    patches = torch.randn(DIMS, 8, 8, generator=torch.Generator().manual_seed(0))
    method = patchcore()
    method.prepare(Stream([one_picture("a", patches, valid)]), Run())
    torch.testing.assert_close(method.bank, patches[None, :, 7, 0])


def test_approximate_selection_keeps_to_the_cap() -> None:
    method = patchcore(selection="approximate", bank_rows=20)
    method.prepare(random_stream(6), Run())
    assert 0 < len(method.bank) <= 20


def test_paper_preset_projects_to_128_dims_and_keeps_a_tenth() -> None:
    config = PatchCore.presets["paper"].config
    assert isinstance(config, PatchCoreConfig)
    assert (config.bank_ratio, config.projection_dims, config.embedding) == (0.1, 128, "pooled")
    assert (config.score, config.neighbours, config.reweight, config.sigma) == ("patch_max", 1, 0, 4.0)


# --- scores


def distances(method: PatchCore, batch: Tensor, valid: Tensor) -> Tensor:
    """(B, h, w, rows), in fp64."""
    with torch.no_grad():
        patches = method.features(batch, valid)["patches"].double().permute(0, 2, 3, 1)
    return torch.cdist(patches, method.bank.double())


@pytest.mark.parametrize("k", [1, 3, 50])
def test_patch_score_is_the_mean_distance_to_k_rows(k: int) -> None:
    method = fitted(neighbours=k, score="patch_max", bank_rows=100)
    batch, valid = pictures(50, 51)
    expected = distances(method, batch, valid).topk(k, largest=False).values.mean(dim=3)
    score = method(batch, valid).score
    torch.testing.assert_close(score.double(), expected.flatten(1).amax(dim=1), rtol=1e-5, atol=1e-6)


def test_more_neighbours_than_rows_takes_all_rows() -> None:
    method = fitted(neighbours=50, score="patch_max", bank_rows=7)
    batch, valid = pictures(50)
    expected = distances(method, batch, valid).mean(dim=3).amax()
    assert float(method(batch, valid).score) == pytest.approx(float(expected), rel=1e-5)


def test_score_modes_share_the_map_and_differ_in_the_score() -> None:
    batch, valid = pictures(50, 51)
    of_map, of_patch = fitted(score="map_max"), fitted(score="patch_max")
    one, other = of_map(batch, valid), of_patch(batch, valid)
    assert torch.equal(one.anomaly_map, other.anomaly_map)
    assert torch.equal(one.score, one.anomaly_map.flatten(1).amax(dim=1))
    assert bool((other.score > one.score).all())  # smoothing takes the peak down


@pytest.mark.parametrize("mode", ["map_max", "patch_max"])
def test_learnt_picture_scores_zero(mode: str) -> None:
    """Its every patch is in the bank, and the distance is exact down to zero."""
    assert float(fitted(score=mode)(*pictures(2)).score) == pytest.approx(0, abs=1e-5)


def test_patch_score_takes_valid_patches_only() -> None:
    method = fitted(score="patch_max")
    batch, valid = pictures(50)
    batch[..., 48:] = 0
    valid[..., 16:] = False
    expected = distances(method, batch, valid).amin(dim=3)[..., :2].amax()
    assert float(method(batch, valid).score) == pytest.approx(float(expected), rel=1e-5)


def test_faiss_and_matrix_search_give_the_same_answer() -> None:
    batch, valid = pictures(50, 51)
    by_matrix, by_faiss = (
        fitted(search=search, bank_rows=200)(batch, valid) for search in ("matrix", "faiss")
    )
    torch.testing.assert_close(by_faiss.anomaly_map, by_matrix.anomaly_map, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_faiss.score, by_matrix.score, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("search", ["matrix", "faiss"])
def test_a_state_that_is_loaded_later_is_searched(search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fettle.methods.patchcore.grids_pay", lambda levels: True)
    batch, valid = pictures(50)
    method, other = fitted(search=search, bank_rows=200), fitted(search=search, bank_rows=200)
    other.bank = 1.5 * other.bank.flip(0)
    method(batch, valid)
    method.load_state_dict(other.state_dict())
    assert torch.equal(method(batch, valid).anomaly_map, other(batch, valid).anomaly_map)


def test_energy_at_a_bank_row_is_the_least_and_has_a_finite_gradient() -> None:
    method = fitted()
    batch, valid = pictures(2)
    batch.requires_grad_(True)
    energy = method.patch_energy(batch, valid)
    torch.testing.assert_close(energy, torch.full_like(energy, 1e-4), rtol=0.1, atol=1e-5)
    energy.sum().backward()
    assert batch.grad is not None and bool(torch.isfinite(batch.grad).all())


def test_energy_is_the_distance_of_the_map() -> None:
    method = fitted(bank_rows=100)
    batch, valid = pictures(50)
    expected = (distances(method, batch, valid).amin(dim=3).square() + 1e-8).sqrt()
    torch.testing.assert_close(method.patch_energy(batch, valid).double(), expected, rtol=1e-5, atol=1e-6)


# --- the paper's re-weighting


def test_reweighted_score_golden() -> None:
    score = reweighted_score(torch.tensor([[2.0, 2.5, 3.0]], dtype=torch.float64))
    assert float(score) == pytest.approx(1.6273525535483049, rel=1e-14)
    assert float(score) / 2 == pytest.approx(0.8136762767741524, rel=1e-14)


def test_reweighting_does_not_overflow() -> None:
    score = reweighted_score(torch.tensor([[500.0, 500.5, 501.0], [500.0, 900.0, 700.0]]))
    assert bool(torch.isfinite(score).all())
    assert float(score[0]) == pytest.approx(500 * 0.8136762767741524, rel=1e-5)


def test_reweighting_takes_the_neighbours_of_the_nearest_row_in_the_bank() -> None:
    bank = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [50.0, 50.0]], dtype=torch.float64)
    worst = torch.tensor([[-3.0, 0.0]], dtype=torch.float64)  # m* is row 0, its neighbours 0, 1 and 2
    d = torch.tensor([3.0, 4.0, 13**0.5], dtype=torch.float64)
    expected = 3 * (1 - d[0].exp() / d.exp().sum())
    assert float(reweighted(worst, bank, torch.tensor([0]), 3)) == pytest.approx(float(expected), rel=1e-12)


def test_reweighting_changes_the_score_and_never_the_map() -> None:
    batch, valid = pictures(50)
    plain = fitted(score="patch_max", bank_rows=100)(batch, valid)
    weighted = fitted(score="patch_max", bank_rows=100, reweight=9)(batch, valid)
    off = fitted(score="patch_max", bank_rows=100, reweight=1)(batch, valid)
    assert torch.equal(weighted.anomaly_map, plain.anomaly_map)
    assert 0 < float(weighted.score) < float(plain.score)
    assert torch.equal(off.score, plain.score)


# --- leaving out


def test_picture_that_owns_the_whole_bank_costs_no_other_picture_its_score() -> None:
    """A bank of one row leaves its owner without a judge, and every other picture with one."""
    stream, method = random_stream(5), patchcore(bank_rows=1)
    method.prepare(stream, Run())
    owner = stream.batches[int(method._owners[0])].keys[0]
    judged = [view.key for view in method.left_out(stream, Run())]
    assert judged == [batch.keys[0] for batch in stream if batch.keys[0] != owner]


# --- settings


def test_unknown_field_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no field 'bank_row'.*Did you mean 'bank_rows'\?"):
        make_config(PatchCore, "compact", {"bank_row": 100})


def test_value_that_a_field_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'neighbours'.*cannot be 0"):
        make_config(PatchCore, "compact", {"neighbours": 0})


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'paper'"):
        make_config(PatchCore, "papers", {})


# --- parts of frames


def test_a_parts_energy_is_the_wholes_at_its_place() -> None:
    """With the backbone out of the way; the bank knows no places, so that the origin says nothing."""
    method = fitted()
    method.settle(torch.linspace(0, 2, 100))
    made = torch.randn(1, DIMS, 8, 8, generator=torch.Generator().manual_seed(9))

    def energy_of(patches: Tensor, origins: Sequence[tuple[int, int]] | None) -> Tensor:
        method.features = lambda pictures, valid: {"patches": patches}  # type: ignore[method-assign]
        shape = (len(patches), 3, 8 * patches.shape[2], 8 * patches.shape[3])
        batch, valid = torch.zeros(shape), torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool)
        if origins is None:
            return method.patch_energy(batch, valid)
        return method.crop_energy(batch, valid, origins)

    whole = energy_of(made, None)[0]
    places = [(0, 0), (32, 16)]
    cut = torch.cat([made[:, :, t // 8 : t // 8 + 4, w // 8 : w // 8 + 4] for t, w in places])
    parts = energy_of(cut, places)
    for part, (top, left) in zip(parts, places, strict=True):
        own = whole[top // 8 : top // 8 + 4, left // 8 : left // 8 + 4]
        torch.testing.assert_close(part, own, rtol=1e-5, atol=1e-5)
    assert torch.equal(energy_of(cut, [(16, 16), (0, 0)]), parts)
    assert float((parts[0] - parts[1]).abs().max()) > 0.01
