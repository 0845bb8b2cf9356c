"""Streams of good pictures say what each view is of, and frame any other picture as they frame their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from conftest import textured, write_good
from fettle.backbones import load_backbone
from fettle.errors import PictureError, UsageError
from fettle.feature_cache import TrainingPictures
from fettle.feature_file import FeatureFile
from fettle.feature_stream import GoodFeatures, GoodPicture, in_stream_order
from fettle.images.decode import file_sha256
from fettle.images.framing import Frame, Placed
from fettle.images.picture import Picture
from fettle.protocols import Run, no_progress

SQUARE = Frame(mode="stretch", height=64, width=64)
TILES = Frame(mode="tile", height=64, width=64, overlap=16)


class Plain(nn.Module):
    levels = ("stride8",)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = load_backbone("tiny", self.levels, weights="random")

    def feature_key(self) -> str:
        return "plain"

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        return self.backbone(pictures, self.levels)


def good_features(pictures: list[GoodPicture], frame: Frame) -> GoodFeatures:
    return GoodFeatures(Plain(), pictures, frame, device="cpu", progress=no_progress, what="", batch_size=4)


def training_pictures(pictures: list[GoodPicture], frame: Frame) -> TrainingPictures:
    return TrainingPictures(Plain(), pictures, frame, Run(), batch_size=4)


Stream = Callable[[list[GoodPicture], Frame], GoodFeatures | TrainingPictures]
both = pytest.mark.parametrize("stream", [good_features, training_pictures])


def pictures_in(folder: Path, width: int = 64) -> list[GoodPicture]:
    """7 pictures in stream order, of the products "even" and "odd"."""
    paths = sorted(write_good(folder, 7, width=width).iterdir())
    keys = [file_sha256(path) for path in paths]
    products = [("even", "odd")[i % 2] for i in range(7)]
    return in_stream_order([GoodPicture(*own) for own in zip(paths, keys, keys, products, strict=True)])


@both
def test_each_view_names_its_file_and_its_product(stream: Stream, tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path / "good", width=100)  # two tiles each
    batches = list(stream(pictures, TILES))
    views = [picture for picture in pictures for _ in range(2)]
    assert [path for batch in batches for path in batch.paths] == [str(one.path) for one in views]
    assert [product for batch in batches for product in batch.products] == [one.product for one in views]


def test_a_training_batch_tells_the_product_of_each_of_its_views(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path / "good")
    order = [6, 0, 3, 3]
    batch = training_pictures(pictures, SQUARE).batch(order)
    assert batch.products == tuple(pictures[i].product for i in order)


@both
@pytest.mark.parametrize(
    ("frame", "keeps_aspect"),
    [(SQUARE, False), (Frame(mode="pad", height=64, width=64), True)],
)
def test_any_picture_is_framed_as_those_of_the_stream(
    stream: Stream, frame: Frame, keeps_aspect: bool, tmp_path: Path
) -> None:
    pixels = textured(900, 40, 80)
    path = tmp_path / "other.png"
    Image.fromarray(pixels).save(path)
    framed = stream(pictures_in(tmp_path / "good"), frame).framed(str(path))
    placed: Placed = frame.place(Picture(pixels, path, ""))
    assert torch.equal(framed.pixels, torch.from_numpy(placed.views))
    assert torch.equal(framed.valid, torch.from_numpy(placed.valid))
    assert (framed.sha256, framed.size) == (file_sha256(path), (40, 80))
    assert framed.keeps_aspect is keeps_aspect


@both
def test_a_picture_that_cannot_be_read_is_refused_in_words(stream: Stream, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"torn")
    with pytest.raises(PictureError, match=r"torn\.png"):
        stream(pictures_in(tmp_path / "good"), SQUARE).framed(str(tmp_path / "torn.png"))


@both
def test_no_picture_is_framed_whole_where_frames_are_tiles(stream: Stream, tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path / "good")
    with pytest.raises(UsageError, match=r"tiles.*--frame auto"):
        stream(pictures, TILES).framed(str(pictures[0].path))


class Counted(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.views = 0

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        self.views += len(pictures)
        return super().features(pictures, valid)


def kept_stream(folder: Path, pictures: list[GoodPicture], max_mib: int = 64) -> tuple[GoodFeatures, Counted]:
    method = Counted()
    stream = GoodFeatures(
        method,
        pictures,
        SQUARE,
        device="cpu",
        progress=no_progress,
        what="",
        batch_size=2,
        kept=FeatureFile(folder, max_mib=max_mib),
    )
    return stream, method


def torn_picture(folder: Path, key: str) -> GoodPicture:
    path = folder / "torn.png"
    path.write_bytes(b"torn")
    return GoodPicture(path, key, key)


def test_what_is_kept_is_computed_once(tmp_path: Path) -> None:
    stream, method = kept_stream(tmp_path / "cache", pictures_in(tmp_path / "good"))
    first, again = list(stream), list(stream)
    assert method.views == 7
    assert [batch[2:] for batch in first] == [batch[2:] for batch in again]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.valid, other.valid)
        assert torch.equal(one.features["stride8"], other.features["stride8"])


def test_a_walk_that_was_left_early_is_gone_on_with(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path / "good")
    torn = torn_picture(tmp_path, "0" * 64)  # the first in the order
    stream, method = kept_stream(tmp_path / "cache", [*pictures, torn])
    for number, _ in enumerate(stream):
        if number == 1:
            break
    for _ in range(2):
        assert [key for batch in stream for key in batch.keys] == [one.key for one in pictures]
    assert method.views == 7
    assert [Path(refusal.path).name for refusal in stream.refusals] == ["torn.png"]


def test_two_walks_at_once_see_the_same(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path / "good")
    last = torn_picture(tmp_path, "f" * 64)
    stream, _ = kept_stream(tmp_path / "cache", [*pictures, last])
    keys = [one.key for one in pictures]
    walks = [iter(stream), iter(stream)]
    found: list[list[str]] = [[], []]
    for turn in (0, 1, 1, 0, 0, 0, 1, 1):
        found[turn] += next(walks[turn]).keys
    assert found == [keys, keys]
    assert [key for batch in stream for key in batch.keys] == keys


def test_a_picture_that_changes_is_refused_from_then_on(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path / "good")
    method = Counted()
    stream = GoodFeatures(method, pictures, SQUARE, device="cpu", progress=no_progress, what="")
    list(stream)
    before = pictures[3].path.read_bytes()
    pictures[3].path.write_bytes(pictures[0].path.read_bytes())
    rest = [one.key for one in pictures if one is not pictures[3]]
    assert [key for batch in stream for key in batch.keys] == rest
    pictures[3].path.write_bytes(before)
    assert [key for batch in stream for key in batch.keys] == rest
    (refusal,) = stream.refusals
    assert refusal.path == str(pictures[3].path) and "has changed" in refusal.reason
