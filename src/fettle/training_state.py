"""What a training holds between two steps: weights, AdamW's moments, averages, the best so far, losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fettle.checkpoint import Best, DamagedState, Header
from fettle.errors import ConfigError
from fettle.training_config import TrainingConfig

BUCKETS = 100  # of the loss log, each a hundredth of the training
_BACKBONE = "backbone."


class Figures(NamedTuple):
    """A loss, and its ratio to its baseline (NaN where that is 0)."""

    loss: float
    normalised: float


class TrainingState:
    """Everything that a training changes, and how it goes to disk and back.

    Args:
        network: the method. Its parameters that require gradients are trained, the backbone's never.
        total: steps planned.
        config: learning rate, weight decay, and the decay of the average of the weights (0 keeps none).

    Attributes:
        step, updates: steps and optimiser steps done.
        parameters: the trained ones by name.
        best: the best held-out loss so far.
    """

    def __init__(self, network: nn.Module, total: int, config: TrainingConfig) -> None:
        self._network = network
        self._ema = config.ema
        self._stored = config.stored
        self.total = total
        self.parameters = {
            name: parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and not name.startswith(_BACKBONE)
        }
        self.optimizer = self._adamw(config)
        self._average = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema else {}
        )
        self.step = self.updates = 0
        self.best: Best | None = None
        self._best_state: dict[str, Tensor] = {}
        self._losses = torch.zeros(BUCKETS, 3, dtype=torch.float64)  # sum, normalised sum, count

    def _adamw(self, config: TrainingConfig) -> torch.optim.AdamW:
        parameters = list(self.parameters.values())
        linear = {id(m.weight) for m in self._network.modules() if isinstance(m, nn.Linear)}
        decayed = [p for p in parameters if config.decay == "all" or id(p) in linear]
        kept = {id(p) for p in decayed}
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if id(p) not in kept], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)

    # The loss log: the same memory for any number of steps

    def log(self, step: int, figures: Figures) -> None:
        row = torch.tensor([*figures, 1.0], dtype=torch.float64)
        self._losses[step * BUCKETS // self.total] += row

    def mean_tenth(self, tenth: int) -> Figures:
        """Mean over the steps of one tenth of the training, 0..9."""
        return self._mean(tenth * BUCKETS // 10, (tenth + 1) * BUCKETS // 10)

    def mean_of_last(self) -> Figures:
        """Mean over the last steps done, as many as a tenth of the training."""
        end = (self.step - 1) * BUCKETS // self.total + 1
        return self._mean(max(end - BUCKETS // 10, 0), end)

    def _mean(self, first: int, end: int) -> Figures:
        loss, normalised, count = self._losses[first:end].sum(dim=0).tolist()
        return Figures(loss / count, normalised / count)

    # Which weights are kept

    @torch.no_grad()
    def update_average(self) -> None:
        """After an optimiser step: average <- decay average + (1 - decay) weights."""
        decay = min(self._ema, (1 + self.updates) / (10 + self.updates))
        for name, average in self._average.items():
            average.lerp_(self.parameters[name], 1 - decay)
        self.updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the weights are the average's, where one is kept."""
        raw = {name: self.parameters[name].detach().clone() for name in self._average}
        try:
            _copy(self._average, self.parameters)
            yield
        finally:
            _copy(raw, self.parameters)

    def compare(self, figures: Figures) -> None:
        """Remember the state that the method is in, if its held-out loss is the best so far."""
        if self.best is None or figures.loss < self.best.loss:
            normalised = None if math.isnan(figures.normalised) else figures.normalised
            self.best = Best(step=self.step, loss=figures.loss, normalised=normalised)
            self._best_state = {name: tensor.clone() for name, tensor in self._method_state().items()}

    def choose(self) -> None:
        """End the training: give the method the best state, or the average, or leave it the last one.

        Raises:
            ConfigError: a weight does not fit into what weights are stored in.
        """
        _copy(self._average, self.parameters)
        _copy(self._best_state, self._method_state())
        if self._stored == "fp16":
            rounded = {name: p.detach().half().float() for name, p in self.parameters.items()}
            if not all(bool(torch.isfinite(tensor).all()) for tensor in rounded.values()):
                raise ConfigError(
                    "A trained weight is too large for half precision.", "Use --set stored=fp32."
                )
            _copy(rounded, self.parameters)

    # To disk and back

    def tensors(self, *, finished: bool) -> dict[str, Tensor]:
        """By name: what going on needs; of a finished training the method's state alone."""
        tensors = {f"method/{name}": tensor for name, tensor in self._method_state().items()}
        if finished:
            return tensors
        tensors["losses"] = self._losses
        tensors |= {f"average/{name}": tensor for name, tensor in self._average.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self._best_state.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"adamw/{key}/{name}": tensor for key, tensor in moments.items()}
        return tensors

    def load(self, header: Header, tensors: Mapping[str, Tensor]) -> None:
        """Take over a kept state, or change nothing.

        Raises:
            DamagedState: it does not fit the method.
        """
        own = self._method_state()
        method, average, best = (_part(tensors, part) for part in ("method/", "average/", "best/"))
        _check(method, own)
        if header.facts is None:
            _check(average, self._average)
            _check(best, own if header.best else {})
            _check({"losses": tensors.get("losses", torch.empty(0))}, {"losses": self._losses})
            moments = self._moments(tensors)
            self.optimizer.state.update(moments)
            self._losses.copy_(tensors["losses"])
            _copy(average, self._average)
            self._best_state = {name: tensor.to(own[name].device) for name, tensor in best.items()}
        _copy(method, own)
        self.step, self.updates, self.best = header.step, header.updates, header.best

    def _moments(self, tensors: Mapping[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        keys = ("step", "exp_avg", "exp_avg_sq")
        parts = {key: _part(tensors, f"adamw/{key}/") for key in keys}
        # A parameter that has had no gradient yet has no moments.
        started = {name: self.parameters[name] for name in parts["step"] if name in self.parameters}
        _check(parts["step"], {name: torch.empty(()) for name in started})
        _check(parts["exp_avg"], started)
        _check(parts["exp_avg_sq"], started)
        return {
            parameter: {
                "step": parts["step"][name],
                "exp_avg": parts["exp_avg"][name].to(parameter.device),
                "exp_avg_sq": parts["exp_avg_sq"][name].to(parameter.device),
            }
            for name, parameter in started.items()
        }

    def _method_state(self) -> dict[str, Tensor]:
        """All that the method holds, besides the backbone."""
        state: dict[str, Tensor] = self._network.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.startswith(_BACKBONE)}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _check(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in own.items()}:
        raise DamagedState("it does not fit the method")


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
