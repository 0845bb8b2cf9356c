"""What comes out of an inspection: plain data, NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Verdict(StrEnum):
    """What is said of a part. `review`: a person should look."""

    OK = "ok"
    REVIEW = "review"
    REJECT = "reject"


@dataclass(frozen=True)
class Region:
    """One connected region above the pixel threshold, in the picture's own pixels.

    Attributes:
        left, top, width, height: bounding box, px.
        area_px: number of pixels.
        length_px: major axis of the ellipse with the region's second moments, px.
        peak: largest map value inside.
        area_mm2, length_mm: the same in millimetres, when the scale is known.
    """

    left: int
    top: int
    width: int
    height: int
    area_px: int
    length_px: float
    peak: float
    area_mm2: float | None = None
    length_mm: float | None = None


@dataclass(frozen=True)
class Inspection:
    """The answer for one picture.

    Attributes:
        path: the picture's path as it was given.
        score: larger is more anomalous.
        verdict: ok, review or reject, by the model's calibration.
        regions: defect regions, largest peak first.
        anomaly_map: float32 (H, W) at the picture's own size; 0 outside `valid`.
        valid: bool (H, W), False outside the region of interest or the frame's view.
        seconds: time by step ("decode", "compute", "regions"; "refine" and "explain" where asked for), per
            picture.
        product: the product, when known.
        sha256: hash of the picture file's bytes, hexadecimal.
        notes: what was done on the way that a user should know (how it was decoded, shrunk, ...).
        soft: float32 (H, W) in 0..1, above a half at the pixels that are marked after a refinement, which
            `regions` are then made of; None: those whose map value is above the pixel threshold are.
        refinement: what a refiner did, by name; None: none was asked for.
    """

    path: str
    score: float
    verdict: Verdict
    regions: tuple[Region, ...]
    anomaly_map: NDArray[np.float32]
    valid: NDArray[np.bool_]
    seconds: dict[str, float] = field(default_factory=dict)
    product: str = ""
    sha256: str = ""
    notes: tuple[str, ...] = ()
    soft: NDArray[np.float32] | None = None
    refinement: Mapping[str, Any] | None = None  # JSON values

    def marks(self, pixel_threshold: float) -> NDArray[np.bool_]:
        """The pixels that are marked, bool (H, W)."""
        above = self.anomaly_map > pixel_threshold if self.soft is None else self.soft > 0.5
        marked: NDArray[np.bool_] = above & self.valid
        return marked


@dataclass(frozen=True)
class Explained:
    """A method's inner view of one picture, in the frame that the network saw.

    Attributes:
        view: uint8 (H, W, 3), the framed picture.
        valid: bool (H, W), False on padding and outside the region of interest.
        maps: float32 (H, W) by name, in 0..1; "error" is on the anomaly map's own scale.
        numbers: shown beside the maps.
        words: one sentence on what the maps are and are not.
        pictures: uint8 (H, W, 3) by name, shown in their own colours.
    """

    view: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    maps: Mapping[str, NDArray[np.float32]]
    numbers: Mapping[str, object]
    words: str
    pictures: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparedWith:
    """A good picture that a method compares others with, in the frame that the network saw.

    Attributes:
        name: of its file, without the folder.
        product: what it shows; "" where that is not known.
        pixels: uint8 (H, W, 3).
    """

    name: str
    product: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Refusal:
    """A picture that could not be inspected, and why, in one sentence."""

    path: str
    reason: str
