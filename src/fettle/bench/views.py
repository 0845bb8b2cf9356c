"""Framed good pictures as bytes, so that something can be pasted into them before a network sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fettle.datasets.records import Dataset
from fettle.errors import DataError
from fettle.images.framing import Frame
from fettle.images.loading import Loaded, load_framed


class Views(NamedTuple):
    """Views of pictures in one frame: pixels (n, H, W, 3) uint8, and which are valid, (n, H, W) bool."""

    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_]


def framed_views(paths: Sequence[Path], frame: Frame) -> Views:
    """The views of all pictures that can be read, in their order.

    Raises:
        DataError: there is none.
    """
    pixels, valid = [], []
    for loaded in load_framed(paths, lambda path: path, frame):
        if isinstance(loaded, Loaded):
            pixels.append(np.rint(loaded.placed.views * 255).astype(np.uint8).transpose(0, 2, 3, 1))
            valid.append(loaded.placed.valid[:, 0])
    if not pixels:
        raise DataError(
            f"None of {len(paths)} good pictures could be read.", "Give a data set with good pictures."
        )
    return Views(np.concatenate(pixels), np.concatenate(valid))


def held_out_good(dataset: Dataset, most: int) -> list[Path]:
    """At most so many good pictures of the test part, evenly spread over it."""
    paths = [record.path for record in dataset.for_testing() if record.is_good]
    places = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    return [paths[place] for place in places]


def batches(views: Views, device: str, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures (B, 3, H, W) float32 in 0..1 and valid (B, 1, H, W) bool, `size` at a time."""
    for start in range(0, len(views.pixels), size):
        pixels = torch.from_numpy(views.pixels[start : start + size]).to(device)
        valid = torch.from_numpy(views.valid[start : start + size]).to(device)
        yield pixels.permute(0, 3, 1, 2).float().contiguous() / 255, valid[:, None]
