"""The geometry of the histogram, ROC and PR."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.report.plots import Curve, nice_ticks, pr_curve, roc_curve, score_histogram


def unit_points(curve: Curve) -> list[tuple[float, float]]:
    """The curve's points brought back to the unit square."""
    frame = curve.frame
    points = []
    for pair in curve.points.split():
        x, y = map(float, pair.split(","))
        points.append(
            ((x - frame.left) / (frame.right - frame.left), (frame.bottom - y) / (frame.bottom - frame.top))
        )
    return points


def curve_at(curve: Curve | None, expected: list[tuple[float, float]]) -> None:
    assert curve is not None
    np.testing.assert_allclose(unit_points(curve), expected, atol=2e-3)


SCORES = np.array([4.0, 3.0, 2.0, 1.0])
DEFECTIVE = np.array([True, False, True, False])


def test_roc_has_one_point_for_each_score() -> None:
    curve_at(roc_curve(SCORES, DEFECTIVE, None), [(0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1)])


def test_roc_crosses_a_tie_on_the_diagonal() -> None:
    curve_at(roc_curve(np.ones(4), DEFECTIVE, None), [(0, 0), (1, 1)])


def test_pr_is_drawn_in_steps_to_full_recall() -> None:
    curve_at(pr_curve(SCORES, DEFECTIVE), [(0, 1), (0.5, 1), (0.5, 2 / 3), (1, 2 / 3)])


def test_pr_of_ties_is_the_share_of_defects() -> None:
    curve_at(pr_curve(np.ones(4), np.array([True, False, False, False])), [(0, 0.25), (1, 0.25)])


@pytest.mark.parametrize("defective", [np.zeros(4, bool), np.ones(4, bool)])
def test_no_curve_from_one_kind_of_pictures(defective: np.ndarray) -> None:
    assert roc_curve(SCORES, defective, None) is None
    assert pr_curve(SCORES, defective) is None
    assert roc_curve(np.zeros(0), np.zeros(0, bool), None) is None


def test_many_scores_make_a_short_line() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=50_000)
    curve = roc_curve(scores, generator.random(50_000) < 0.5, None)
    assert curve is not None
    assert len(curve.points) < 20_000


def test_histogram_bars_count_every_picture() -> None:
    generator = np.random.default_rng(1)
    groups = {"good": generator.random(300), "defective": generator.random(50) + 0.5}
    plot = score_histogram(groups, {"reject": 1.1})
    assert plot is not None
    one = (plot.y_ticks[0].at - plot.y_ticks[-1].at) / float(plot.y_ticks[-1].label)  # height of one picture
    for name, scores in groups.items():
        total = sum(bar.height for bar in plot.bars if bar.kind == name) / one
        assert total == pytest.approx(len(scores), abs=0.5)


def test_stacked_bars_never_overlap() -> None:
    plot = score_histogram({"ok": np.array([0.1, 0.1]), "reject": np.array([0.1, 0.9])}, {})
    assert plot is not None
    below, above = (bar for bar in plot.bars if bar.x == plot.bars[0].x)
    assert above.y + above.height == pytest.approx(below.y)


def test_thresholds_lie_at_their_scores() -> None:
    plot = score_histogram({"ok": np.array([0.0, 1.0])}, {"review": 0.25, "reject": 0.75})
    assert plot is not None
    review, reject = plot.marks
    width = plot.frame.right - plot.frame.left
    assert (review.x - plot.frame.left) / width == pytest.approx(0.25, abs=1e-3)
    assert (reject.x - plot.frame.left) / width == pytest.approx(0.75, abs=1e-3)
    assert (review.label, reject.label) == ("review 0.25", "reject 0.75")


@pytest.mark.parametrize("at", [0.0, 0.05, 0.5, 0.99])
def test_labels_of_close_thresholds_do_not_overprint(at: float) -> None:
    plot = score_histogram({"ok": np.array([0.0, 1.0])}, {"review": at, "reject": at + 0.005})
    assert plot is not None
    first, second = plot.marks
    assert first.y != second.y or (first.on_left and not second.on_left)


def test_a_threshold_beyond_all_scores_is_on_the_axis() -> None:
    plot = score_histogram({"ok": np.array([0.1, 0.2])}, {"review": None, "reject": 0.9})
    assert plot is not None
    assert [mark.x for mark in plot.marks] == [plot.frame.right]


def test_one_broken_picture_does_not_press_the_others_into_one_bar() -> None:
    scores = np.append(np.linspace(0, 1, 200), 1000.0)
    plot = score_histogram({"ok": scores}, {"reject": 0.9})
    assert plot is not None
    assert len(plot.bars) > 15
    assert plot.x_ticks[-1].label.startswith("≥")


@pytest.mark.parametrize("scores", [[0.0], [3.5, 3.5], [1e9, 1e9], [-2.0]])
def test_equal_scores_make_one_bar(scores: list[float]) -> None:
    plot = score_histogram({"ok": np.array(scores)}, {})
    assert plot is not None
    assert len(plot.bars) == 1


def test_no_scores_make_no_histogram() -> None:
    assert score_histogram({"ok": np.zeros(0)}, {"reject": 0.5}) is None


def test_words_tell_what_the_histogram_shows() -> None:
    plot = score_histogram({"ok": np.array([0.1, 0.2]), "reject": np.zeros(0)}, {"reject": 0.9})
    assert plot is not None
    assert plot.alt == "Histogram of the scores. ok: 2 pictures from 0.1 to 0.2; reject threshold 0.9."


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 9))
def test_ticks_cover_the_range_in_even_steps(low: float, span: float, about: int) -> None:
    ticks = nice_ticks(low, low + span, about)
    step = ticks[1] - ticks[0]
    tolerance = 1e-6 * step + 1e-9 * abs(low)
    assert ticks[0] <= low + tolerance
    assert ticks[-1] >= low + span - tolerance
    np.testing.assert_allclose(np.diff(ticks), step, rtol=1e-3, atol=tolerance)
    assert 2 <= len(ticks) <= 2 * about + 2
