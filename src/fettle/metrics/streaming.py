"""Streams of good and defect pixels in bounded memory: a buffer, and runs in a binary counter.

Each full buffer becomes a run. Two runs of one level merge into a run of the next, so n buffers
leave at most log2(n) + 1 runs, and a point goes through at most as many compactions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fettle.metrics.compaction import (
    Counts,
    Keys,
    Measure,
    Run,
    compact,
    compact_sorted,
    defect_measure,
    empty_run,
    good_measure,
    merge_runs,
    num_distinct,
    run_of_items,
    run_of_sorted,
)

DISTINCT_PER_UNIT = 4
"""A run is compacted when it has more than this times the resolution of distinct scores."""

_CHUNK = 1 << 23  # keys of one sorted chunk of an unbounded buffer


class Levels:
    """Runs by level. Level l holds about 2^l full buffers.

    Args:
        measure: how far compaction may join (see `good_measure`, `defect_measure`).
        limit: a run with more distinct scores than this is compacted.
    """

    def __init__(self, measure: Measure, limit: int) -> None:
        self._measure = measure
        self._limit = limit
        self.runs: dict[int, Run] = {}

    def carry(self, level: int, run: Run) -> None:
        """Add a run at `level`: while that level is taken, merge and go one up."""
        while level in self.runs:
            run = self.shorten(merge_runs([self.runs.pop(level), run]))
            level += 1
        self.runs[level] = run

    def merge(self, other: Levels) -> None:
        """Carry every run of `other` into this one; `other` stays as it is."""
        for level in sorted(other.runs):
            self.carry(level, other.runs[level])

    @property
    def depth(self) -> int:
        """The highest level taken, 0 if none."""
        return max(self.runs, default=0)

    @property
    def steps(self) -> int:
        """The most compactions that any point has gone through; 0 is exact."""
        return max((run.steps for run in self.runs.values()), default=0)

    def shorten(self, run: Run) -> Run:
        """The run itself, or compacted if it has too many distinct scores."""
        return compact(run, self._measure) if run.num_points > self._limit else run


class GoodPixels:
    """Scores of good pixels.

    Args:
        capacity: keys of the buffer, below which everything is exact; None: keep all (4 bytes each).
        resolution: K of the rank compaction.
    """

    def __init__(self, capacity: int | None, resolution: int) -> None:
        self.capacity = capacity
        self.resolution = resolution
        self.limit = DISTINCT_PER_UNIT * resolution
        self.levels = Levels(good_measure(resolution), self.limit)
        self.chunks: list[Keys] = []  # full sorted buffers; only with capacity None
        self.buffer: Keys = self._new_buffer()
        self.used = 0
        self.flushed = 0  # items in `levels` and `chunks`

    @property
    def total(self) -> int:
        return self.flushed + self.used

    def add(self, keys: Keys) -> None:
        """Take keys (n,) in."""
        while keys.size:
            room = self.buffer.size - self.used
            part, keys = keys[:room], keys[room:]
            self.buffer[self.used : self.used + part.size] = part
            self.used += part.size
            if self.used == self.buffer.size:
                self._flush()

    def merge(self, other: GoodPixels) -> None:
        """Take in what `other` holds; `other` stays as it is."""
        self.levels.merge(other.levels)
        self.chunks.extend(chunk.copy() for chunk in other.chunks)
        self.flushed += other.flushed
        self.add(other.buffer[: other.used])

    def tally(self, keys: Keys) -> tuple[Counts, Counts]:
        """How many good pixels score above each key, and how many at or above it: two (n,)."""
        above = np.zeros(keys.size, np.int64)
        at_or_above = np.zeros(keys.size, np.int64)
        self.buffer[: self.used].sort()  # the same pixels in another order: the state means the same
        for chunk in [*self.chunks, self.buffer[: self.used]]:
            above += chunk.size - np.searchsorted(chunk, keys, side="right")
            at_or_above += chunk.size - np.searchsorted(chunk, keys, side="left")
        for run in self.levels.runs.values():
            below = np.concatenate([[0], np.cumsum(run.mass[0])])
            above += below[-1] - below[np.searchsorted(run.keys, keys, side="right")]
            at_or_above += below[-1] - below[np.searchsorted(run.keys, keys, side="left")]
        return above, at_or_above

    def _new_buffer(self) -> Keys:
        return np.empty(_CHUNK if self.capacity is None else self.capacity, np.uint32)

    def _flush(self) -> None:
        self.buffer.sort()
        self.flushed += self.used
        self.used = 0
        if self.capacity is None:
            self.chunks.append(self.buffer)
            self.buffer = self._new_buffer()
        elif num_distinct(self.buffer) > self.limit:
            self.levels.carry(0, compact_sorted(self.buffer, self.resolution))
        else:
            self.levels.carry(0, run_of_sorted(self.buffer))


class DefectPixels:
    """Scores and region weights of defect pixels, by defect name.

    Args:
        capacity: items of all names' buffers together; None: keep all (12 bytes each).
        resolution: K of the rank compaction.
    """

    def __init__(self, capacity: int | None, resolution: int) -> None:
        self.capacity = capacity
        self.resolution = resolution
        self.levels: dict[str, Levels] = {}
        self.buffers: dict[str, list[tuple[Keys, Counts]]] = {}
        self.used: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self.levels)

    @property
    def depth(self) -> int:
        return max((levels.depth for levels in self.levels.values()), default=0)

    @property
    def steps(self) -> int:
        return max((levels.steps for levels in self.levels.values()), default=0)

    def add(self, name: str, keys: Keys, weights: Counts) -> None:
        """Take defect pixels of `name` in: keys (n,) and region weights (n,)."""
        self.open(name)
        while keys.size:
            room = keys.size if self.capacity is None else self.capacity - sum(self.used.values())
            if keys[:room].size:
                self.buffers[name].append((keys[:room], weights[:room]))
                self.used[name] += keys[:room].size
            keys, weights = keys[room:], weights[room:]
            if self.capacity is not None and sum(self.used.values()) >= self.capacity:
                self._flush(max(self.names, key=self.used.__getitem__))

    def open(self, name: str) -> Levels:
        """Make `name` known, and return its runs."""
        if name not in self.levels:
            limit = DISTINCT_PER_UNIT * self.resolution
            self.levels[name] = Levels(defect_measure(self.resolution), limit)
            self.buffers[name] = []
            self.used[name] = 0
        return self.levels[name]

    def merge(self, other: DefectPixels) -> None:
        """Take in what `other` holds; `other` stays as it is."""
        for name in other.names:
            self.open(name).merge(other.levels[name])
            for keys, weights in list(other.buffers[name]):
                self.add(name, keys, weights)

    def raw(self, name: str) -> tuple[Keys, Counts]:
        """The buffer of `name`: keys (n,) and region weights (n,)."""
        parts = self.buffers[name]
        keys = np.concatenate([np.empty(0, np.uint32), *(part[0] for part in parts)])
        weights = np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)])
        return keys, weights

    def run(self, name: str) -> Run:
        """All defect pixels of `name` as one run."""
        return merge_runs([*self.levels[name].runs.values(), run_of_items(*self.raw(name))])

    def _flush(self, name: str) -> None:
        levels = self.levels[name]
        levels.carry(0, levels.shorten(run_of_items(*self.raw(name))))
        self.buffers[name] = []
        self.used[name] = 0


def joined(runs: Iterable[Run]) -> Run:
    """The runs of all names as one; a run without points if there are none."""
    return merge_runs(list(runs) or [empty_run(2)])
