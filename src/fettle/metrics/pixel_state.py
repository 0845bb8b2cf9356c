"""The saved form of pixel metrics: NumPy arrays by name, and a JSON-able dict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fettle.errors import MetricError
from fettle.metrics.compaction import Run
from fettle.metrics.streaming import DefectPixels, GoodPixels, Levels
from fettle.protocols import Json

STATE_VERSION = 1


class PixelState(NamedTuple):
    """What the caller stores: `arrays` (as safetensors, say) and `facts` (as JSON)."""

    arrays: dict[str, NDArray[np.generic]]
    facts: dict[str, Json]


@dataclass(frozen=True)
class LoadedState:
    """A checked state, taken apart."""

    good: GoodPixels
    defects: DefectPixels
    max_defect_pixels_exact: int
    pictures: dict[str, int]
    regions: dict[str, int]
    pictures_without_mask: int
    empty_masks: int


def pack_state(good: GoodPixels, defects: DefectPixels, facts: dict[str, Json]) -> PixelState:
    """Copy both streams into arrays; `facts` gets the version and what the arrays do not say."""
    arrays: dict[str, NDArray[np.generic]] = {"good.buffer": good.buffer[: good.used].copy()}
    for number, chunk in enumerate(good.chunks):
        arrays[f"good.chunk.{number}"] = chunk.copy()
    steps: dict[str, Json] = {}
    _pack_levels("good", good.levels, arrays, steps)
    for number, name in enumerate(defects.names):
        arrays[f"defect.{number}.keys"], arrays[f"defect.{number}.weights"] = defects.raw(name)
        _pack_levels(f"defect.{number}", defects.levels[name], arrays, steps)
    names: list[Json] = [*defects.names]
    return PixelState(arrays, {**facts, "version": STATE_VERSION, "defects": names, "steps": steps})


def unpack_state(state: PixelState) -> LoadedState:
    """Rebuild both streams, checking every array.

    Raises:
        MetricError: a field is missing, of the wrong type, or contradicts another.
    """
    arrays, facts = state
    if facts.get("version") != STATE_VERSION:
        raise MetricError(
            f"The metric state has version {facts.get('version')}, not {STATE_VERSION}.",
            "Compute it again with this version.",
        )
    facts_reader = _Facts(facts)
    resolution = facts_reader.whole("rank_resolution", least=1)
    unbounded = facts.get("max_pixels_exact") is None
    capacity = None if unbounded else facts_reader.whole("max_pixels_exact", least=1)
    max_defects = facts_reader.whole("max_defect_pixels_exact", least=1)
    steps = facts_reader.counts("steps")

    good = GoodPixels(capacity, resolution)
    for number in range(sum(name.startswith("good.chunk.") for name in arrays)):
        chunk = _array(arrays, f"good.chunk.{number}", np.uint32, 1)
        good.chunks.append(np.sort(chunk.astype(np.uint32)))
    _unpack_levels("good", 1, good.levels, arrays, steps)
    good.flushed = sum(chunk.size for chunk in good.chunks)
    good.flushed += sum(run.total for run in good.levels.runs.values())
    good.add(_array(arrays, "good.buffer", np.uint32, 1).astype(np.uint32))

    defects = DefectPixels(None if unbounded else max_defects, resolution)
    for number, name in enumerate(facts_reader.names("defects")):
        _unpack_levels(f"defect.{number}", 2, defects.open(name), arrays, steps)
        keys = _array(arrays, f"defect.{number}.keys", np.uint32, 1)
        weights = _array(arrays, f"defect.{number}.weights", np.int64, 1)
        if keys.shape != weights.shape:
            raise _damaged(f"defect.{number}.weights")
        defects.add(name, keys.astype(np.uint32), weights.astype(np.int64))
    return LoadedState(
        good,
        defects,
        max_defects,
        facts_reader.counts("pictures"),
        facts_reader.counts("regions"),
        facts_reader.whole("pictures_without_mask"),
        facts_reader.whole("empty_masks"),
    )


def _pack_levels(
    prefix: str, levels: Levels, arrays: dict[str, NDArray[np.generic]], steps: dict[str, Json]
) -> None:
    for level, run in levels.runs.items():
        name = f"{prefix}.level.{level}"
        arrays[f"{name}.keys"], arrays[f"{name}.mass"] = run.keys.copy(), run.mass.copy()
        steps[name] = run.steps


def _unpack_levels(
    prefix: str, rows: int, levels: Levels, arrays: dict[str, NDArray[np.generic]], steps: dict[str, int]
) -> None:
    start = f"{prefix}.level."
    for name in sorted(name for name in steps if name.startswith(start)):
        level = name.removeprefix(start)
        keys = _array(arrays, f"{name}.keys", np.uint32, 1).astype(np.uint32)
        mass = _array(arrays, f"{name}.mass", np.int64, 2).astype(np.int64)
        sound = level.isdecimal() and mass.shape == (rows, keys.size) and (mass[0] > 0).all()
        if not sound or (keys[1:] <= keys[:-1]).any() or (mass < 0).any():
            raise _damaged(name)
        levels.runs[int(level)] = Run(keys, mass, steps[name])


def _array(
    arrays: dict[str, NDArray[np.generic]], name: str, dtype: type[np.generic], ndim: int
) -> NDArray[np.generic]:
    array = arrays.get(name)
    if array is None or array.dtype != dtype or array.ndim != ndim:
        raise _damaged(name)
    return array


class _Facts:
    """Reads the JSON part, refusing what does not belong."""

    def __init__(self, facts: dict[str, Json]) -> None:
        self._facts = facts

    def whole(self, name: str, least: int = 0) -> int:
        return self._whole(name, self._facts.get(name), least)

    def counts(self, name: str) -> dict[str, int]:
        value = self._facts.get(name)
        if not isinstance(value, dict):
            raise _damaged(name)
        return {key: self._whole(name, number) for key, number in value.items()}

    def names(self, name: str) -> list[str]:
        value = self._facts.get(name)
        if not isinstance(value, list) or len(set(map(str, value))) != len(value):
            raise _damaged(name)
        return [str(entry) for entry in value]

    @staticmethod
    def _whole(name: str, value: Json, least: int = 0) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _damaged(name)
        return value


def _damaged(name: str) -> MetricError:
    return MetricError(f"The metric state's '{name}' is missing or damaged.", "Compute the state again.")
