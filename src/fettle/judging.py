"""Fit a method and learn what good pictures score under a model that does not know them.

Four ways, the raw material of calibration (base-methods 8.3):

- leave_one_out: the method leaves each picture (or group) out by itself, cheaply; the model learns from all.
- holdout: a share is held out of learning and judged by the final model; the promise is exact.
- kfold: models without each fold judge it; the final model learns from all.
- cross: as kfold, and the folds' models are kept and judge every new picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fettle.calibration import Mode, pixel_statistic
from fettle.datasets.splits import folds, hold_out
from fettle.errors import UsageError
from fettle.feature_stream import GoodFeatures, GoodPicture
from fettle.images.framing import Frame
from fettle.images.loading import Loaded, load_framed
from fettle.inspection import Refusal
from fettle.layers.pixel_map import valid_tokens
from fettle.protocols import FitRecord, LeavesOut, LeftOut, Method, Progress, Run

CalibrationMode: TypeAlias = Literal["auto", "leave_one_out", "holdout", "kfold", "cross"]

_FOLDS = 5
_FEW = 20  # below so many groups, k-fold leaves out one at a time
_LEAST_HELD_OUT = 0.2
_MOST_HELD_OUT = 0.5
_MAX_ENERGIES = 1_000_000


@dataclass
class Judged:
    """Scores of good pictures, a value a picture, in the order of `keys`.

    Attributes:
        scores: picture scores (the largest over a picture's views).
        groups: the group of each picture.
        pixel_statistics: each picture's high quantile of its map (base-methods 8.5).
        energies: raw patch energies of all pictures, evenly thinned to about a million; None without any.
    """

    scores: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    pixel_statistics: list[float] = field(default_factory=list)
    energies: Tensor | None = None
    keys: list[str] = field(default_factory=list)

    def extend(self, other: Judged) -> None:
        """Take in further pictures."""
        self.scores += other.scores
        self.groups += other.groups
        self.pixel_statistics += other.pixel_statistics
        self.keys += other.keys
        energies = [part for part in (self.energies, other.energies) if part is not None]
        self.energies = torch.cat(energies) if energies else None


@dataclass
class FittedMethod(Judged):
    """A fitted method with what its good pictures scored.

    Attributes:
        method: the final model.
        mode: how the pictures were judged.
        record: what the final fit did. num_fit: pictures that it learnt from.
        folds: in mode cross, the fold of each judged picture; fold_methods: the folds' models.
    """

    method: Method = field(kw_only=True)
    mode: Mode = field(kw_only=True)
    record: FitRecord = field(kw_only=True)
    num_fit: int = field(kw_only=True)
    folds: list[int] | None = None
    fold_methods: tuple[Method, ...] = ()


class Fitter:
    """Fits methods of one kind on good pictures, in any of the four ways.

    Args:
        new_method: makes an unfitted method; methods may share their backbone.
        frame: the frame of all pictures.
        run: seed, bounds and progress.
    """

    def __init__(self, new_method: Callable[[], Method], frame: Frame, run: Run) -> None:
        self._new_method = new_method
        self._frame = frame
        self._run = run
        self._refused: dict[str, Refusal] = {}

    @property
    def refusals(self) -> list[Refusal]:
        """Pictures that could not be read, each once."""
        return list(self._refused.values())

    def fit(self, pictures: Sequence[GoodPicture], mode: CalibrationMode, *, holdout: int) -> FittedMethod:
        """Fit and judge.

        Args:
            holdout: pictures that a hold-out should have at least; it takes a fifth, at most half.

        Raises:
            UsageError: leave_one_out of a method that cannot leave pictures out.
        """
        num_groups = len({picture.group for picture in pictures})
        if mode == "auto":
            mode = "leave_one_out" if self._new_method().traits.leave_one_out or num_groups < 2 else "holdout"
        if mode == "leave_one_out" or num_groups < 2:
            return self._leave_one_out(pictures)
        if mode == "holdout":
            return self._hold_out(pictures, holdout)
        return self._cross_fit(pictures, num_groups, keep=mode == "cross")

    def _leave_one_out(self, pictures: Sequence[GoodPicture]) -> FittedMethod:
        method = self._new_method()
        if not isinstance(method, LeavesOut):
            raise UsageError(
                f"Method '{method.name}' cannot leave pictures out.", "Use --calibration holdout."
            )
        stream = self._stream(method, pictures)
        record = method.prepare(stream, self._run)
        stream.what = "calibrating"
        judged = gather_judged(method.left_out(stream, self._run), len(pictures))
        self._note(stream)
        num_fit = len(pictures) - len(stream.refusals)
        return FittedMethod(
            **vars(judged), method=method, mode="leave_one_out", record=record, num_fit=num_fit
        )

    def _hold_out(self, pictures: Sequence[GoodPicture], least: int) -> FittedMethod:
        share = min(max(_LEAST_HELD_OUT, least / len(pictures)), _MOST_HELD_OUT)
        held = hold_out(*_keys_and_groups(pictures), share)
        learnt = [picture for picture, out in zip(pictures, held, strict=True) if not out]
        method, record = self._learn(learnt)
        judged = self._judge(method, [picture for picture, out in zip(pictures, held, strict=True) if out])
        return FittedMethod(
            **vars(judged), method=method, mode="holdout", record=record, num_fit=self._num_readable(learnt)
        )

    def _cross_fit(self, pictures: Sequence[GoodPicture], num_groups: int, *, keep: bool) -> FittedMethod:
        count = _FOLDS if num_groups >= _FEW else num_groups
        fold_of = folds(*_keys_and_groups(pictures), count)
        judged = Judged()
        fold_by_key = {picture.key: fold for picture, fold in zip(pictures, fold_of, strict=True)}
        methods = []
        for fold in range(count):
            self._run.say(f"Fold {fold + 1} of {count}.")
            method, _ = self._learn([p for p in pictures if fold_by_key[p.key] != fold])
            judged.extend(self._judge(method, [p for p in pictures if fold_by_key[p.key] == fold]))
            if keep:
                methods.append(method)
        method, record = self._learn(pictures)
        return FittedMethod(
            **vars(judged),
            method=method,
            mode="cross" if keep else "kfold",
            record=record,
            num_fit=self._num_readable(pictures),
            folds=[fold_by_key[key] for key in judged.keys] if keep else None,
            fold_methods=tuple(methods),
        )

    def _learn(self, pictures: Sequence[GoodPicture]) -> tuple[Method, FitRecord]:
        method = self._new_method()
        stream = self._stream(method, pictures)
        record = method.prepare(stream, self._run)
        self._note(stream)
        return method, record

    def _judge(self, method: Method, pictures: Sequence[GoodPicture]) -> Judged:
        refused: list[Refusal] = []
        views = judge(
            method,
            pictures,
            self._frame,
            device=self._run.device,
            progress=self._run.progress,
            refused=refused.append,
        )
        judged = gather_judged(views, len(pictures))
        self._refused |= {refusal.path: refusal for refusal in refused}
        return judged

    def _stream(self, method: Method, pictures: Sequence[GoodPicture]) -> GoodFeatures:
        return GoodFeatures(
            method,
            pictures,
            self._frame,
            device=self._run.device,
            progress=self._run.progress,
            what="learning",
            cache_mib=self._run.memory_mib,
        )

    def _note(self, stream: GoodFeatures) -> None:
        self._refused |= {refusal.path: refusal for refusal in stream.refusals}

    def _num_readable(self, pictures: Sequence[GoodPicture]) -> int:
        return sum(str(picture.path) not in self._refused for picture in pictures)


def _keys_and_groups(pictures: Sequence[GoodPicture]) -> tuple[list[str], list[str]]:
    return [picture.key for picture in pictures], [picture.group for picture in pictures]


def gather_judged(left_out: Iterable[LeftOut], num_pictures: int) -> Judged:
    """Sum up left-out views, which come picture by picture."""
    judged = Judged()
    energies: list[Tensor] = []
    for key, views_of_one in groupby(left_out, key=lambda view: view.key):
        views = list(views_of_one)
        judged.scores.append(max(float(view.maps.score[0]) for view in views))
        judged.groups.append(views[0].group)
        judged.keys.append(key)
        maps = np.concatenate([view.maps.anomaly_map[0].cpu().numpy() for view in views])
        valid = np.concatenate([view.valid[0, 0].cpu().numpy() for view in views])
        judged.pixel_statistics.append(pixel_statistic(maps, valid))
        energy = torch.cat([view.energies.flatten() for view in views]).cpu().sort().values
        step = math.ceil(len(energy) * num_pictures / _MAX_ENERGIES)
        energies.append(energy[step // 2 :: step])
    if energies:
        judged.energies = torch.cat(energies)
    return judged


def judge(
    method: Method,
    pictures: Sequence[GoodPicture],
    frame: Frame,
    *,
    device: str,
    progress: Progress,
    refused: Callable[[Refusal], None],
) -> Iterator[LeftOut]:
    """Good pictures that the fitted method has not learnt from, view by view; `refused` hears of the others.

    Energies are on the method's present scale: raw while it is not settled.
    """
    for done, loaded in enumerate(load_framed(pictures, lambda picture: picture.path, frame), 1):
        progress("calibrating", done, len(pictures))
        if not isinstance(loaded, Loaded):
            refused(loaded[1])
            continue
        for view, valid in zip(loaded.placed.views, loaded.placed.valid, strict=True):
            yield _judge_view(method, loaded.item, view, valid, device)


@torch.inference_mode()
def _judge_view(
    method: Method, picture: GoodPicture, view: NDArray[np.float32], valid: NDArray[np.bool_], device: str
) -> LeftOut:
    pixels = torch.from_numpy(view)[None].to(device)
    inside = torch.from_numpy(valid)[None].to(device)
    energy = method.patch_energy(pixels, inside)
    tokens = valid_tokens(inside, (energy.shape[-2], energy.shape[-1]))
    return LeftOut(picture.key, picture.group, method(pixels, inside), inside, energy[tokens])
