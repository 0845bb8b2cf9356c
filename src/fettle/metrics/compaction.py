"""Runs of scores, and how a long run is shortened by rank.

A run is a sorted list of points: a key and what it carries (a count, for defects a region weight
too). Compaction joins neighbouring points into one at their median. How far it may reach depends on
ranks only, never on the scores' values, so no distribution of scores can spoil it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Keys: TypeAlias = NDArray[np.uint32]
Counts: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

Measure: TypeAlias = Callable[[Counts], Floats]
"""From cumulative masses (rows, points + 1), counted from the top, to the unit coordinate (points + 1,)."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Run:
    """Points sorted by key.

    Attributes:
        keys: (points,) distinct, ascending.
        mass: (rows, points) int64: row 0 counts items; row 1, if there, sums their region weights.
        steps: how many compactions the most compacted point has gone through; 0 is exact.
    """

    keys: Keys
    mass: Counts
    steps: int = 0

    @property
    def num_points(self) -> int:
        return int(self.keys.size)

    @property
    def total(self) -> int:
        return int(self.mass[0].sum())


def empty_run(rows: int) -> Run:
    """A run without points."""
    return Run(np.empty(0, np.uint32), np.empty((rows, 0), np.int64))


def run_of_items(keys: Keys, weights: Counts) -> Run:
    """The exact run of single items in any order: keys (n,) and weights (n,)."""
    order = np.argsort(keys)
    keys = keys[order]
    starts = _tie_starts(keys)
    mass = np.empty((2, starts.size), np.int64)
    mass[0] = np.diff(starts, append=keys.size)
    if keys.size:
        np.add.reduceat(weights[order], starts, out=mass[1])
    return Run(keys[starts], mass)


def run_of_sorted(keys: Keys) -> Run:
    """The exact run of sorted keys (n,), with counts alone."""
    starts = _tie_starts(keys)
    return Run(keys[starts], np.diff(starts, append=keys.size)[None])


def merge_runs(runs: Sequence[Run]) -> Run:
    """One run with the points of all `runs` (at least one); equal keys become one point."""
    runs = [run for run in runs if run.num_points] or runs[:1]
    if len(runs) == 1:
        return runs[0]
    keys = np.concatenate([run.keys for run in runs])
    mass = np.concatenate([run.mass for run in runs], axis=1)
    steps = max(run.steps for run in runs)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = _tie_starts(keys)
    return Run(keys[starts], np.add.reduceat(mass[:, order], starts, axis=1), steps)


def good_measure(resolution: int) -> Measure:
    """Units of good pixels: one a rank r up to `resolution` K, then K (1 + ln(r / K)).

    Joining points inside one unit changes the number of good pixels above any score by 1/K of it at
    most, and leaves the K highest as they are.
    """

    def measure(cumulative: Counts) -> Floats:
        rank = cumulative[0].astype(np.float64)
        beyond = resolution * (1 + np.log(np.maximum(rank, resolution) / resolution))
        unit: Floats = np.where(rank <= resolution, rank, beyond)
        return unit

    return measure


def defect_measure(resolution: int) -> Measure:
    """Units of defect pixels: K of the pixels' count and K of their region weight, evenly."""

    def measure(cumulative: Counts) -> Floats:
        share = cumulative / np.maximum(cumulative[:, -1:], 1)
        total: Floats = resolution * share.sum(axis=0)
        return total

    return measure


def compact(run: Run, measure: Measure) -> Run:
    """Join neighbours whose middles fall in the same unit; a point of one unit or more stays alone.

    A group becomes one point with the group's mass, at its median by count.
    """
    keys, mass = run.keys[::-1], run.mass[:, ::-1]  # from the top
    edges = np.zeros((mass.shape[0], mass.shape[1] + 1), np.int64)
    np.cumsum(mass, axis=1, out=edges[:, 1:])
    unit = measure(edges)
    middle = np.floor((unit[:-1] + unit[1:]) / 2)
    alone = np.diff(unit) >= 1
    opens = np.ones(keys.size, bool)
    opens[1:] = (middle[1:] != middle[:-1]) | alone[1:] | alone[:-1]
    starts = np.flatnonzero(opens)
    joined = np.add.reduceat(mass, starts, axis=1)
    position = edges[0, starts] + _median_offset(joined[0])
    chosen = np.searchsorted(edges[0, 1:], position, side="right")
    return Run(keys[chosen][::-1].copy(), joined[:, ::-1].copy(), run.steps + 1)


def compact_sorted(keys: Keys, resolution: int) -> Run:
    """`compact(run_of_sorted(keys), good_measure(resolution))` without coding millions of keys as a run.

    Only the items at the unit boundaries are looked at; binary search finds the edges of their ties.
    """
    size = keys.size
    measure = good_measure(resolution)
    unit = np.arange(int(measure(np.array([[size]]))[0]) + 1)
    rank = np.where(unit <= resolution, unit, resolution * np.exp(unit / resolution - 1))
    item = np.minimum(rank.astype(np.int64), size - 1)
    tied = keys[size - 1 - item]
    above = size - np.searchsorted(keys, tied, side="right")
    until = size - np.searchsorted(keys, tied, side="left")
    first, last = measure(above[None]), measure(until[None])
    alone = last - first >= 1
    below = (first + last) / 2 >= unit  # the tie belongs to the unit that begins here
    cuts = np.unique(np.concatenate([[0, size], above[alone | below], until[alone | ~below]]))
    counts = np.diff(cuts)
    position = cuts[:-1] + _median_offset(counts)
    return Run(keys[size - 1 - position][::-1].copy(), counts[None, ::-1].copy(), 1)


def num_distinct(keys: Keys) -> int:
    """Number of distinct values of sorted keys, with small temporaries."""
    count = min(keys.size, 1)
    for start in range(0, keys.size - 1, _CHUNK):
        part = keys[start : start + _CHUNK + 1]
        count += int(np.count_nonzero(part[1:] != part[:-1]))
    return count


def _tie_starts(keys: Keys) -> Counts:
    """Index of the first item of every tie of sorted keys."""
    starts = [np.zeros(min(keys.size, 1), np.int64)]
    for start in range(0, keys.size - 1, _CHUNK):
        part = keys[start : start + _CHUNK + 1]
        starts.append(np.flatnonzero(part[1:] != part[:-1]) + start + 1)
    return np.concatenate(starts)


def _median_offset(counts: Counts) -> Counts:
    """Offset of the median item in groups of `counts`; of the two middle ones, each by turns.

    Taking always the same one would shift all scores to one side.
    """
    even = counts % 2 == 0
    upper = even & (np.cumsum(even) % 2 == 0)
    offset: Counts = (counts - 1) // 2 + upper
    return offset
