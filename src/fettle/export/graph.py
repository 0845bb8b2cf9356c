"""The whole path from framed pictures to score, map and verdict as one module, and its trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fettle.backbones.networks import ConvPyramid, VisionTransformer
from fettle.calibration import Calibration
from fettle.errors import UsageError
from fettle.images.framing import Frame
from fettle.protocols import Method

VERDICTS = ("ok", "review", "reject")
"""What the graph's 0, 1 and 2 mean."""

_HAIR = 1e-5  # a share


class InspectionGraph(nn.Module):
    """Pictures in the frame to what an inspection says of them.

    Args:
        method: with its backbone. folds: of a cross calibration, which then decide the verdict.
        calibration: the thresholds.
    """

    def __init__(self, method: Method, folds: Sequence[Method], calibration: Calibration) -> None:
        super().__init__()
        self.method = cast(nn.Module, method)
        self.folds = nn.ModuleList(cast(nn.Module, fold) for fold in folds)
        self.verdict = CrossVerdict(calibration) if folds else ScoreVerdict(calibration)

    def forward(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Inspect.

        Args:
            pictures: (B, 3, H, W) float32 in 0..1. valid: (B, 1, H, W) bool.

        Returns:
            "anomaly_map" (B, H, W), "score" (B,), "verdict" (B,) int64 (0 ok, 1 review, 2 reject); of a cross
            calibration with K folds also "fold_scores" (B, K); of a method that has some also "remarks"
            (B, R). A picture that holds NaN has a score of NaN, and its verdict is not ok.
        """
        maps = self.method(pictures, valid)
        score = _nan_where_broken(maps.score, maps.anomaly_map)
        found = {"anomaly_map": maps.anomaly_map, "score": score}
        judged = score
        if self.folds:
            of_folds = [fold(pictures, valid) for fold in self.folds]
            judged = torch.stack([_nan_where_broken(one.score, one.anomaly_map) for one in of_folds], dim=1)
            found["fold_scores"] = judged
        found["verdict"] = self.verdict(judged)
        if maps.remarks is not None:
            found["remarks"] = maps.remarks
        return found


class ScoreVerdict(nn.Module):
    """`Calibration.verdict` of scores (B,) as (B,) int64. NaN is for review."""

    t_review: Tensor
    t_reject: Tensor

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        for name, value in _thresholds(calibration).items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, score: Tensor) -> Tensor:
        verdict = (score > self.t_reject).long() + 1
        return torch.where(score <= self.t_review, 0, verdict)


def graph_thresholds(calibration: Calibration) -> Mapping[str, float]:
    """The thresholds by the names of their constants in a graph without folds."""
    return {f"verdict.{name}": value for name, value in _thresholds(calibration).items()}


def _thresholds(calibration: Calibration) -> Mapping[str, float]:
    review, reject = calibration.t_review, calibration.t_reject
    return {
        "t_review": -math.inf if review is None else a_hair_above(review),
        "t_reject": math.inf if reject is None else a_hair_above(reject),
    }


class CrossVerdict(nn.Module):
    """`Calibration.cross_verdict` of every fold's scores (B, K) as (B,) int64. NaN is never ok."""

    scores: Tensor  # (n,)
    of_fold: Tensor  # (n,) int64

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        assert calibration.folds is not None
        scores = [a_hair_above(score) for score in calibration.scores]
        self.register_buffer("scores", torch.tensor(scores))
        self.register_buffer("of_fold", torch.tensor(calibration.folds, dtype=torch.int64))
        self.most_for_reject = -1
        self.most_for_review = len(scores)  # without a promise all is for review
        if calibration.promise_on is not None:
            self.most_for_review = _most_above(calibration.alpha_review, len(scores))
        if calibration.promise_on == "reject":
            self.most_for_reject = _most_above(calibration.alpha_reject, len(scores))

    def forward(self, fold_scores: Tensor) -> Tensor:
        number = (self.scores >= fold_scores[:, self.of_fold]).sum(dim=1)  # of good pictures at least as odd
        return (number <= self.most_for_reject).long() + (number <= self.most_for_review).long()


def a_hair_above(value: float) -> float:
    """What a graph compares with in the place of a calibration score.

    Each is the score of a good picture, and how an engine rounds shall not tell that picture from itself.
    """
    return value + _HAIR * abs(value)


def _most_above(alpha: float, num_scores: int) -> int:
    """The largest number c with a p-value (1 + c) / (n + 1) of at most alpha; -1 where there is none."""
    fits = [number for number in range(num_scores + 1) if (1 + number) / (num_scores + 1) <= alpha]
    return max(fits, default=-1)


def _nan_where_broken(score: Tensor, anomaly_map: Tensor) -> Tensor:
    """Scores (B,), NaN where the map (B, H, W) holds NaN: a runtime's maximum may step over it."""
    broken = anomaly_map.isnan().flatten(1).any(dim=1)
    return torch.where(broken, torch.nan, score)


def trace(
    method: Method, folds: Sequence[Method], calibration: Calibration, frame: Frame
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The graph with a free number of pictures, and its outputs' names in order. The methods stay
    as they are.

    Raises:
        UsageError: the method cannot be traced as it is configured.
    """
    height, width = frame.height, frame.width
    own, own_folds = copy.deepcopy((method, tuple(folds)))
    backbone = own.backbone
    if isinstance(backbone, ConvPyramid | VisionTransformer):
        backbone.fix(height, width)
    graph = InspectionGraph(own, own_folds, calibration).cpu().eval().requires_grad_(False)
    pictures = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 1, height, width, dtype=torch.bool)
    batch = Dim("batch", min=1, max=4096)
    with torch.no_grad():
        names = tuple(graph(pictures, valid))  # constants that are made once are made now, not in the trace
        try:
            program = torch.export.export(
                graph, (pictures, valid), dynamic_shapes=({0: batch}, {0: batch}), strict=False
            )
        except Exception as error:  # whatever an operation that has no symbolic shape may raise
            raise UsageError(
                f"The method '{method.name}' cannot be exported as it is configured: {first_line(error)}.",
                "Fit it with other settings.",
            ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program, names


def first_line(error: Exception) -> str:
    """The first words of what was wrong at first, without the full stop."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0][:300] if lines else type(error).__name__).rstrip(".")
