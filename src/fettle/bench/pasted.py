"""Defects pasted into good pictures: where nobody has labelled a defect, its place is known exactly.

A rectangle or a blob is filled from another place of a good picture, turned and of another brightness. Such a
defect is no real one; it tells whether a method can see that something does not belong where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fettle.errors import UsageError

AREA = (0.005, 0.04)
"""Least and largest share of a picture's valid pixels that a defect covers."""

_VISIBLE = 5.0  # grey levels of mean difference: less is drawn anew
_TRIES = 20
_GAIN = (0.9, 1.1)
_SHIFT = (-12.0, 12.0)  # grey levels
_WAVES = 4  # of a blob's outline


class Pasted(NamedTuple):
    """A picture (H, W, 3) uint8 with a defect, and its mask (H, W) bool: exactly the pixels that differ."""

    picture: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def paste_defects(
    pictures: Sequence[NDArray[np.uint8]], seed: int, valid: Sequence[NDArray[np.bool_]] | None = None
) -> list[Pasted]:
    """One defect in each picture, from it or another one.

    Args:
        pictures: (H, W, 3) each.
        seed: the same gives the same defects.
        valid: (H, W) each: a defect stays inside. None: anywhere.
    """
    pasted = []
    for number, picture in enumerate(pictures):
        rng = np.random.default_rng([seed, number])
        donor = pictures[int(rng.integers(len(pictures)))]
        pasted.append(paste_defect(picture, donor, rng, valid=None if valid is None else valid[number]))
    return pasted


def paste_defect(
    picture: NDArray[np.uint8],
    donor: NDArray[np.uint8],
    rng: np.random.Generator,
    *,
    valid: NDArray[np.bool_] | None = None,
) -> Pasted:
    """One defect, filled from a random place of `donor`. The arguments stay as they are.

    What cannot be seen is drawn anew; after some tries the most visible one is taken.

    Args:
        picture: (H, W, 3). donor: (h, w, 3), it may be the same one.
        valid: (H, W): the defect stays inside, and its area is a share of it. None: anywhere.

    Raises:
        UsageError: no bytes in RGB, or no valid pixel.
    """
    for pixels in (picture, donor):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise UsageError(
                f"A defect cannot be pasted with {pixels.dtype} {pixels.shape}.", "Give uint8 (H, W, 3)."
            )
    inside = np.ones(picture.shape[:2], bool) if valid is None else valid
    if not inside.any():
        raise UsageError("A picture has no valid pixel to paste into.", "Check the region of interest.")
    best, visibility = picture, -1.0
    for _ in range(_TRIES):
        shape = _shape(inside, rng)
        tried = np.where(shape[..., None], _filling(picture.shape[:2], donor, rng), picture)
        difference = float(np.abs(tried.astype(np.int16) - picture)[shape].mean())
        if difference > visibility:
            best, visibility = tried, difference
        if difference >= _VISIBLE:
            break
    return Pasted(best, (best != picture).any(axis=2))


def _shape(inside: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A rectangle or a blob at a random place, turned, (H, W): the pixels that are nearest to its centre in
    its own measure, so that their number is exact also at the picture's edge."""
    places = np.argwhere(inside)
    area = math.exp(rng.uniform(*np.log(AREA))) * len(places)
    y, x = (places - places[rng.integers(len(places))]).T  # (n,) each
    angle, elongation = rng.uniform(0, math.pi), math.exp(rng.uniform(0, math.log(3)))
    along = (math.cos(angle) * x + math.sin(angle) * y) / elongation
    across = math.cos(angle) * y - math.sin(angle) * x
    if rng.random() < 0.5:
        distance = np.maximum(np.abs(along), np.abs(across))
    else:
        direction = np.arctan2(across, along)
        waves = np.arange(1, _WAVES + 1)
        heights = rng.uniform(-0.25, 0.25, _WAVES) / waves
        phases = rng.uniform(0, 2 * math.pi, _WAVES)
        outline = 1 + (heights * np.cos(waves * direction[:, None] + phases)).sum(axis=1)  # (n,)
        distance = np.hypot(along, across) / outline
    chosen = places[np.argsort(distance, kind="stable")[: max(round(area), 1)]]
    shape = np.zeros(inside.shape, bool)
    shape[chosen[:, 0], chosen[:, 1]] = True
    return shape


def _filling(size: tuple[int, int], donor: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The donor turned by quarters, maybe mirrored, moved (what leaves it comes back at the other side) and
    of another brightness and contrast: (*size, 3)."""
    turned = np.rot90(donor, int(rng.integers(4)))
    if rng.random() < 0.5:
        turned = turned[:, ::-1]
    rows, columns = (
        (np.arange(wanted) + rng.integers(own)) % own
        for wanted, own in zip(size, turned.shape[:2], strict=True)
    )
    moved = turned[rows[:, None], columns].astype(np.float32)
    changed = moved * rng.uniform(*_GAIN) + rng.uniform(*_SHIFT)
    filling: NDArray[np.uint8] = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    return filling
