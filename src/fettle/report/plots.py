"""Score histogram, ROC and PR as geometry; the template draws them as inline SVG.

Nothing here knows colours: the page's style gives them, so that light, dark and print all read well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
_ToAxis = Callable[[float], float]

_NUM_BINS = 40
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 10, 42, 28  # margins inside a plot, SVG units
_LABEL_ROWS = (34, 16)  # baselines of the thresholds' labels: beside the plot, and one row up


@dataclass(frozen=True)
class Tick:
    """A label at a position of an axis, SVG units."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """One piece of a stacked bar, SVG units; `kind` is its style class."""

    x: float
    y: float
    width: float
    height: float
    kind: str


@dataclass(frozen=True)
class Mark:
    """A threshold: a vertical line with a label on its left or right side, its baseline at `y`."""

    x: float
    y: float
    label: str
    on_left: bool


@dataclass(frozen=True)
class Frame:
    """The rectangle of the axes inside the drawing, SVG units."""

    width: float
    height: float
    left: float = _LEFT
    top: float = _TOP

    @property
    def right(self) -> float:
        return self.width - _RIGHT

    @property
    def bottom(self) -> float:
        return self.height - _BOTTOM


@dataclass(frozen=True)
class Histogram:
    """Scores counted in bins, stacked by group."""

    frame: Frame
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    legend: tuple[tuple[str, str], ...]  # (style class, words)
    alt: str

    @property
    def view_top(self) -> float:
        """Where the drawing begins: lower when the upper row of labels is empty."""
        return 0 if any(mark.y == _LABEL_ROWS[True] for mark in self.marks) else 14


@dataclass(frozen=True)
class Curve:
    """One curve in the unit square."""

    frame: Frame
    points: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    y_label: str
    dot: tuple[float, float] | None
    alt: str


def score_histogram(groups: Mapping[str, Values], thresholds: Mapping[str, float | None]) -> Histogram | None:
    """Stacked histogram of picture scores.

    Far outliers are gathered in the last bin (its label then starts with "≥"), so that one broken picture
    does not press all others into one bar.

    Args:
        groups: scores by group, in stacking order from the bottom; the name is the style class too.
        thresholds: vertical lines by name; None is left out.

    Returns:
        None where there is no score.
    """
    scores = np.concatenate([np.zeros(0), *groups.values()])
    if not scores.size:
        return None
    frame = Frame(640, 260)
    cuts = {name: value for name, value in thresholds.items() if value is not None and math.isfinite(value)}
    low = min(float(scores.min()), *cuts.values()) if cuts else float(scores.min())
    high, gathered = _upper_end(scores, list(cuts.values()))
    if high - low < 1e-12 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _NUM_BINS + 1)
    counts = {name: np.histogram(values.clip(low, high), edges)[0] for name, values in groups.items()}
    y_steps = nice_ticks(0, float(np.sum(list(counts.values()), axis=0).max()), 4, whole=True)
    top = y_steps[-1]

    def x_of(value: float) -> float:
        return round(frame.left + (value - low) / (high - low) * (frame.right - frame.left), 2)

    def y_of(count: float) -> float:
        return round(frame.bottom - count / top * (frame.bottom - frame.top), 2)

    return Histogram(
        frame=frame,
        bars=tuple(_stack(counts, [x_of(float(edge)) for edge in edges], y_of)),
        x_ticks=_score_ticks(low, high, gathered, x_of),
        y_ticks=tuple(Tick(y_of(step), f"{step:,.0f}") for step in y_steps),
        marks=_marks(cuts, x_of),
        legend=tuple((name, f"{name} ({values.size:,})") for name, values in groups.items() if values.size),
        alt=_histogram_words(groups, cuts),
    )


def _upper_end(scores: Values, cuts: Sequence[float]) -> tuple[float, bool]:
    """Where the score axis ends, and whether scores beyond are gathered in the last bin."""
    bulk = max([float(np.quantile(scores, 0.95)), *cuts])
    low, top = float(scores.min()), max([float(scores.max()), *cuts])
    if top - low > 4 * (bulk - low) > 0:
        return low + 2 * (bulk - low), True
    return top, False


def _stack(counts: Mapping[str, NDArray[np.int64]], edges: list[float], y_of: _ToAxis) -> list[Bar]:
    bars = []
    below = np.zeros(len(edges) - 1, np.int64)
    for name, values in counts.items():
        for i in np.flatnonzero(values):
            low, high = y_of(float(below[i])), y_of(float(below[i] + values[i]))
            bars.append(
                Bar(edges[i] + 0.5, high, round(edges[i + 1] - edges[i] - 1, 2), round(low - high, 2), name)
            )
        below = below + values
    return bars


def _score_ticks(low: float, high: float, gathered: bool, x_of: _ToAxis) -> tuple[Tick, ...]:
    steps = [step for step in nice_ticks(low, high, 8) if low <= step <= high]
    ticks = [Tick(x_of(step), f"{step:.6g}") for step in steps]
    if gathered:
        ticks = [tick for tick in ticks if tick.at < x_of(high) - 60] + [
            Tick(x_of(high) - 14, f"≥ {high:.3g}")
        ]
    return tuple(ticks)


def _marks(cuts: Mapping[str, float], x_of: _ToAxis) -> tuple[Mark, ...]:
    """Lines in order. The first of two writes to its left if it can, else they write in two rows."""
    order = sorted(cuts.items(), key=lambda item: item[1])
    marks: list[Mark] = []
    for position, (name, value) in enumerate(order):
        x = x_of(value)
        on_left = x > 520 or (position == 0 and len(order) > 1 and x > 120)
        same_side = any(mark.on_left == on_left for mark in marks)
        marks.append(Mark(x, _LABEL_ROWS[same_side], f"{name} {value:.4g}", on_left))
    return tuple(marks)


def _histogram_words(groups: Mapping[str, Values], cuts: Mapping[str, float]) -> str:
    parts = [
        f"{name}: {values.size} pictures from {values.min():.4g} to {values.max():.4g}"
        for name, values in groups.items()
        if values.size
    ]
    lines = [f"{name} threshold {value:.4g}" for name, value in cuts.items()]
    return f"Histogram of the scores. {'; '.join(parts + lines)}."


def roc_curve(scores: Values, defective: NDArray[np.bool_], dot: tuple[float, float] | None) -> Curve | None:
    """True positive rate over false positive rate, one point for every distinct score.

    Args:
        scores: (n,).
        defective: (n,).
        dot: (false, true positive rate) at the reject threshold, marked on the curve.

    Returns:
        None where one of the two kinds is missing.
    """
    found, false = _counts_from_the_top(scores, defective)
    if not found[-1] or not false[-1]:
        return None
    x, y = false / false[-1], found / found[-1]
    alt = f"ROC curve of {found[-1]:.0f} defective and {false[-1]:.0f} good pictures."
    return _curve(x, y, "false positive rate", "true positive rate", dot, alt)


def pr_curve(scores: Values, defective: NDArray[np.bool_]) -> Curve | None:
    """Precision over recall in steps, as average precision sums it; None as in `roc_curve`."""
    found, false = _counts_from_the_top(scores, defective)
    if not found[-1] or not false[-1]:
        return None
    alt = f"Precision-recall curve of {found[-1]:.0f} defective and {false[-1]:.0f} good pictures."
    # Only scores that find a defect make a step: at the others recall stands still and only precision falls.
    steps = np.flatnonzero(np.diff(found)) + 1
    recall, precision = np.append(0.0, found[steps] / found[-1]), found[steps] / (found[steps] + false[steps])
    # Between two recalls the precision of the higher one holds: two points for each step.
    x = np.stack([recall[:-1], recall[1:]], axis=1).ravel()
    y = np.repeat(precision, 2)
    return _curve(x, y, "recall", "precision", None, alt)


def _counts_from_the_top(scores: Values, defective: NDArray[np.bool_]) -> tuple[Values, Values]:
    """Defective and good pictures at or above each distinct score, from the highest; (0, 0) in front."""
    order = np.argsort(-scores, kind="stable")
    ordered, labels = scores[order], defective[order]
    last_of_tie = np.append(np.diff(ordered) != 0, True)[: ordered.size]
    found = np.append(0.0, np.cumsum(labels)[last_of_tie])
    false = np.append(0.0, np.cumsum(~labels)[last_of_tie])
    return found, false


def _curve(
    x: Values, y: Values, x_label: str, y_label: str, dot: tuple[float, float] | None, alt: str
) -> Curve:
    frame = Frame(320, 300, top=12)

    def x_of(value: float) -> float:
        return round(2 * (frame.left + value * (frame.right - frame.left))) / 2

    def y_of(value: float) -> float:
        return round(2 * (frame.bottom - value * (frame.bottom - frame.top))) / 2

    # Half an SVG unit is finer than a screen shows: many thousand scores need no longer line.
    line = [(x_of(float(a)), y_of(float(b))) for a, b in zip(x, y, strict=True)]
    kept = [point for i, point in enumerate(line) if i == 0 or point != line[i - 1]]
    steps = (0.0, 0.25, 0.5, 0.75, 1.0)
    return Curve(
        frame=frame,
        points=" ".join(f"{a:g},{b:g}" for a, b in kept),
        x_ticks=tuple(Tick(x_of(step), f"{step:g}") for step in steps),
        y_ticks=tuple(Tick(y_of(step), f"{step:g}") for step in steps),
        x_label=x_label,
        y_label=y_label,
        dot=None if dot is None else (x_of(dot[0]), y_of(dot[1])),
        alt=alt,
    )


def nice_ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover [low, high], about `about` of them."""
    span = high - low
    rough = span / about if span > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
