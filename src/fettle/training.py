"""The one training loop: every trained method goes through `train`.

A step is a function of (seed, step number, rank) and of the weights before it: the order of the pictures,
the perturbations and the dropout are hashed from these. So a training that goes on after a kill gives the
same bits as one that was never stopped, and no random state is saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
from torch import nn

from fettle.checkpoint import DamagedState, Header, forget, read_state, signals_held, write_state
from fettle.errors import ConfigError, DataError, FettleError
from fettle.picture_order import PictureOrder
from fettle.processes import Processes, is_main_process, open_processes
from fettle.protocols import (
    Batch,
    FitRecord,
    Json,
    Loss,
    Run,
    Step,
    Templated,
    Trained,
    no_progress,
    no_words,
)
from fettle.training_config import TrainingConfig, learning_rate, planned_steps
from fettle.training_state import Figures, TrainingState

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

_Scalar = TypeVar("_Scalar", "Tensor", float)

__all__ = [
    "TrainingConfig",
    "forget",
    "is_main_process",
    "learning_rate",
    "planned_steps",
    "train",
]

KEEP_EVERY_SECONDS = 60.0
_LOOK_SHARE = 0.02  # of the steps between two looks at held-out pictures
_NOT_LEARNT = 0.9  # normalised loss
_MEAN_MEANS = 20  # views: the mean of fewer fits them so well that it is no measure
_BOARD_POINTS = 1000


class Pictures(Protocol):
    """Views of good pictures by index; `feature_cache.TrainingPictures` is one."""

    @property
    def num_views(self) -> int: ...
    @property
    def products(self) -> Sequence[str]:
        """The product of each view."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """The key of each view's picture."""
        ...

    def batch(self, indices: Sequence[int], *, pictures: bool = False) -> Batch: ...


def train(method: Trained, pictures: Pictures, run: Run, *, held_out: Pictures | None = None) -> FitRecord:
    """Train a prepared method in place by AdamW; its config says how, see `TrainingConfig`.

    Several processes: started by a launcher, each with its own pictures' slice and random draws. Placement,
    autocast, the count of processes and the averaging are accelerate's. There is no
    DistributedDataParallel around the method, because `losses` is a generator and no forward pass: after each
    backward pass the flattened gradients are averaged instead. All start from the same weights, which come
    from the seed, and so hold the same ones ever after. The first process alone writes and speaks.

    Precision: parameters, features, gradients and AdamW are float32 always. With bfloat16 the network's
    matrix products run in it (autocast); the loss must be float32, so a method compares `output.float()`
    with its features. A loss of another type is refused.

    Args:
        method: prepared, on `run.device`. Left in eval mode.
        pictures: what to learn from.
        held_out: good pictures not learnt from: they stop the training early where `early_stop` is set, and
            else are looked at once, at the end.

    Returns:
        Facts: steps (planned), stopped_at (None where it was not stopped early), best_step (with early stop),
        loss and normalised_loss (means of the last tenth), held_out_loss, held_out_normalised_loss, seconds,
        precision, processes, views_seen. A normalised loss is None where a baseline is 0.

    Raises:
        DataError: no picture to learn from.
        ConfigError: `early_stop` without held-out pictures; a TensorBoard log without tensorboard.
        FettleError: a loss or gradient that is no number; the state kept last stays.
    """
    config = cast(TrainingConfig, method.config)
    if pictures.num_views == 0:
        raise DataError("There is no good picture to learn from.", "Give a folder of good pictures.")
    if held_out is not None and held_out.num_views == 0:
        held_out = None
    if config.early_stop and held_out is None:
        raise ConfigError("early_stop needs good pictures that are not learnt from.", "Set early_stop=0.")
    writer = None if run.log_dir is None else _summary_writer()
    on_gpu = torch.device(run.device).type == "cuda"
    seeded = list(range(torch.cuda.device_count())) if on_gpu else []
    with (
        open_processes(run.device, config.precision) as processes,
        torch.random.fork_rng(devices=seeded),  # the caller's random state is put back
    ):
        training = _Loop(method, config, pictures, held_out, run, processes)
        finished = training.resume()
        if finished is not None:
            return finished
        if writer is None or run.log_dir is None or not processes.is_main:
            return training.run_to_end()
        with writer(log_dir=str(run.log_dir), purge_step=training.state.step) as board:
            training.board = board
            return training.run_to_end()


class _Loop:
    """The loop over a training's steps: learns, tells, looks at held-out pictures, keeps the state."""

    def __init__(
        self,
        method: Trained,
        config: TrainingConfig,
        pictures: Pictures,
        held_out: Pictures | None,
        run: Run,
        processes: Processes,
    ) -> None:
        self.method, self.config, self.run, self.processes = method, config, run, processes
        self.pictures, self.held_out = pictures, held_out
        self.network = cast(nn.Module, method)
        self.total = planned_steps(config, pictures.num_views, processes.count)
        self.state = TrainingState(self.network, self.total, config)
        self.order = PictureOrder(pictures.products, config.balance, run.seed)
        self.board: SummaryWriter | None = None
        self.warnings: list[str] = []
        self.progress = run.progress if processes.is_main else no_progress
        self.say = run.say if processes.is_main else no_words
        self._look_every = max(round(_LOOK_SHARE * self.total), 1)
        self._whole = True  # False while the state is between two steps
        self._seconds_before = 0.0
        self._started = self._kept = time.monotonic()

    def run_to_end(self) -> FitRecord:
        """Train, and leave the method with the weights that are kept."""
        try:
            while self.state.step < self.total and not self._out_of_patience():
                with signals_held():
                    self._one_step()
            return self._finish()
        except BaseException:
            if self._whole:  # what was learnt so far is not lost
                self._keep()
            raise
        finally:
            self.state.optimizer.zero_grad(set_to_none=True)
            self.network.eval()

    def _finish(self) -> FitRecord:
        state, config, best = self.state, self.config, self.state.best
        held_out: Figures | None = None
        if best is not None:
            held_out = Figures(best.loss, math.nan if best.normalised is None else best.normalised)
        elif self.held_out is not None:
            held_out = self._look_at_held_out()
        self._whole = False
        state.choose()
        learnt = state.mean_of_last()
        record = FitRecord(warnings=[*self.warnings])
        record.facts = {
            "steps": self.total,
            "stopped_at": state.step if state.step < self.total else None,
            "loss": learnt.loss,
            "normalised_loss": _number(learnt.normalised),
            "held_out_loss": None if held_out is None else held_out.loss,
            "held_out_normalised_loss": None if held_out is None else _number(held_out.normalised),
            "seconds": round(self._seconds(), 3),
            "precision": self.processes.precision,
            "processes": self.processes.count,
            "views_seen": state.step * config.batch * self.processes.count,
        }
        if best is not None:
            record.facts["best_step"] = best.step
        if learnt.normalised > _NOT_LEARNT and self.pictures.num_views >= _MEAN_MEANS:
            record.warnings.append(
                f"The training's normalised loss is {learnt.normalised:.2f}: the model has learnt little "
                f"more than the mean picture. Raise steps (there were {state.step})."
            )
        self._keep(record)
        return record

    # One step

    def _one_step(self) -> None:
        processes, state = self.processes, self.state
        step = Step(state.step, self.total, self.run.seed, processes.rank)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        indices = self.order.indices(step.number, self.config.batch, processes.rank, processes.count)
        batch = self.pictures.batch(indices, pictures="pictures" in self.method.needs(step))
        self.network.train()
        cast(nn.Module, self.method.backbone).eval()
        _seed_torch(step.stream_seed("torch"), processes.device)  # dropout
        rows = [self._update(loss, having, step) for loss, having in self._losses(batch, step)]
        if not rows:
            raise DataError(
                f"The pictures of step {step.number + 1} of {self.total} hold nothing to learn from.",
                "Check the region of interest, or raise batch.",
            )
        loss, normalised, norm = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        state.log(step.number, Figures(loss, normalised))
        state.step += 1
        if self.config.early_stop and (state.step % self._look_every == 0 or state.step == self.total):
            self._look_at_held_out()
        self._whole = True
        if time.monotonic() - self._kept >= KEEP_EVERY_SECONDS:
            self._keep()
        self._tell(step, Figures(loss, normalised), norm)  # last: a listener may end the training

    def _losses(self, batch: Batch, step: Step) -> Iterator[tuple[Loss | None, float]]:
        """Each loss, and the share of processes that have one: some may give fewer than others."""
        losses = iter(self.method.losses(batch, step))
        while True:
            with self.processes.autocast():
                loss = next(losses, None)
            having = self.processes.share(loss is not None)
            if having == 0:
                return
            yield loss, having

    def _update(self, loss: Loss | None, having: float, step: Step) -> tuple[float, float, float]:
        """One optimiser step; loss, normalised loss and gradient norm, averaged over the processes."""
        state = self.state
        state.optimizer.zero_grad(set_to_none=True)
        figures = torch.zeros(2, device=self.processes.device)
        if loss is not None:
            if loss.value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{self.method.name} gave a loss of {loss.value.dtype}, not float32")
            loss.value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            value = loss.value.detach().float()
            figures = torch.stack([value, _ratio(value, loss.baseline)])
        figures = self.processes.average_gradients(state.parameters.values(), figures, having)
        gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        cost, normalised, size = torch.stack([*figures, norm.to(figures)]).tolist()
        if not math.isfinite(cost) or not math.isfinite(size):
            self._refuse("loss" if not math.isfinite(cost) else "gradient of the loss", step.number + 1)
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(state.parameters.values(), self.config.clip, norm)
        self._whole = False
        state.optimizer.step()
        self.method.after_step(step)
        state.update_average()
        return cost, normalised, size

    def _refuse(self, what: str, number: int) -> None:
        self._whole = False  # going on from here would end here again
        raise FettleError(
            f"The {what} at step {number} of {self.total} is not a number.",
            f"Lower lr (it is {self.config.lr:g}); the state kept last stays.",
        )

    def _tell(self, step: Step, figures: Figures, norm: float) -> None:
        done, tenth = step.number + 1, step.number * 10 // self.total
        self.progress("training", done, self.total)
        if done * 10 // self.total > tenth:
            mean = self.state.mean_tenth(tenth)
            words = (
                "" if math.isnan(mean.normalised) else f", normalised {mean.normalised:.2f} (1 = the mean)"
            )
            self.say(f"Step {done} of {self.total}: loss {mean.loss:.3g}{words}.")
        if self.board is not None and step.number % max(self.total // _BOARD_POINTS, 1) == 0:
            self.board.add_scalar("training/loss", figures.loss, done)
            self.board.add_scalar("training/normalised_loss", figures.normalised, done)
            self.board.add_scalar("training/learning_rate", learning_rate(self.config, step), done)
            self.board.add_scalar("training/gradient_norm", norm, done)

    # Held-out pictures

    def _out_of_patience(self) -> bool:
        state = self.state
        if state.best is None or state.step % self._look_every:
            return False
        return state.step - state.best.step >= max(self.config.early_stop * self.total, 1)

    def _look_at_held_out(self) -> Figures:
        """The held-out loss of the weights that would be kept now; with early stop, remember the best."""
        with self.state.averaged():
            figures = self._held_out_figures()
            if self.config.early_stop:
                self.state.compare(figures)
        if self.board is not None:
            self.board.add_scalar("held_out/normalised_loss", figures.normalised, self.state.step)
        return figures

    @torch.no_grad()
    def _held_out_figures(self) -> Figures:
        """Mean over the held-out views; each process takes its share of the batches."""
        assert self.held_out is not None
        size, num = self.config.batch, self.held_out.num_views
        sums = torch.zeros(3, dtype=torch.float64)  # loss, normalised, count
        self.network.eval()
        for first in range(self.processes.rank * size, num, self.processes.count * size):
            indices = range(first, min(first + size, num))
            with self.processes.autocast():
                loss = self.method.held_out_loss(self.held_out.batch(indices))
            value = float(loss.value)
            row = [value, _ratio(value, loss.baseline), 1.0]
            sums += len(indices) * torch.tensor(row, dtype=torch.float64)
        loss_sum, ratio_sum, count = self.processes.mean(sums.to(self.processes.device)).tolist()
        if not math.isfinite(loss_sum):
            self._refuse("held-out loss", self.state.step)
        return Figures(loss_sum / count, ratio_sum / count)

    # The state on disk

    def resume(self) -> FitRecord | None:
        """Go on from a kept state of this very training; the record where it was finished already."""
        folder = self.run.training_dir
        record = None if folder is None else self._load(folder)
        start = hashlib.sha256(f"{self.state.step}/{record is None}".encode())
        for parameter in self.state.parameters.values():
            start.update(parameter.detach().cpu().numpy().data)
        self.processes.check_agree(
            "weights at the start",
            int.from_bytes(start.digest()[:4], "little"),
            "Give all the same seed, pictures and folder of the training's state.",
        )
        return record

    def _load(self, folder: Path) -> FitRecord | None:
        try:
            kept = read_state(folder)
            if kept is None:
                return None
            header, tensors = kept
            if header.fingerprint != self._fingerprint():
                self.say(
                    f"The state in {folder} is of another training (other settings, pictures or versions): "
                    "this one starts anew."
                )
                return None
            self.state.load(header, tensors)
        except DamagedState as error:
            self.say(f"The training's state in {folder} is damaged ({error}): the training starts anew.")
            return None
        if header.facts is not None:
            self.network.eval()
            self.say(f"This training was finished already: its weights are taken from {folder}.")
            return FitRecord(header.facts, [*header.warnings])
        self._seconds_before = header.seconds
        self.say(f"The training goes on from step {self.state.step} of {self.total}.")
        return None

    def _keep(self, record: FitRecord | None = None) -> None:
        """Write the state; a disk that takes none is no reason to lose the training that runs."""
        self._kept = time.monotonic()
        folder = self.run.training_dir
        if folder is None or not self.processes.is_main:
            return
        header = Header(
            fingerprint=self._fingerprint(),
            step=self.state.step,
            updates=self.state.updates,
            seconds=self._seconds(),
            best=self.state.best,
            facts=None if record is None else record.facts,
            warnings=[] if record is None else record.warnings,
        )
        try:
            write_state(folder, header, self.state.tensors(finished=record is not None))
        except OSError as error:
            words = (
                f"The training's state could not be written to {folder} ({error.strerror or error}): "
                "if it is stopped, it starts anew."
            )
            if words not in self.warnings:
                self.warnings.append(words)
                self.say(words)

    def _fingerprint(self) -> str:
        method, run = self.method, self.run
        both = [self.pictures] if self.held_out is None else [self.pictures, self.held_out]
        parts: list[Json] = [
            [method.name, method.feature_key(), *method.levels, method.backbone.spec.sha256],
            self.config.model_dump_json(),
            [run.seed, self.processes.count, torch.__version__],
            [[*pictures.products] for pictures in both],
            [[*pictures.keys] for pictures in both],
            [one.sha256 for one in method.templates()] if isinstance(method, Templated) else [],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


def _seed_torch(seed: int, device: torch.device) -> None:
    """`torch.manual_seed`, which without a GPU formats a stack for each kind of device: 0.3 ms a call."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _ratio(value: _Scalar, baseline: float) -> _Scalar:
    """The normalised loss, NaN where there is nothing to compare with."""
    return value / baseline if baseline > 0 else value * math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "A TensorBoard log needs the package tensorboard.",
            'Install it with: pip install "fettle[board]", or name no log folder.',
        ) from error
    return SummaryWriter
