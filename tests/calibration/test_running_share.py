"""The share of pictures that are not ok is watched while a run goes on."""

from __future__ import annotations

import numpy as np
import pytest

from fettle.calibration import Calibration, RunningShare, calibrate
from fettle.inspection import Verdict


def calibration(count: int = 100) -> Calibration:
    scores = np.random.default_rng(0).normal(size=count).tolist()
    return calibrate(scores, target_frr=0.01, mode="holdout")


def said(share: RunningShare, verdicts: list[Verdict]) -> list[tuple[int, str]]:
    sentences = [(i, share.update(verdict)) for i, verdict in enumerate(verdicts, 1)]
    sentences.append((len(verdicts), share.finish()))
    return [(i, sentence) for i, sentence in sentences if sentence is not None]


def test_good_parts_as_promised_say_nothing() -> None:
    own = calibration()
    scores = np.random.default_rng(1).normal(size=2000)
    assert said(RunningShare(own), [own.verdict(float(score)) for score in scores]) == []


def test_false_alarms_are_rare() -> None:
    """Each run has its own calibration and good pictures of the same law."""
    alarms = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        own = calibrate(rng.normal(size=60).tolist(), target_frr=0.05, mode="holdout")
        share = RunningShare(own)
        alarms += bool(said(share, [own.verdict(float(score)) for score in rng.normal(size=128)]))
    assert alarms <= 6


def test_a_shift_is_said_once_and_early() -> None:
    own = calibration()
    scores = np.random.default_rng(1).normal(2.0, size=2000)
    ((first, sentence),) = said(RunningShare(own), [own.verdict(float(score)) for score in scores])
    assert first <= 32
    assert "fettle calibrate" in sentence and f"of {first} pictures" in sentence


def test_a_short_run_is_looked_at_in_the_end() -> None:
    ((first, _),) = said(RunningShare(calibration()), [Verdict.REJECT] * 7)
    assert first == 7


@pytest.mark.parametrize("count", [3, 5])
def test_without_a_promise_there_is_nothing_to_compare(count: int) -> None:
    assert said(RunningShare(calibration(count)), [Verdict.REVIEW] * 100) == []
