"""Scores of good pictures to verdicts with a promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple, Self, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from fettle.calibration.pixels import BETA, pixel_threshold
from fettle.calibration.thresholds import (
    cross_p_value,
    needed_pictures,
    order_statistic,
    upper_bound,
)
from fettle.errors import CalibrationError, UsageError
from fettle.inspection import Verdict
from fettle.metrics.rates import Rate, measured_rate

Mode: TypeAlias = Literal["leave_one_out", "holdout", "kfold", "cross", "none"]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]

_MODE_SENTENCE: dict[Mode, str] = {
    "leave_one_out": "Each calibration picture was judged without itself while the final model knows them "
    "all, so the promise is close rather than exact.",
    "kfold": "Each calibration picture was judged by a model that did not know it while the final model "
    "knows them all, so the promise is approximate.",
    "cross": "Every part is judged by all folds' models (cross-conformal): the rates are guaranteed within "
    "twice the rate asked for, and are near it in practice.",
}


class Calibration(BaseModel):
    """Thresholds, what they promise, and the scores that they came from.

    Attributes:
        mode: how the scores were made: `leave_one_out` and `kfold` by models that did not know the picture
            (the final model knows all), `holdout` by the final model itself, `cross` with all folds'
            models kept; `none`: every good picture was learnt from and none was judged.
        num_pictures: calibration pictures.
        num_groups: groups of pictures that belong together, if given; the promise counts them.
        num_scores: n that the promise counts: groups if given, else pictures.
        alpha_reject, alpha_review: false-reject and false-review rates asked for.
        confidence: None: rates hold on average over calibrations; else with this probability for this one.
        t_reject, t_review: thresholds; None where the promise is not made, and in mode `cross`.
        promise_on: the strictest verdict with a promise.
        frr_promised: the rate promised for `promise_on`.
        needed: good pictures that the promise on rejects needs.
        upper_reject_95, upper_review_95: the true rate of this calibration is at most this, with 95 %
            confidence; None without the promise, and in mode `cross`.
        exact: the promise is a theorem for the final model, and no approximation.
        scores: the n scores, ascending (a group's is its largest).
        folds: fold of each score, in mode `cross`.
        pixel_threshold: a pixel above it is marked; None without pixel statistics.
        pixel_alpha, pixel_beta: of good pictures at most a share pixel_alpha has more than a share
            pixel_beta of its pixels marked.
        pixel_statistics: the n statistics that it came from, ascending.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode
    num_pictures: Annotated[int, Field(ge=0)]
    num_groups: Annotated[int, Field(ge=0)] | None = None
    num_scores: Annotated[int, Field(ge=0)]
    alpha_reject: Share
    alpha_review: Share
    confidence: Share | None = None
    t_reject: FiniteFloat | None = None
    t_review: FiniteFloat | None = None
    promise_on: Literal["reject", "review"] | None = None
    frr_promised: Annotated[FiniteFloat, Field(gt=0)] | None = None
    needed: Annotated[int, Field(ge=1)]
    upper_reject_95: Share | None = None
    upper_review_95: Share | None = None
    exact: bool
    scores: tuple[FiniteFloat, ...]
    folds: tuple[int, ...] | None = None
    pixel_threshold: FiniteFloat | None = None
    pixel_alpha: Share | None = None
    pixel_beta: Annotated[float, Field(ge=0, lt=1)] = BETA
    pixel_statistics: tuple[FiniteFloat, ...] = ()

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if self.num_scores != len(self.scores) or list(self.scores) != sorted(self.scores):
            raise ValueError("scores must be num_scores numbers in ascending order")
        if self.mode == "none" and self.scores:
            raise ValueError("mode none has no scores")
        if self.alpha_review < self.alpha_reject:
            raise ValueError("alpha_review is below alpha_reject")
        if (self.promise_on is None) != (self.frr_promised is None):
            raise ValueError("promise_on and frr_promised do not fit")
        if self.mode == "cross":
            if self.folds is None or len(self.folds) != len(self.scores) or min(self.folds, default=0) < 0:
                raise ValueError("mode cross needs the fold of every score")
            return self
        if (self.t_review is None) != (self.promise_on is None):
            raise ValueError("t_review and promise_on do not fit")
        if (self.t_reject is None) != (self.promise_on != "reject"):
            raise ValueError("t_reject and promise_on do not fit")
        if self.t_reject is not None and self.t_review is not None and self.t_reject < self.t_review:
            raise ValueError("t_reject is below t_review")
        return self

    @property
    def rank(self) -> int | None:
        """k: the threshold of `promise_on` is the k-th smallest of the scores. None without a promise."""
        if self.promise_on is None:
            return None
        alpha = self.alpha_reject if self.promise_on == "reject" else self.alpha_review
        return order_statistic(self.num_scores, alpha, self.confidence)

    def verdict(self, score: float) -> Verdict:
        """ok up to t_review, review up to t_reject, reject above. Without a reject promise nothing is
        rejected; without any promise everything is for review. +inf is above every threshold.

        Raises:
            CalibrationError: the score is NaN.
            UsageError: mode `cross`, which judges by the scores of all folds' models.
        """
        if self.mode == "cross":
            raise UsageError(
                "One score does not decide in mode cross.", "Call cross_verdict with every fold's score."
            )
        _refuse_nan([score])
        if self.t_reject is not None and score > self.t_reject:
            return Verdict.REJECT
        if self.t_review is None or score > self.t_review:
            return Verdict.REVIEW
        return Verdict.OK

    def cross_verdict(self, fold_scores: Sequence[float]) -> Verdict:
        """The verdict in mode `cross`, from the picture's score by each fold's model, (K,).

        Raises:
            CalibrationError: a score is NaN.
            UsageError: another mode, or another number of folds.
        """
        if self.folds is None:
            raise UsageError(f"Mode {self.mode} judges by one score.", "Call verdict.")
        if self.folds and len(fold_scores) != max(self.folds) + 1:
            raise UsageError(
                f"{len(fold_scores)} scores are given for {max(self.folds) + 1} folds.", "Give one a fold."
            )
        _refuse_nan(fold_scores)
        p_value = cross_p_value(fold_scores, self.scores, self.folds)
        if self.promise_on == "reject" and p_value <= self.alpha_reject:
            return Verdict.REJECT
        return Verdict.REVIEW if self.promise_on is None or p_value <= self.alpha_review else Verdict.OK

    def at(self, target_frr: float, review_frr: float | None = None) -> Calibration:
        """The same scores at other rates."""
        moved = calibrate(
            self.scores,
            target_frr=target_frr,
            review_frr=review_frr,
            mode=self.mode,
            folds=self.folds,
            pixel_statistics=self.pixel_statistics or None,
            pixel_beta=self.pixel_beta,
            confidence=self.confidence,
        )
        return moved.model_copy(update={"num_pictures": self.num_pictures, "num_groups": self.num_groups})

    def sentences(self) -> list[str]:
        """What is promised and what is not, in plain words, for a card or a report."""
        count = f"{self.num_scores} good {'pictures' if self.num_groups is None else 'groups of pictures'}"
        said = []
        review = needed_pictures(self.alpha_review, self.confidence)
        if self.mode == "none":
            return [
                "No promise is made and every verdict is review: all good pictures were learnt from and none "
                "was left to judge. Run 'fettle calibrate MODEL MORE_GOOD_PICTURES': a limit of "
                f"{_percent(self.alpha_review)} on good parts that leave ok needs {review} of them, one of "
                f"{_percent(self.alpha_reject)} on rejected good parts needs {self.needed}."
            ]
        if self.promise_on is None:
            said.append(
                f"No promise is made and every verdict is review: {count} are too few. A limit of "
                f"{_percent(self.alpha_review)} on good parts that leave ok needs {review}."
            )
        else:
            said.append(self._promise("leave ok", self.alpha_review, self.upper_review_95, count))
        if self.promise_on == "reject":
            said.append(self._promise("are rejected", self.alpha_reject, self.upper_reject_95, count))
        else:
            said.append(
                f"Nothing is ever rejected: a limit of {_percent(self.alpha_reject)} on rejected good parts "
                f"needs {self.needed}, and there are {count}."
            )
        if self.promise_on is not None:
            if self.mode in _MODE_SENTENCE:
                said.append(_MODE_SENTENCE[self.mode])
            said.append(
                "All this holds for good parts made and pictured like the calibration pictures; a new lot, "
                "lamp or camera may differ."
            )
        if self.pixel_threshold is not None and self.pixel_alpha is not None:
            said.append(
                f"Of good pictures at most {_percent(self.pixel_alpha)} have more than "
                f"{_percent(self.pixel_beta)} of their pixels marked."
            )
        return said

    def _promise(self, what: str, alpha: float, upper: float | None, count: str) -> str:
        if self.mode == "cross":
            return f"Of good parts at most {_percent(2 * alpha)} {what} on average ({count})."
        if self.confidence is not None:
            return (
                f"Of good parts at most {_percent(alpha)} {what}, with {_percent(self.confidence)} "
                f"confidence ({count})."
            )
        bound = (
            "" if upper is None else f"; with 95 % confidence at most {math.ceil(1000 * upper) / 10:.1f} %"
        )
        return f"Of good parts at most {_percent(alpha)} {what} on average{bound} ({count})."


def calibrate(
    scores: Sequence[float],
    *,
    mode: Mode,
    target_frr: float = 0.01,
    review_frr: float | None = None,
    groups: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    pixel_statistics: Sequence[float] | None = None,
    pixel_beta: float = BETA,
    confidence: float | None = None,
    strict: bool = False,
) -> Calibration:
    """Thresholds from scores of good pictures that the model has not learnt from.

    A promise that the pictures cannot carry is not made, and what it needs is recorded.

    Args:
        scores: (n,) scores. Count a picture once: copies are not further evidence.
        mode: how they were made.
        target_frr: largest share of good parts that may be rejected.
        review_frr: largest share that may leave ok; by default 5 target_frr, at most 0.2.
        groups: (n,) which pictures belong together (one part, one lot). A group counts once, with its
            largest score.
        folds: (n,) fold of each picture, 0..K-1, in mode `cross`; a group lies in one fold.
        pixel_statistics: (n,) `pixel_statistic` of the same pictures' maps.
        pixel_beta: the share of pixels that they were taken at.
        confidence: None: the rates hold on average; else with this probability for this calibration.
        strict: refuse, where otherwise no reject promise would be made.

    Raises:
        CalibrationError: a score or statistic that is not finite; with `strict`, too few pictures.
        UsageError: rates, lengths or options that do not fit.
    """
    alpha_review = _review_rate(target_frr, review_frr)
    _check_lengths(len(scores), groups=groups, folds=folds, pixel_statistics=pixel_statistics)
    if (mode == "cross") != (folds is not None):
        raise UsageError(f"Mode {mode} and folds do not fit.", "Give folds in mode cross, and only there.")
    if mode == "cross" and confidence is not None:
        raise UsageError("Mode cross has no promise with confidence.", "Leave confidence out.")
    _refuse_not_finite(scores, "score")
    _refuse_not_finite(pixel_statistics or (), "pixel statistic")
    own = list(groups) if groups is not None else [str(place) for place in range(len(scores))]
    fold_of = dict(zip(own, folds, strict=True)) if folds is not None else {}
    if folds is not None and any(fold_of[name] != fold for name, fold in zip(own, folds, strict=True)):
        raise UsageError("A group lies in several folds.", "Put all of a group's pictures in one fold.")
    largest = _largest(own, scores)
    order = sorted(largest, key=lambda name: largest[name])
    ordered = [largest[name] for name in order]
    n = len(ordered)
    needed = needed_pictures(target_frr, confidence)
    if strict and n < needed:
        counted = "good pictures" if groups is None else "groups of good pictures"
        order_statistic(n, target_frr, confidence, counted)  # raises, and says what is needed
    k_review, k_reject = (
        order_statistic(n, alpha, confidence) if n >= needed_pictures(alpha, confidence) else None
        for alpha in (alpha_review, target_frr)
    )
    promise_on: Literal["reject", "review"] | None = (
        "reject" if k_reject is not None else "review" if k_review is not None else None
    )
    promised = {"reject": target_frr, "review": alpha_review, None: None}[promise_on]
    statistics = sorted(_largest(own, pixel_statistics).values()) if pixel_statistics is not None else []
    pixel, pixel_alpha = pixel_threshold(statistics, target_frr) if statistics else (None, None)
    one_score = mode != "cross"
    return Calibration(
        mode=mode,
        num_pictures=len(scores),
        num_groups=n if groups is not None else None,
        num_scores=n,
        alpha_reject=target_frr,
        alpha_review=alpha_review,
        confidence=confidence,
        t_reject=ordered[k_reject - 1] if k_reject is not None and one_score else None,
        t_review=ordered[k_review - 1] if k_review is not None and one_score else None,
        promise_on=promise_on,
        frr_promised=promised if promised is None or one_score else 2 * promised,
        needed=needed,
        upper_reject_95=upper_bound(n, k_reject) if k_reject is not None and one_score else None,
        upper_review_95=upper_bound(n, k_review) if k_review is not None and one_score else None,
        exact=mode in ("holdout", "cross"),
        scores=tuple(ordered),
        folds=tuple(fold_of[name] for name in order) if folds is not None else None,
        pixel_threshold=pixel,
        pixel_alpha=pixel_alpha,
        pixel_beta=pixel_beta,
        pixel_statistics=tuple(statistics),
    )


class Escapes(NamedTuple):
    """Labelled defects that got away, with Clopper-Pearson intervals."""

    not_rejected: Rate
    not_reviewed: Rate


def escape_rates(verdicts: Sequence[Verdict], level: float = 0.95) -> Escapes:
    """What share of labelled defects was not rejected, and what share was called ok.

    Args:
        verdicts: of the defective pictures; they never move a threshold.
        level: confidence of the two-sided intervals.
    """
    ok = sum(verdict is Verdict.OK for verdict in verdicts)
    kept = sum(verdict is not Verdict.REJECT for verdict in verdicts)
    return Escapes(measured_rate(kept, len(verdicts), level), measured_rate(ok, len(verdicts), level))


def _review_rate(target_frr: float, review_frr: float | None) -> float:
    for rate in (target_frr, review_frr):
        if rate is not None and not 0 < rate < 1:
            raise UsageError(
                f"The rate {rate} is not between 0 and 1.", "Give a share, such as 0.01 for 1 %."
            )
    if review_frr is None:
        return max(target_frr, min(float(5 * Fraction(str(float(target_frr)))), 0.2))
    if review_frr < target_frr:
        raise UsageError(
            f"The review rate {review_frr} is below the reject rate {target_frr}.",
            "Every rejected part has left ok too: give a review rate at least as high.",
        )
    return review_frr


def _check_lengths(n: int, **given: Sequence[object] | None) -> None:
    for name, values in given.items():
        if values is not None and len(values) != n:
            raise UsageError(f"There are {n} scores but {len(values)} {name}.", "Give one a score.")


def _largest(groups: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for group, value in zip(groups, values, strict=True):
        largest[group] = max(float(value), largest.get(group, -math.inf))
    return largest


def _refuse_not_finite(values: Sequence[float], what: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(np.asarray(values, dtype=float)))
    if len(wrong):
        raise CalibrationError(
            f"The {what} of calibration picture {int(wrong[0])} is {float(values[int(wrong[0])])}.",
            "Leave the picture out, or check the model's weights.",
        )


def _refuse_nan(scores: Sequence[float]) -> None:
    if any(math.isnan(score) for score in scores):
        raise CalibrationError("The score is NaN, so no verdict is possible.", "Check the model's weights.")


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
