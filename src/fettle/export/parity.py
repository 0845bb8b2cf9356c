"""How far an exported graph is from its model, measured in its own runtime on good pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fettle.calibration import Calibration
from fettle.datasets.picture_list import list_pictures
from fettle.detector import Detector
from fettle.errors import DataError, UsageError
from fettle.export.graph import VERDICTS
from fettle.exported import Parity
from fettle.images.loading import Loaded, load_framed
from fettle.protocols import Progress
from fettle.runtimes import Outputs, Runtime

BATCHES = (1, 2, 8)
"""Pictures at a time that every export is run with."""

_LEAST = 1e-12


class Tolerances(NamedTuple):
    """The most that passes, see `Parity`. `flips` is the share of the pictures whose verdict may differ."""

    score: float
    map: float
    flips: float


TOLERANCES: dict[str, Tolerances] = {
    "fp32": Tolerances(score=1e-4, map=1e-3, flips=0.0),
    "fp16": Tolerances(score=1e-2, map=2e-2, flips=0.01),
    "int8": Tolerances(score=5e-2, map=1e-1, flips=0.02),
}


@dataclass(frozen=True)
class Views:
    """Framed pictures, eight at a time: (8, 3, H, W) in 0..1 and valid (8, 1, H, W).

    Attributes:
        number: how many there are. source: where they come from, in words.
    """

    number: int
    source: str
    _chunks: Callable[[], Iterator[tuple[NDArray[np.float32], NDArray[np.bool_], int]]] = field(repr=False)

    def __iter__(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_], int]]:
        """Pixels, valid, and how many of the eight count: the last ones are repeated to fill them."""
        return self._chunks()


def good_views(detector: Detector, pictures: Path | None, say: Callable[[str], None]) -> Views:
    """The pictures to compare on: those in a folder, or the good ones that the model keeps.

    Raises:
        UsageError: neither is there. DataError: no picture that can be read.
    """
    if pictures is None:
        references = None if detector.for_refiners is None else detector.for_refiners.references
        if references is None:
            raise UsageError(
                "The model keeps no pictures to compare its export on.",
                "Name a folder of good ones with --pictures.",
            )
        pixels = references.pixels.numpy().astype(np.float32) / np.float32(255)
        valid = references.valid.numpy()
        return Views(
            len(pixels), "good pictures kept in the model", lambda: _eights(zip(pixels, valid, strict=True))
        )
    paths = list_pictures([pictures])

    def views() -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        for loaded in load_framed(paths, lambda path: path, detector.frame):
            if isinstance(loaded, Loaded):
                yield from zip(loaded.placed.views, loaded.placed.valid, strict=True)

    number = 0
    for loaded in load_framed(paths, lambda path: path, detector.frame):
        if isinstance(loaded, Loaded):
            number += len(loaded.placed.views)
        else:
            say(f"Refused: {loaded[1].reason}")
    if not number:
        raise DataError(f"{pictures} holds no picture that can be read.", "Name a folder of good pictures.")
    return Views(number, f"pictures in '{pictures.name}'", lambda: _eights(views()))


def _eights(
    views: Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]],
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_], int]]:
    most = max(BATCHES)
    waiting: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []

    def filled() -> tuple[NDArray[np.float32], NDArray[np.bool_], int]:
        rows = [waiting[i % len(waiting)] for i in range(most)]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]), len(waiting)

    for view in views:
        waiting.append(view)
        if len(waiting) == most:
            yield filled()
            waiting.clear()
    if waiting:
        yield filled()


@dataclass
class _Compared:
    """What was found so far: of each score itself and how far it is off, and the largest of maps."""

    scores: list[float] = field(default_factory=list)
    score_diffs: list[float] = field(default_factory=list)
    largest_map: float = 0.0
    map_diff: float = 0.0
    flips: int = 0
    own_seconds: list[float] = field(default_factory=list)
    torch_seconds: list[float] = field(default_factory=list)

    def add(self, expected: Outputs, found: Outputs) -> NDArray[np.bool_]:
        """Take in one batch's answers; returns whose verdict differs."""
        self.scores += np.abs(expected["score"]).tolist()
        self.score_diffs += _distance(found["score"], expected["score"]).tolist()
        self.largest_map = max(self.largest_map, float(np.abs(expected["anomaly_map"]).max()))
        self.map_diff = max(
            self.map_diff, float(_distance(found["anomaly_map"], expected["anomaly_map"]).max())
        )
        differs: NDArray[np.bool_] = found["verdict"] != expected["verdict"]
        return differs

    def relative(self, calibration: Calibration) -> tuple[float, float]:
        """The largest differences of scores and maps, see `Parity`. Infinite where one is no number."""
        usual = _median(calibration.scores) or max(self.scores)
        least = np.maximum(np.maximum(self.scores, usual), _LEAST)
        usual_map = max(_median(calibration.pixel_statistics), self.largest_map, _LEAST)
        return float((np.asarray(self.score_diffs) / least).max()), self.map_diff / usual_map


def _distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """|found - expected|, infinite where either is no number."""
    away = np.abs(found.astype(np.float64) - expected)
    return np.where(np.isfinite(away), away, np.inf)


def _median(values: Sequence[float]) -> float:
    return float(np.median(np.abs(values))) if len(values) else 0.0


def measure_parity(
    detector: Detector,
    runtime: Runtime,
    views: Views,
    tolerances: Tolerances,
    progress: Progress,
) -> Parity:
    """Run the graph on every picture, one, two and eight at a time, and compare with the model on one."""
    compared = _Compared()
    done = 0
    for pixels, valid, number in views:
        if not done:  # what an engine makes at its first picture is no part of a latency
            _expected(detector, pixels[:1], valid[:1])
            runtime(pixels[:1], valid[:1])
        rows = []
        for i in range(number):
            start = time.perf_counter()
            rows.append(_expected(detector, pixels[i : i + 1], valid[i : i + 1]))
            compared.torch_seconds.append(time.perf_counter() - start)
        expected = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        flipped = np.zeros(number, bool)
        for size in BATCHES:
            for first in range(0, number, size):
                part = slice(first, first + size)
                start = time.perf_counter()
                found = runtime(pixels[part], valid[part])
                if size == 1:
                    compared.own_seconds.append(time.perf_counter() - start)
                kept = min(size, number - first)
                wanted = {name: values[first : first + kept] for name, values in expected.items()}
                flipped[first : first + kept] |= compared.add(
                    wanted, {name: values[:kept] for name, values in found.items()}
                )
        compared.flips += int(flipped.sum())
        done += number
        progress("comparing", done, views.number)
    return _report(compared, detector.calibration, runtime, views, tolerances)


def _report(
    compared: _Compared, calibration: Calibration, runtime: Runtime, views: Views, tolerances: Tolerances
) -> Parity:
    score_diff, map_diff = compared.relative(calibration)
    most_flips = int(tolerances.flips * views.number)
    own, torchs = (float(np.median(part)) for part in (compared.own_seconds, compared.torch_seconds))
    passed = score_diff <= tolerances.score and map_diff <= tolerances.map and compared.flips <= most_flips
    return Parity(
        passed=passed,
        pictures=views.number,
        source=views.source,
        batches=BATCHES,
        max_score_diff=score_diff if np.isfinite(score_diff) else None,
        max_map_diff=map_diff if np.isfinite(map_diff) else None,
        verdict_flips=compared.flips,
        score_tolerance=tolerances.score,
        map_tolerance=tolerances.map,
        flips_tolerance=most_flips,
        latency_ms=1e3 * own,
        torch_latency_ms=1e3 * torchs,
        latency_ratio=own / torchs,
        runtime=runtime.name,
        runtime_version=runtime.version,
        computes_in=runtime.computes_in,
    )


@torch.inference_mode()
def _expected(detector: Detector, pixels: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
    """What the model itself says of one view."""
    tensors = [torch.from_numpy(part).to(detector.device) for part in (pixels, valid)]
    maps = detector.method(*tensors)
    folds = [float(fold(*tensors).score[0]) for fold in detector.fold_methods]
    calibration = detector.calibration
    score = float(maps.score[0])
    verdict = calibration.cross_verdict(folds) if folds else calibration.verdict(score)
    return {
        "anomaly_map": maps.anomaly_map.cpu().numpy(),
        "score": maps.score.cpu().numpy(),
        "verdict": np.array([VERDICTS.index(verdict.value)]),
    }


def sentence(parity: Parity) -> str:
    """The outcome in words."""
    score = "not finite" if parity.max_score_diff is None else f"{parity.max_score_diff:.1e}"
    return (
        f"Parity {'passed' if parity.passed else 'FAILED'} on {parity.pictures} {parity.source}: "
        f"scores differ by at most {score} (tolerance {parity.score_tolerance:.0e}), "
        f"{parity.verdict_flips} verdicts differ (tolerance {parity.flips_tolerance})."
    )
