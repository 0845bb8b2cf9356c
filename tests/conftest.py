"""Fixtures that many tests share. Real pictures and weights are used where they are at hand."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fettle.backbones import BackboneEntry, register_backbone
from fettle.protocols import Level

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
torch.set_num_threads(1)  # tiny networks gain nothing from threads, and lose much beside other work

TINY_LEVELS = (Level("stride4", 8, 4), Level("stride8", 12, 8), Level("stride16", 16, 16))


_FEATURES = tempfile.TemporaryDirectory(prefix="fettle-test-features-")
os.environ["FETTLE_CACHE"] = _FEATURES.name  # not the user's own


def pytest_unconfigure() -> None:
    _FEATURES.cleanup()


class TinyPyramid(nn.Module):
    """Three strided convolutions; smooth, so that finite differences agree with gradients."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.stem = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.down8 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.down16 = nn.Conv2d(12, 16, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = torch.tanh(self.stem(x))
        second = torch.tanh(self.down8(first))
        third = torch.tanh(self.down16(second))
        by_name = dict(zip(("stride4", "stride8", "stride16"), (first, second, third), strict=True))
        return [by_name[name] for name in self.names]


def tiny_entry() -> BackboneEntry:
    return BackboneEntry(
        name="tiny",
        levels=TINY_LEVELS,
        build=lambda asked, offered: TinyPyramid(asked),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        side_step=32,
    )


register_backbone("tiny", tiny_entry)


def _folder(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} is not set: {what} are not at hand")
    return Path(value)


@pytest.fixture
def real_data() -> Path:
    """The folder of real labelled pictures."""
    return _folder("FETTLE_DATA", "real pictures")


@pytest.fixture
def real_weights() -> Path:
    """The folder of real backbone weights."""
    return _folder("FETTLE_WEIGHTS", "real backbone weights")


def textured(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """A seeded picture (H, W, 3) uint8 of smooth texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 30 * np.sin(x / 5 + rng.uniform(0, 0.3)) + 30 * np.cos(y / 7 + rng.uniform(0, 0.3))
    noise = rng.normal(0, 4, (height, width, 3))
    return np.clip(128 + waves[..., None] + noise, 0, 255).astype(np.uint8)


def write_good(folder: Path, count: int, *, first_seed: int = 0, height: int = 64, width: int = 64) -> Path:
    """A folder of seeded good pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(textured(first_seed + i, height, width)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def good_folder(tmp_path: Path) -> Path:
    """24 good pictures of 64 x 64 px."""
    return write_good(tmp_path / "good", 24)


@pytest.fixture
def labelled_folder(tmp_path: Path) -> Path:
    """A small MVTec-AD layout: 24 good to train, 6 good and 6 scratched to test, with masks."""
    root = tmp_path / "plate"
    write_good(root / "train" / "good", 24)
    write_good(root / "test" / "good", 6, first_seed=100)
    scratched, masks = root / "test" / "scratch", root / "ground_truth" / "scratch"
    scratched.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i in range(6):
        pixels = textured(200 + i)
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[20 + i : 30 + i, 15:45] = 255
        pixels[mask > 0] = 255 - pixels[mask > 0]
        Image.fromarray(pixels).save(scratched / f"{i:03d}.png")
        Image.fromarray(mask).save(masks / f"{i:03d}_mask.png")
    return root


def write_product(root: Path, number: int) -> None:
    """MVTec-AD layout; each product has a brightness of its own."""

    def save(folder: Path, seed: int, mask: np.ndarray | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        pixels = textured(seed) // 2 + 40 * number
        if mask is not None:
            pixels[mask > 0] = 255 - pixels[mask > 0]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{seed}.png")

    for i in range(24):
        save(root / "train" / "good", 1000 * number + i)
    for i in range(4):
        save(root / "test" / "good", 1000 * number + 100 + i)
        mask = np.zeros((64, 64), np.uint8)
        mask[20 + i : 32 + i, 15:45] = 255
        save(root / "test" / "scratch", 1000 * number + 200 + i, mask)
        place = root / "ground_truth" / "scratch"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(place / f"{1000 * number + 200 + i}_mask.png")
