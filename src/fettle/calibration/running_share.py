"""Watches a run: are there more pictures that are not ok than good parts alone would give?"""

from __future__ import annotations

from fettle.calibration.conformal import Calibration
from fettle.calibration.thresholds import order_statistic
from fettle.inspection import Verdict
from fettle.metrics.rates import consistency_p_value

_FIRST_LOOK = 16  # pictures; looks follow at twice as many each time, and at the end
_UNLIKELY = 0.001  # a look's own limit: some twenty looks stay below 2 % together


class RunningShare:
    """Counts verdicts and says, once, when the share of "not ok" leaves the beta-binomial band.

    The promise holds for parts like the calibration pictures. If all inspected parts were such good parts,
    the number that is not ok would follow Beta-Binomial(m, n + 1 - k, k); a number far above it means
    defects, or that lot, lamp or camera have changed.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._num_scores = calibration.num_scores
        self._rank = None
        if calibration.t_review is not None:
            self._rank = order_statistic(
                calibration.num_scores, calibration.alpha_review, calibration.confidence
            )
        self._seen = 0
        self._not_ok = 0
        self._next_look = _FIRST_LOOK
        self._said = False

    def update(self, verdict: Verdict) -> str | None:
        """Take a verdict in; a sentence for the user where there is something to say."""
        self._seen += 1
        self._not_ok += verdict is not Verdict.OK
        if self._seen < self._next_look:
            return None
        self._next_look *= 2
        return self._look()

    def finish(self) -> str | None:
        """The last look, at the end of the run."""
        return self._look() if self._seen else None

    def _look(self) -> str | None:
        if self._said or self._rank is None:
            return None
        p_value = consistency_p_value(self._num_scores, self._rank, self._seen, self._not_ok)
        if p_value >= _UNLIKELY:
            return None
        self._said = True
        return (
            f"{self._not_ok} of {self._seen} pictures are not ok; good parts like those of the calibration "
            f"would give so many with a probability of {p_value:.1g}. Either there are defects, or lot, lamp "
            "or camera have changed. If the parts are good, set the thresholds anew with 'fettle calibrate'."
        )
