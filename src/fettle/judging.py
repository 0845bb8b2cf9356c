"""Fit a method and learn what good pictures score under a model that does not know them.

Ways, the raw material of calibration:

- leave_one_out: the method leaves each picture (or group) out by itself, cheaply; the model learns from all.
- holdout: a share is held out of learning and judged by the final model; the promise is exact.
- kfold: models without each fold judge it; the final model learns from all.
- cross: as kfold, and the folds' models are kept and judge every new picture.
- none: all are learnt from and none is judged, where a method can't leave one out and none may be held out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fettle.calibration import Mode
from fettle.datasets.splits import folds, hold_out
from fettle.errors import DataError, UsageError
from fettle.feature_cache import TrainingPictures
from fettle.feature_file import FeatureFile
from fettle.feature_stream import GoodFeatures, GoodPicture
from fettle.images.framing import Frame
from fettle.images.loading import Loaded, load_framed
from fettle.inspection import Refusal
from fettle.judged import Judged, gather_judged
from fettle.protocols import (
    Finishes,
    FitRecord,
    LeavesOut,
    LeftOut,
    Method,
    Progress,
    Run,
    Trained,
    Unbounded,
)
from fettle.training import TrainingConfig, train

CalibrationMode: TypeAlias = Literal["auto", "leave_one_out", "holdout", "kfold", "cross"]

_FOLDS = 5
_FEW = 20  # below so many groups, k-fold leaves out one at a time
_LEAST_HELD_OUT = 0.2
_MOST_HELD_OUT = 0.5
_EARLY_STOP_SHARE = 0.1  # of the pictures that may be learnt from
_RAW_ENERGIES = "No good picture could be judged without itself, so patch energies keep their raw scale."
_LEARNT_ENERGIES = (
    "The scale of patch energies comes from the pictures that were learnt from, since no other was kept: "
    "those of new good pictures lie above it."
)


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

    def leave_out(self, keys: Collection[str]) -> None:
        """Forget what the pictures with these keys scored; energies, which have no owner, stay."""
        kept = [i for i, key in enumerate(self.keys) if key not in keys]
        for name in ("scores", "groups", "pixel_statistics", "keys", "folds"):
            values = getattr(self, name)
            setattr(self, name, None if values is None else [values[i] for i in kept])
        self.held_out = [one for one in self.held_out if one.key not in keys]


class Fitter:
    """Fits methods of one kind on good pictures, in any of these ways.

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

    def fit(
        self,
        pictures: Sequence[GoodPicture],
        mode: CalibrationMode,
        *,
        holdout: int,
        learn_all: bool = False,
    ) -> FittedMethod:
        """Fit and judge.

        Args:
            mode: auto leaves one out where the method can, and else holds out.
            holdout: pictures (or groups) that a hold-out should have at least; it takes a fifth, at most
                half.
            learn_all: auto holds none out, nor does it where there is one group alone: it then judges none.

        Raises:
            UsageError: leave_one_out of a method that cannot leave pictures out.
            DataError: one group alone, which the mode would have to divide.
        """
        num_groups = len({picture.group for picture in pictures})
        leaves_out = self._new_method().traits.leave_one_out
        if mode == "auto" and not leaves_out and (learn_all or num_groups < 2):
            return self._judge_none(pictures)
        if num_groups < 2 and not leaves_out:
            raise DataError(
                f"Calibration '{mode}' needs at least 2 good pictures, not {num_groups}.",
                "Give more, of different groups, or leave --calibration out.",
            )
        if mode == "auto":
            mode = "leave_one_out" if leaves_out else "holdout"
        if mode == "leave_one_out" or num_groups < 2:
            return self._leave_one_out(pictures)
        if mode == "holdout":
            return self._hold_out(pictures, holdout)
        return self._cross_fit(pictures, num_groups, keep=mode == "cross")

    def _leave_one_out(self, pictures: Sequence[GoodPicture]) -> FittedMethod:
        method = self._new_method()
        if not isinstance(method, LeavesOut):
            raise UsageError(f"Method '{method.name}' cannot leave pictures out.", "Leave --calibration out.")
        stream = self._stream(method, pictures)
        record = method.prepare(stream, self._run)
        stream.what = "calibrating"
        judged = gather_judged(method.left_out(stream, self._run), len(pictures))
        self._note(stream.refusals)
        mode: Mode = "leave_one_out" if judged.scores else "none"
        if mode == "none":
            record.warnings.append(_RAW_ENERGIES)
        num_fit = len(pictures) - len(stream.refusals)
        return FittedMethod(**vars(judged), method=method, mode=mode, record=record, num_fit=num_fit)

    def _judge_none(self, pictures: Sequence[GoodPicture]) -> FittedMethod:
        """Learn from all. Their energies give the scale; their scores say nothing and are left."""
        method, record, num_fit = self._learn(pictures)
        energies = self._judge(method, pictures).energies
        record.warnings.append(_LEARNT_ENERGIES)
        return FittedMethod(energies=energies, method=method, mode="none", record=record, num_fit=num_fit)

    def _hold_out(self, pictures: Sequence[GoodPicture], least: int) -> FittedMethod:
        def share(groups: int, number: int) -> float:
            wanted = least + (groups < number)  # where groups differ in size, one may be lost to rounding
            return min(max(_LEAST_HELD_OUT, wanted / groups), _MOST_HELD_OUT)

        rest, held = _split_off(pictures, share)
        method, record, num_fit = self._learn(rest)
        judged = self._judge(method, held)
        return FittedMethod(**vars(judged), method=method, mode="holdout", record=record, num_fit=num_fit)

    def _cross_fit(self, pictures: Sequence[GoodPicture], num_groups: int, *, keep: bool) -> FittedMethod:
        count = _FOLDS if num_groups >= _FEW else num_groups
        fold_of = folds(*_keys_and_groups(pictures), count)
        judged = Judged()
        fold_by_key = {picture.key: fold for picture, fold in zip(pictures, fold_of, strict=True)}
        methods = []
        for fold in range(count):
            self._run.say(f"Fold {fold + 1} of {count}.")
            method, _, _ = self._learn([p for p in pictures if fold_by_key[p.key] != fold], f"fold{fold}")
            judged.extend(self._judge(method, [p for p in pictures if fold_by_key[p.key] == fold]))
            if keep:
                methods.append(method)
        method, record, num_fit = self._learn(pictures)
        return FittedMethod(
            **vars(judged),
            method=method,
            mode="cross" if keep else "kfold",
            record=record,
            num_fit=num_fit,
            folds=[fold_by_key[key] for key in judged.keys] if keep else None,
            fold_methods=tuple(methods),
        )

    def _learn(
        self, pictures: Sequence[GoodPicture], purpose: str = "final"
    ) -> tuple[Method, FitRecord, int]:
        """A method that has learnt from these pictures, and how many of them it could read."""
        method = self._new_method()
        if isinstance(method, Trained):
            return self._train(method, pictures, purpose)
        stream = self._stream(method, pictures)
        record = method.prepare(stream, self._run)
        self._note(stream.refusals)
        return method, record, self._num_readable(pictures)

    def _train(
        self, method: Trained, pictures: Sequence[GoodPicture], purpose: str
    ) -> tuple[Method, FitRecord, int]:
        """Prepare, then train. With an early stop a tenth watches, and is not learnt from."""
        run = self._run
        run = replace(
            run,
            training_dir=run.training_dir / purpose if run.training_dir else None,
            log_dir=run.log_dir / purpose if run.log_dir else None,
        )
        learnt: list[GoodPicture] = list(pictures)
        watching: list[GoodPicture] = []
        if cast(TrainingConfig, method.config).early_stop:
            learnt, watching = _split_off(pictures, lambda groups, number: _EARLY_STOP_SHARE, "early stop")
        stream = TrainingPictures(method, learnt, self._frame, run)
        record = method.prepare(stream, run)
        held_out = TrainingPictures(method, watching, self._frame, run) if watching else None
        trained = train(method, stream, run, held_out=held_out)
        self._note(stream.refusals + (held_out.refusals if held_out else []))
        cast(torch.nn.Module, method).eval()
        if isinstance(method, Finishes):
            method.finish(stream)
        record = FitRecord({**record.facts, **trained.facts}, record.warnings + trained.warnings)
        return method, record, self._num_readable(learnt)

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
        self._note(refused)
        return judged

    def _stream(self, method: Method, pictures: Sequence[GoodPicture]) -> GoodFeatures:
        run = self._run
        return GoodFeatures(
            method,
            pictures,
            self._frame,
            device=run.device,
            progress=run.progress,
            what="learning",
            kept=None
            if run.cache_dir is None
            else FeatureFile(run.cache_dir, max_mib=run.cache_mib, say=run.say),
        )

    def _note(self, refusals: Iterable[Refusal]) -> None:
        self._refused |= {refusal.path: refusal for refusal in refusals}

    def _num_readable(self, pictures: Sequence[GoodPicture]) -> int:
        return sum(str(picture.path) not in self._refused for picture in pictures)


def _keys_and_groups(pictures: Sequence[GoodPicture]) -> tuple[list[str], list[str]]:
    return [picture.key for picture in pictures], [picture.group for picture in pictures]


def _split_off(
    pictures: Sequence[GoodPicture], share_of: Callable[[int, int], float], purpose: str = ""
) -> tuple[list[GoodPicture], list[GoodPicture]]:
    """The pictures that stay and those split off: of each product a share, whole groups, by content.

    `share_of` gives it from the product's number of groups, which a promise counts, and of pictures.
    """
    split: set[str] = set()
    for product in sorted({picture.product for picture in pictures}):
        own = [picture for picture in pictures if picture.product == product]
        num_groups = len({picture.group for picture in own})
        if product and num_groups < 2:
            raise DataError(
                f"Product '{product}' has {len(own)} good picture(s) in one group; some must be held out.",
                "Give it good pictures of other parts, leave it out with --products, or fit with --shots.",
            )
        out = hold_out(*_keys_and_groups(own), share_of(num_groups, len(own)), purpose)
        split |= {picture.key for picture, chosen in zip(own, out, strict=True) if chosen}
    return [p for p in pictures if p.key not in split], [p for p in pictures if p.key in split]


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
    unbounded = method.unbounded_energy(pixels, inside) if isinstance(method, Unbounded) else None
    return LeftOut(picture.key, picture.group, method(pixels, inside), inside, energy, unbounded)
