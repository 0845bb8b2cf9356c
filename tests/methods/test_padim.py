"""PaDiM: Gaussians, their streaming fit, storage and exact leave-one-out (base-methods 5, 8.3 and 10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from conftest import TINY_LEVELS
from fettle.backbones import load_backbone
from fettle.errors import ConfigError, DataError, FettleError
from fettle.methods.padim import (
    Padim,
    PadimConfig,
    _inverse_root,
    accumulate,
    left_out_distances,
    scatter_axes,
)
from fettle.methods.registry import make_config
from fettle.protocols import FeatureBatch, Level, Run

CHANNELS = {"stride4": 8, "stride8": 12, "stride16": 16}
SIDES = {"stride4": 16, "stride8": 8, "stride16": 4}
TOTAL = 36
FOUR = torch.tensor([(1, 0), (0, 1), (2, 1), (1, 2)], dtype=torch.float64)[None]  # (P = 1, n, d)


def padim(**settings: object) -> Padim:
    config = make_config(
        Padim,
        "compact",
        {"channels": TOTAL, "reduction": "draw", "regulariser": 0.01, "shrinkage": 0, **settings},
    )
    assert isinstance(config, PadimConfig)
    levels = Padim.choose_levels(TINY_LEVELS, config)
    return Padim(load_backbone("tiny", levels, weights="random"), config, levels).eval()


class Stream:
    def __init__(self, batches: Sequence[FeatureBatch]) -> None:
        self.batches = batches
        self.num_pictures = sum(len(batch.keys) for batch in batches)
        self.walks = 0

    def __iter__(self) -> Iterator[FeatureBatch]:
        self.walks += 1
        return iter(self.batches)


def features(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Correlated features of `count` pictures of 64 x 64 px, by level."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, channels in CHANNELS.items():
        mix = torch.randn(channels, channels, generator=generator) / channels**0.5
        noise = torch.randn(count, channels, SIDES[name], SIDES[name], generator=generator)
        made[name] = torch.einsum("cd,bdhw->bchw", mix, noise) + torch.randn(
            channels, 1, 1, generator=generator
        )
    return made


def stream_of(made: dict[str, Tensor], batch_size: int = 8, group_size: int = 1) -> Stream:
    count = len(made["stride4"])
    valid = torch.ones(count, 1, 64, 64, dtype=torch.bool)
    keys = [f"{i:03d}" for i in range(count)]
    groups = [f"{i // group_size:03d}" for i in range(count)]
    batches = []
    for first in range(0, count, batch_size):
        part = slice(first, first + batch_size)
        batches.append(
            FeatureBatch(
                {name: level[part] for name, level in made.items()},
                valid[part],
                tuple(keys[part]),
                tuple(groups[part]),
            )
        )
    return Stream(batches)


def fitted(made: dict[str, Tensor], memory_mib: int = 256, **settings: object) -> Padim:
    method = padim(**settings)
    method.prepare(stream_of(made), Run(memory_mib=memory_mib))
    return method


def direct(rows: Tensor, regulariser: float = 0.01) -> tuple[Tensor, Tensor]:
    """Mean (P, d) and A = S + regulariser I (P, d, d) of rows (P, n, d), as they are defined."""
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    covariance = centred.mT @ centred / (rows.shape[1] - 1)
    return mean, covariance + regulariser * torch.eye(rows.shape[2], dtype=rows.dtype)


def mahalanobis(x: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """(P, d) -> (P,), by solving, without any factor of ours."""
    delta = x - mean
    return (delta * torch.linalg.solve(matrix, delta[..., None])[..., 0]).sum(dim=1).sqrt()


# --- the specification's tiny example


def test_tiny_mean_scatter_and_distance_golden() -> None:
    mean, scatter = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float64)
    accumulate(iter([FOUR]), mean, scatter)
    assert mean.tolist() == [[1.0, 1.0]]
    torch.testing.assert_close(
        scatter / 3, torch.eye(2, dtype=torch.float64)[None] * 2 / 3, rtol=0, atol=1e-15
    )
    whitening = _inverse_root(0.01, scatter / 3)
    eye = torch.eye(2, dtype=torch.float64)[None]
    torch.testing.assert_close(whitening, eye / 0.8225975119502044, rtol=1e-14, atol=0)
    distance = (whitening @ (torch.tensor([3.0, 0.0], dtype=torch.float64) - mean)[..., None]).norm()
    assert float(distance) == pytest.approx(2.7183014110978116, rel=1e-14)


def test_tiny_left_out_distances_golden() -> None:
    mean, matrix = direct(FOUR)
    scatter = (matrix - 0.01 * torch.eye(2, dtype=torch.float64)) * 3
    axes, diagonal = scatter_axes(scatter), torch.tensor([0.01], dtype=torch.float64)
    for i in range(4):
        rest = torch.cat([FOUR[:, :i], FOUR[:, i + 1 :]], dim=1)
        squared = left_out_distances((FOUR[:, i : i + 1] - mean[:, None])[:, None], axes, diagonal, left=3)
        assert float(squared.sqrt()) == pytest.approx(2.275520495954297, rel=1e-12)
        assert float(mahalanobis(FOUR[:, i], *direct(rest))) == pytest.approx(2.275520495954297, rel=1e-12)


# --- the streaming fit


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_streaming_gives_the_mean_and_covariance(batch_size: int, offset: float) -> None:
    rows = torch.randn(5, 40, 12, generator=torch.Generator().manual_seed(0))
    mean, scatter = torch.zeros(5, 12), torch.zeros(5, 12, 12)
    accumulate(iter((rows + offset).split(batch_size, dim=1)), mean, scatter)
    expected_mean, matrix = direct(rows.double(), regulariser=0.0)
    torch.testing.assert_close(mean.double() - offset, expected_mean, rtol=0, atol=1e-5 + 1e-6 * offset)
    torch.testing.assert_close(scatter.double() / 39, matrix, rtol=0, atol=1e-5)


def test_large_offset_does_not_break_the_cholesky() -> None:
    """Sums of x x^T lose positive eigenvalues at an offset of 100; fewer pictures than channels, too."""
    made = {name: level + 100 for name, level in features(20).items()}
    method = fitted(made)
    assert bool(torch.isfinite(method.whitening).all())
    rows = method._rows(made).double()  # (P, n, d)
    mean, matrix = direct(rows)
    exact = mahalanobis(rows[:, 3], mean, matrix)
    whitened = (method._dense_whitening().double() @ (rows[:, 3] - method.mean.double())[..., None])[..., 0]
    torch.testing.assert_close(whitened.norm(dim=1), exact, rtol=1e-2, atol=0)


def test_positions_in_blocks_give_the_same_as_in_one() -> None:
    made = features(24)
    whole, parts = padim(), padim()
    in_one, in_blocks = stream_of(made), stream_of(made)
    assert whole.prepare(in_one, Run()).facts["walks"] == 1
    walks = parts.prepare(in_blocks, Run(memory_mib=1)).facts["walks"]
    assert isinstance(walks, int) and walks > 1 and in_blocks.walks > in_one.walks
    torch.testing.assert_close(parts.mean, whole.mean, rtol=0, atol=0)
    torch.testing.assert_close(parts.whitening, whole.whitening, rtol=0, atol=0)


def test_half_precision_storage_keeps_distances() -> None:
    made = features(60)
    method = fitted(made)
    assert method.whitening.dtype == torch.float16
    assert method.whitening.shape == (256, TOTAL * (TOTAL + 1) // 2)
    rows = method._rows(made).double()
    mean, matrix = direct(rows)
    unseen = method._rows(features(10, seed=9)).double()
    for i in range(10):
        exact = mahalanobis(unseen[:, i], mean, matrix)
        stored = (method._dense_whitening().double() @ (unseen[:, i] - method.mean.double())[..., None])[
            ..., 0
        ]
        assert float((stored.norm(dim=1) / exact - 1).abs().max()) < 1e-3


def test_model_of_the_default_size_is_a_third_of_full_inverses() -> None:
    """4,096 positions of 100 channels: 165.5 MB as full fp32 inverses, at most 56.2 MB here."""
    per_position = 100 * 4 + 100 * 101 // 2 * 2
    assert 4096 * per_position < 56.2e6
    method = padim(channels=20)
    method.prepare(stream_of(_drawn(method, features(24), seed=0)), Run())
    stored = {name: t for name, t in method.state_dict().items() if not name.startswith("backbone.")}
    size = sum(t.numel() * t.element_size() for t in stored.values())
    assert size < 256 * (20 * 4 + 20 * 21 // 2 * 2) + 1000


@pytest.mark.parametrize("regulariser", [1e-12, 1e-9])
def test_regulariser_too_small_for_the_storage_is_refused(regulariser: float) -> None:
    """W may reach 1 / sqrt(regulariser), and half precision ends at 65,504."""
    with pytest.raises(FettleError, match="regulariser"):
        fitted(features(5), regulariser=regulariser)


# --- embedding


def test_coarse_cells_are_replicated_and_not_interpolated() -> None:
    method, made = padim(), features(2)
    rows = method._rows(made).reshape(16, 16, 2, TOTAL)
    for i in range(8):
        for j in range(8):
            block = rows[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, :, 8:20]
            assert torch.equal(block, made["stride8"][:, :, i, j].expand(2, 2, 2, 12))
    assert torch.equal(rows[12:16, 4:8, :, 20:], made["stride16"][:, :, 3, 1].expand(4, 4, 2, 16))
    assert torch.equal(rows[5, 9, :, :8], made["stride4"][:, :, 5, 9])


def test_features_are_the_drawn_channels() -> None:
    method = padim(channels=10)
    method.prepare(stream_of(_drawn(method, features(6))), Run(seed=3))
    pictures, valid = torch.rand(2, 3, 64, 64), torch.ones(2, 1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        everything = method.backbone(pictures, method.levels)
        drawn = method.features(pictures, valid)
    stacked = [everything[name] for name in method.levels]
    first = 0
    for name, level in zip(method.levels, stacked, strict=True):
        own = [c - first for c in method.reduction.channels.tolist() if first <= c < first + level.shape[1]]
        assert torch.equal(drawn[name], level[:, own])
        first += level.shape[1]
    assert sum(level.shape[1] for level in drawn.values()) == 10


def _drawn(method: Padim, made: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """The features that the method will ask for once it has drawn its channels."""
    method._choose_channels(Run(seed=seed))
    first, kept = 0, {}
    for name, level in made.items():
        own = [int(c) - first for c in method.reduction.channels if first <= int(c) < first + level.shape[1]]
        kept[name] = level[:, own]
        first += level.shape[1]
    return kept


def test_channel_draw_is_sorted_seeded_and_saved() -> None:
    draws = []
    for seed in (0, 0, 1):
        method = padim(channels=10)
        method.prepare(stream_of(_drawn(method, features(6), seed)), Run(seed=seed))
        draw = method.state_dict()["reduction.channels"]
        assert draw.tolist() == sorted(set(draw.tolist())) and len(draw) == 10
        assert draw.min() >= 0 and draw.max() < TOTAL
        draws.append(draw)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_few_of_many_channels_are_projected_and_most_are_drawn() -> None:
    """36 channels: 17 are less than half."""
    assert padim(channels=17, reduction="auto").reduction.kind == "orthogonal"
    assert padim(channels=18, reduction="auto").reduction.kind == "draw"
    assert padim(channels=17, reduction="draw").reduction.kind == "draw"


def test_more_channels_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"100 channels cannot be kept of 36.*channels=36"):
        padim(channels=100).prepare(stream_of(features(4)), Run())


def test_grid_stride_averages_the_finest_level() -> None:
    method = padim(grid_stride=8, channels=TOTAL)
    method._choose_channels(Run())
    pictures, valid = torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        finest = method.backbone(pictures, method.levels)["stride4"]
        averaged = method.features(pictures, valid)
    assert averaged["stride4"].shape[-2:] == (8, 8) and averaged["stride16"].shape[-2:] == (4, 4)
    torch.testing.assert_close(averaged["stride4"][0, :, 1, 2], finest[0, :, 2:4, 4:6].mean(dim=(1, 2)))


def test_levels_are_strides_4_8_16_or_three_blocks() -> None:
    blocks = [Level(f"block{i}", 384, 14) for i in range(1, 13)] + [Level("final", 384, 14)]
    assert Padim.choose_levels(TINY_LEVELS, PadimConfig()) == ("stride4", "stride8", "stride16")
    assert Padim.choose_levels(blocks, PadimConfig()) == ("block3", "block6", "block9")


# --- scores


def test_an_answer_has_the_same_bits_alone_and_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = features(7)
    method = fitted(made)
    chosen = {name: level[:, :] for name, level in made.items()}
    monkeypatch.setattr(method, "features", lambda pictures, valid: chosen)
    valid = torch.ones(7, 1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        together = method(valid, valid).score
        for i in range(7):
            chosen = {name: level[i : i + 1] for name, level in made.items()}
            assert torch.equal(method(valid[:1], valid[:1]).score[0], together[i])


def test_map_is_the_distance_from_the_gaussian_of_each_position() -> None:
    """Without blur, and with the grid as large as the map's own cells, the peak is the distance's."""
    method = padim(channels=12, sigma=0)
    pictures = torch.rand(30, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(30, 1, 64, 64, dtype=torch.bool)
    method._choose_channels(Run())
    with torch.no_grad():
        made = method.features(pictures, valid)
    method.prepare(stream_of(made), Run())
    rows = method._rows(made).double()
    unseen = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = method._rows(method.features(unseen, valid[:1]))[:, 0].double()
        energy = method.patch_energy(unseen, valid[:1])
    exact = mahalanobis(x, *direct(rows)).reshape(1, 16, 16)
    torch.testing.assert_close(energy.double(), exact, rtol=2e-3, atol=0)


def test_another_frame_size_is_refused() -> None:
    method = fitted(features(6))
    for height, width in ((96, 64), (128, 128), (32, 32)):
        valid = torch.ones(1, 1, height, width, dtype=torch.bool)
        with pytest.raises(ConfigError, match=r"fitted on a grid of \[16, 16\].*Use the model's frame"):
            method(torch.rand(1, 3, height, width), valid)


# --- leaving out, exactly


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("count", "dims"), [(30, 8), (9, 20)])
def test_closed_form_equals_refitting(size: int, count: int, dims: int) -> None:
    """Also with fewer pictures than channels."""
    rows = torch.randn(4, count, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    left = count - size
    axes, diagonal = scatter_axes(centred.mT @ centred), torch.tensor([0.01], dtype=torch.float64)
    for first in range(0, count - size + 1, size):
        group = rows[:, first : first + size]
        rest = torch.cat([rows[:, :first], rows[:, first + size :]], dim=1)
        distance = left_out_distances((group - mean[:, None])[:, None], axes, diagonal, left)[:, 0].sqrt()
        for i in range(size):
            exact = mahalanobis(group[:, i], *direct(rest))
            torch.testing.assert_close(distance[:, i], exact, rtol=1e-9, atol=0)


def test_closed_form_holds_in_single_precision() -> None:
    """What a fit runs: 24 pictures of 36 channels, groups of two, by the method itself."""
    made = features(24)
    method, stream = padim(sigma=0), stream_of(made, group_size=2)
    method.prepare(stream, Run())
    rows = method._rows(made).double()
    for view in method.left_out(stream, Run()):
        place = int(view.key)
        rest = [i for i in range(24) if i // 2 != place // 2]
        exact = mahalanobis(rows[:, place], *direct(rows[:, rest]))
        torch.testing.assert_close(view.energy.flatten().double(), exact.flatten(), rtol=1e-3, atol=0)


def test_groups_of_several_sizes_are_all_judged_once() -> None:
    made = features(12)
    stream = stream_of(made, batch_size=5)
    sizes = (1, 3, 2, 1, 4, 1)
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    first, batches = 0, []
    for batch in stream.batches:
        batches.append(batch._replace(groups=tuple(groups[first : first + len(batch.keys)])))
        first += len(batch.keys)
    method, grouped = padim(), Stream(batches)
    method.prepare(grouped, Run())
    judged = list(method.left_out(grouped, Run()))
    assert sorted(view.key for view in judged) == [f"{i:03d}" for i in range(12)]
    assert {view.key: view.group for view in judged} == {f"{i:03d}": group for i, group in enumerate(groups)}


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_shrinkage_follows_the_scale_of_the_features(scale: float) -> None:
    """The same pictures through a louder backbone give the same distances, also left out."""
    made = {name: scale * level for name, level in features(24).items()}
    method, stream = padim(shrinkage=0.1), stream_of(made)
    diagonal = method.prepare(stream, Run()).facts["diagonal"]
    rows = method._rows(made).double()
    variance = float(rows.var(dim=1).mean())
    assert diagonal == pytest.approx(max(0.01, 0.1 * variance), rel=1e-4)
    for view in method.left_out(stream, Run()):
        place = int(view.key)
        rest = [i for i in range(24) if i != place]
        own = 0.1 * float(rows[:, rest].var(dim=1).mean())  # the left-out picture has no say in it
        exact = mahalanobis(rows[:, place], *direct(rows[:, rest], regulariser=own))
        torch.testing.assert_close(view.energy.flatten().double(), exact.flatten(), rtol=1e-3, atol=0)


def test_left_out_picture_has_no_say_in_the_shrinkage() -> None:
    """An odd good picture raises the variance that is added to the diagonal, and so excuses itself."""
    made = features(24)
    for level in made.values():
        level[0] *= 3
    method, stream = padim(shrinkage=0.1), stream_of(made)
    method.prepare(stream, Run())
    odd = next(view for view in method.left_out(stream, Run()) if view.key == "000")
    rows = method._rows(made).double()
    rest = rows[:, 1:]
    exact = mahalanobis(rows[:, 0], *direct(rest, regulariser=0.1 * float(rest.var(dim=1).mean())))
    torch.testing.assert_close(odd.energy.flatten().double(), exact.flatten(), rtol=1e-3, atol=0)


def test_left_out_distance_that_is_lost_in_rounding_is_refused() -> None:
    """Deviations of 150 against a regulariser of 0.01 leave single precision no digit."""
    made = {name: 150 * level for name, level in features(24).items()}
    method, stream = padim(), stream_of(made)
    method.prepare(stream, Run())
    with pytest.raises(ConfigError, match="regulariser is too small"):
        list(method.left_out(stream, Run()))


# --- few pictures


def test_one_picture_gives_the_plain_distance_to_it() -> None:
    """No covariance: the diagonal alone is left, and with 0.01 the distance is ten times the plain one."""
    both = features(2)
    method = padim()
    (warning,) = method.prepare(stream_of({name: level[:1] for name, level in both.items()}), Run()).warnings
    assert "1 picture: there is no covariance" in warning
    assert not list(method.left_out(stream_of({name: level[:1] for name, level in both.items()}), Run()))
    first, second = method._rows(both).unbind(dim=1)  # (P, d) each
    apart = (method._dense_whitening() @ (second - first)[..., None]).norm(dim=(1, 2))
    torch.testing.assert_close(apart, 10 * (second - first).norm(dim=1), rtol=1e-3, atol=1e-5)


def test_no_picture_is_refused() -> None:
    with pytest.raises(DataError, match="no good picture to learn from"):
        fitted({name: level[:0] for name, level in features(1).items()})


def test_few_pictures_are_warned_of() -> None:
    assert not padim().prepare(stream_of(features(20)), Run()).warnings
    (warning,) = padim().prepare(stream_of(features(19)), Run()).warnings
    assert "19 pictures only" in warning


# --- parts of frames


def parts_of(made: dict[str, Tensor], places: Sequence[tuple[int, int]], side: int) -> dict[str, Tensor]:
    """Features of square parts of one picture of 64 x 64 px, cut out of the whole's."""
    cut: dict[str, Tensor] = {}
    for name, level in made.items():
        stride = 64 // SIDES[name]
        rows = [
            level[0, :, top // stride : (top + side) // stride, left // stride : (left + side) // stride]
            for top, left in places
        ]
        cut[name] = torch.stack(rows)
    return cut


def test_a_parts_energy_is_the_wholes_at_its_place() -> None:
    """With the backbone out of the way, whose padding alone may make a difference."""
    method, made = fitted(features(60)), features(1, seed=9)
    method.settle(torch.linspace(3, 9, 100))
    places = [(0, 0), (16, 32), (32, 16)]

    def energy_of(found: dict[str, Tensor], origins: Sequence[tuple[int, int]], side: int) -> Tensor:
        method.features = lambda pictures, valid: found  # type: ignore[method-assign]
        pictures = torch.zeros(len(origins), 3, side, side)
        valid = torch.ones(len(origins), 1, side, side, dtype=torch.bool)
        return method.crop_energy(pictures, valid, origins)

    method.features = lambda pictures, valid: made  # type: ignore[method-assign]
    all_valid = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    whole = method.patch_energy(torch.zeros(1, 3, 64, 64), all_valid)[0]
    parts = energy_of(parts_of(made, places, 32), places, 32)
    for part, (top, left) in zip(parts, places, strict=True):
        own = whole[top // 4 : top // 4 + 8, left // 4 : left // 4 + 8]
        torch.testing.assert_close(part, own, rtol=1e-5, atol=1e-5)
    elsewhere = energy_of(parts_of(made, places, 32), [(16, 16)] * 3, 32)
    assert float((elsewhere - parts).abs().mean()) > 0.05


def test_energy_has_a_gradient_after_an_inspection() -> None:
    """What an inspection without gradients has computed and kept serves later calls that want them."""
    method, pictures = fitted(_drawn(padim(channels=10), features(24)), channels=10), torch.rand(1, 3, 64, 64)
    valid = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    with torch.inference_mode():
        method(pictures, valid)
    for energy in (
        method.patch_energy,
        lambda pictures, valid: method.crop_energy(pictures, valid, [(0, 0)]),
    ):
        leaf = pictures.clone().requires_grad_()
        energy(leaf, valid).sum().backward()
        assert leaf.grad is not None and bool((leaf.grad != 0).any())
