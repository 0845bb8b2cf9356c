"""The optimisation of F2PAD: proximal gradient steps on a mask, or on a free anomaly (sections 4 and 6).

Every quantity is a picture's own: pictures of a batch share a network pass and nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from fettle.refine.energy import WindowEnergy
from fettle.refine.settings import F2PADConfig
from fettle.refine.sharing import Sharing, make_sharing

Stop = Literal["converged", "max_iter", "time_cap", "not_finite"]

_FIRST_CHECK = 8  # iterations before a picture may be found converged
_LOOK_BACK = 6  # iterations that a gain is counted over
_TINY = 1e-12
_START = {"zero": 0.0, "half": 0.5, "full": 1.0}

_Rows = TypeVar("_Rows", "Problem", "_State")


@dataclass(frozen=True)
class Problem:
    """What to solve, for some windows.

    Attributes:
        picture: X, (B, 3, H, W) in 0..1.
        roi: P, (B, 1, H, W), 0 or 1.
        difference: D, the full replacement, X - F inside P and 0 outside, (B, 3, H, W).
        before: E(X), (B,), above the floor. filled: E(F), (B,).
        floor: the energy that counts as nothing left, (B,).
    """

    picture: Tensor
    roi: Tensor
    difference: Tensor
    before: Tensor
    filled: Tensor
    floor: Tensor

    def share(self, energy: Tensor) -> Tensor:
        """Energies (B,) as shares of what could be removed: 1 for X, 0 at the floor and below it.

        So nothing is gained by a picture that looks better than the fill.
        """
        return (energy - self.floor).clamp_min(0) / (self.before - self.floor)

    def restored(self, unknown: Tensor) -> Tensor:
        """N, from V (B, 1, H, W) or A (B, 3, H, W)."""
        anomaly = unknown * self.difference if unknown.shape[1] == 1 else unknown
        restored: Tensor = (self.picture - anomaly).clamp(0, 1)
        return restored

    def rows(self, keep: Sequence[int]) -> Problem:
        """Of these windows only."""
        return _rows(self, keep)


@dataclass(frozen=True)
class _State:
    """What the iterations carry from one to the next, a row a picture."""

    unknown: Tensor  # V (B, 1, H, W) or A (B, 3, H, W)
    gradient: Tensor  # running mean of the shared gradient
    square: Tensor  # running mean of its square
    history: Tensor  # least objective after each evaluation, (B, T + 1)
    best: Tensor  # the unknown of the least objective
    best_objective: Tensor  # (B,)
    best_energy: Tensor  # (B,)


class Solution(NamedTuple):
    """The best iterate of one window.

    Attributes:
        unknown: V (1, H, W), or A (3, H, W).
        objective, energy: J and E at it.
        objective_start: J of the full replacement.
        iterations: steps made.
    """

    unknown: Tensor
    objective: float
    energy: float
    objective_start: float
    iterations: int
    stop: Stop


def group_soft_threshold(values: Tensor, threshold: Tensor | float) -> Tensor:
    """Shrink the norm over channels (dim 1) of each pixel by `threshold`, to 0 at least."""
    norm = values.norm(dim=1, keepdim=True)
    kept: Tensor = (1 - threshold / norm.clamp_min(_TINY)).clamp_min(0)
    return values * kept


def soft_threshold(values: Tensor, threshold: Tensor | float) -> Tensor:
    """Shrink the size of each value by `threshold`, to 0 at least."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)


def total_variation(anomaly: Tensor) -> Tensor:
    """Sum of the steps of ||A|| between neighbouring pixels; (B, 3, H, W) -> (B,)."""
    size = (anomaly.square().sum(dim=1) + _TINY).sqrt()
    down, right = size.diff(dim=1).abs(), size.diff(dim=2).abs()
    return down.flatten(1).sum(dim=1) + right.flatten(1).sum(dim=1)


def solve(
    problem: Problem,
    energy: WindowEnergy,
    config: F2PADConfig,
    time_caps_s: Sequence[float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Solution]:
    """Minimise J for each window. A window that has stopped leaves the batch.

    Call it with gradients enabled. The answer is the best of all iterates, of nothing removed and of
    everything replaced; with `iters` 0 it is the full replacement.

    Args:
        time_caps_s: wall time after which each window's iterations end, s; None: the configuration's.
    """
    objective = Objective(problem, config)
    live = list(range(len(problem.picture)))
    caps = [config.time_cap_s] * len(live) if time_caps_s is None else time_caps_s
    found: dict[int, Solution] = {}
    state = _start(problem, objective, config)
    sharing = make_sharing(config, problem.picture, problem.roi)
    start_values = objective.of_full.tolist()
    spent = 0.0  # wall time of the iterations, a picture
    for t in range(config.iters + 1):
        began, num_live = clock(), len(live)
        last = t == config.iters
        absolute, gradient, smooth = objective.evaluate(state.unknown, energy, with_gradient=not last)
        state = _keep_best(state, objective, absolute, smooth)
        late = [t > 0 and spent >= caps[number] for number in live]
        stops = _stops(state, gradient, t, config, late)
        for row, number in enumerate(live):
            stop = stops[row]
            if stop is not None:
                found[number] = Solution(
                    state.best[row],
                    float(state.best_objective[row]),
                    float(state.best_energy[row]),
                    start_values[number],
                    t,
                    stop,
                )
        keep = [row for row, stop in enumerate(stops) if stop is None]
        if not keep:
            break
        if len(keep) < len(live):
            live = [live[row] for row in keep]
            state, energy, sharing = _rows(state, keep), energy.rows(keep), sharing.rows(keep)
            objective = objective.rows(keep)
            gradient = gradient[keep]
        state = _step(state, gradient, t, objective, sharing, config)
        spent += (clock() - began) / num_live
    return [found[number] for number in sorted(found)]


class Objective:
    """J = share of the energy left + lambda1 sparsity + lambda2 variation (section 4).

    Energy and sparsity are 1 at the full replacement; "l1" and the variation are over its group sparsity.

    Attributes:
        weight: what a unit of sparsity costs, lambda1 over its size at the full replacement, (B, 1, 1, 1).
        of_full: J of the full replacement, (B,).
    """

    def __init__(self, problem: Problem, config: F2PADConfig) -> None:
        self.problem = problem
        self.config = config
        self.free = config.form == "free"
        full = problem.difference if self.free else problem.roi
        size = problem.difference.norm(dim=1) if self.free else problem.roi[:, 0]
        self.full_size = size.flatten(1).sum(dim=1).clamp_min(_TINY)  # (B,)
        lambda1 = 0.0 if config.sparsity == "none" else config.lambda1
        self.weight = (lambda1 / self.full_size).view(-1, 1, 1, 1)
        self.of_full = problem.share(problem.filled) + self.sparsity(full) + self.variation(full)

    def rows(self, keep: Sequence[int]) -> Objective:
        return Objective(self.problem.rows(keep), self.config)

    def evaluate(
        self, unknown: Tensor, energy: WindowEnergy, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """E(N) (B,), the gradient of the smooth part inside P, and the smooth part of J (B,)."""
        point = unknown.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            absolute = energy(self.problem.restored(point))
            smooth = self.problem.share(absolute) + self.variation(point)
        if not with_gradient:
            return absolute, torch.zeros_like(unknown), smooth
        (gradient,) = torch.autograd.grad(smooth.sum(), point)
        return absolute.detach(), gradient * self.problem.roi, smooth.detach()

    def variation(self, unknown: Tensor) -> Tensor:
        """(B,); 0 without lambda2."""
        if not self.config.lambda2:
            return self.problem.before.new_zeros(len(unknown))
        return self.config.lambda2 * total_variation(unknown) / self.full_size

    def sparsity(self, unknown: Tensor) -> Tensor:
        """(B,)"""
        if self.free and self.config.sparsity == "l1":
            size = unknown.abs().sum(dim=1, keepdim=True) / math.sqrt(3)
        else:
            size = unknown.norm(dim=1, keepdim=True)  # of a mask: the mask itself
        return (self.weight * size).flatten(1).sum(dim=1)

    def proximal(self, moved: Tensor, step: Tensor) -> Tensor:
        """The proximal step of the sparsity, and back into what is allowed (6.5)."""
        threshold = step * self.weight
        if not self.free:
            return (moved - threshold).clamp(0, 1) * self.problem.roi
        if self.config.sparsity == "l1":
            anomaly = soft_threshold(moved, threshold / math.sqrt(3))
        else:
            anomaly = group_soft_threshold(moved, threshold)
        return self.problem.picture - self.problem.restored(anomaly * self.problem.roi)


def _start(problem: Problem, objective: Objective, config: F2PADConfig) -> _State:
    full = problem.difference if objective.free else problem.roi
    unknown = _START[config.start if config.iters else "full"] * full
    count = len(unknown)
    best, best_objective, best_energy = unknown, unknown.new_full((count,), math.inf), problem.before
    if config.iters:  # nothing removed, and everything replaced, are candidates too
        fuller = objective.of_full < 1
        best = torch.where(fuller.view(-1, 1, 1, 1), full, torch.zeros_like(full))
        best_objective = objective.of_full.clamp_max(1)
        best_energy = torch.where(fuller, problem.filled, problem.before)
    nothing = torch.zeros_like(unknown)
    history = unknown.new_zeros(count, 0)
    return _State(unknown, nothing, nothing, history, best, best_objective, best_energy)


def _keep_best(state: _State, objective: Objective, absolute: Tensor, smooth: Tensor) -> _State:
    value = smooth + objective.sparsity(state.unknown)
    better = value < state.best_objective
    least = torch.where(better, value, state.best_objective)
    return replace(
        state,
        best=torch.where(better.view(-1, 1, 1, 1), state.unknown, state.best),
        best_objective=least,
        best_energy=torch.where(better, absolute, state.best_energy),
        # What is no number stays one, so that `_stops` sees it.
        history=torch.cat([state.history, torch.where(value.isfinite(), least, value)[:, None]], dim=1),
    )


def _stops(
    state: _State, gradient: Tensor, t: int, config: F2PADConfig, out_of_time: Sequence[bool]
) -> list[Stop | None]:
    """Why each picture makes no further step; None: it goes on."""
    finite = state.history[:, -1].isfinite() & gradient.flatten(1).isfinite().all(dim=1)
    settled = torch.zeros_like(finite)
    if t >= _FIRST_CHECK:
        settled = state.history[:, t - _LOOK_BACK] - state.history[:, t] < config.stop_gain
    ends: list[Stop | None] = ["time_cap" if late else None for late in out_of_time]
    if t == config.iters:
        ends, settled = ["max_iter"] * len(ends), torch.zeros_like(settled)
    return [
        "not_finite" if not is_finite else "converged" if is_settled else end
        for is_finite, is_settled, end in zip(finite.tolist(), settled.tolist(), ends, strict=True)
    ]


def _step(
    state: _State, gradient: Tensor, t: int, objective: Objective, sharing: Sharing, config: F2PADConfig
) -> _State:
    """One proximal step with momentum and one scale a picture (6.2 to 6.5).

    With "adam" the gradient's step has a scale a pixel; the sparsity's, which then has no closed form, keeps
    the picture's.
    """
    roi = objective.problem.roi
    shared = sharing(gradient, t)
    running = config.momentum * state.gradient + (1 - config.momentum) * shared
    square = config.scale_decay * state.square + (1 - config.scale_decay) * shared.square()
    unbiased = running / (1 - config.momentum ** (t + 1))
    own_scale = square / (1 - config.scale_decay ** (t + 1))
    scale = own_scale.sum(dim=(1, 2, 3), keepdim=True) / roi.sum(dim=(1, 2, 3), keepdim=True)
    if objective.free:  # without energy left there is no gradient, and the sparsity would take all at once:
        scale = torch.maximum(scale, objective.weight.square())  # a mask comes back in a step, A does not
    eta = config.eta_free if objective.free else config.eta
    eta *= 0.1 + 0.45 * (1 + math.cos(math.pi * t / config.iters))
    step = eta / scale.sqrt().clamp_min(_TINY)  # (B, 1, 1, 1)
    own_step = eta / own_scale.sqrt().clamp_min(_TINY) if config.step == "adam" else step
    moved = state.unknown - own_step * unbiased
    return replace(state, unknown=objective.proximal(moved, step), gradient=running, square=square)


def _rows(of: _Rows, keep: Sequence[int]) -> _Rows:
    """The same for some pictures only."""
    return replace(of, **{field.name: getattr(of, field.name)[list(keep)] for field in fields(of)})
