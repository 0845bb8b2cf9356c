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


def test_a_kept_batch_names_the_same_files(tmp_path: Path) -> None:
    stream = good_features(pictures_in(tmp_path / "good"), SQUARE)
    first, again = ([batch.paths for batch in stream] for _ in range(2))
    assert first == again


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
