"""A tiny trained method and its pictures, in memory. Run as a script it is one of several processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fettle.protocols import BackboneSpec, Batch, FitRecord, Loss, Run, Step
from fettle.training import TrainingConfig, train

CHANNELS, TOKENS = 6, 4


class ToyBackbone(nn.Module):
    """Never called; its one parameter must never move, its batch norm never be in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = BackboneSpec("toy", "0" * 64, "none", "none", (), 1, (0, 0, 0), (1, 1, 1))
        self.frozen = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm2d(3)


class ToyMethod(nn.Module):
    """Rebuilds noisy tokens through a bottleneck with dropout; keeps a momentum copy of one weight."""

    name = "toy"
    levels = ("one",)

    def __init__(self, config: TrainingConfig, *, num_losses: int = 1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = ToyBackbone()
        self.config = config
        self.num_losses = num_losses
        self.down = nn.Linear(CHANNELS, 3)
        self.up = nn.Linear(3, CHANNELS)
        self.unused = nn.Parameter(torch.ones(2))  # never has a gradient
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("momentum", self.up.weight.detach().clone())
        self.before_step: Callable[[Step], None] = lambda step: None
        self.noise: list[Tensor] = []
        self.scale = 1.0

    def feature_key(self) -> str:
        return "toy"

    def needs(self, step: Step) -> frozenset[str]:
        return frozenset({"pictures"} if step.number % 2 else ())

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        assert self.training
        assert not self.backbone.norm.training
        assert (batch.pictures is not None) == bool(step.number % 2)
        self.noise.append(self.noise_of(batch, step))
        for number in range(self.num_losses):
            self.before_step(step)
            yield self.loss_of_part(batch, step, number)

    def noise_of(self, batch: Batch, step: Step) -> Tensor:
        return torch.randn(batch.features["tokens"].shape, generator=step.generator("noise"))

    def loss_of_part(self, batch: Batch, step: Step, number: int) -> Loss:
        """The loss on one of `num_losses` parts of the tokens."""
        clean = batch.features["tokens"]  # (B, N, C)
        part = clean.chunk(self.num_losses, dim=1)[number]
        noise = self.noise_of(batch, step)[:, : part.shape[1]]
        rebuilt = self(part + 0.1 * noise)
        return Loss((rebuilt.float() - part).square().mean() * self.scale, baseline_of(clean))

    def held_out_loss(self, batch: Batch) -> Loss:
        assert not self.training
        assert not torch.is_grad_enabled()
        clean = batch.features["tokens"]
        return Loss((self(clean).float() - clean).square().mean(), baseline_of(clean))

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        self.momentum.lerp_(self.up.weight, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        rebuilt: Tensor = self.up(self.dropout(torch.tanh(self.down(tokens))))
        return rebuilt


class ToyPictures:
    """Seeded tokens (views, N, C)."""

    def __init__(self, num_views: int = 12, *, seed: int = 0, products: Sequence[str] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randn(num_views, TOKENS, 2, generator=generator)
        self.tokens = factors @ torch.randn(2, CHANNELS, generator=generator)
        self.products = list(products or ["a"] * num_views)
        self.keys = [f"{seed}/{i}" for i in range(num_views)]
        self.asked: list[list[int]] = []

    @property
    def num_views(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int], *, pictures: bool = False) -> Batch:
        self.asked.append(list(indices))
        chosen = self.tokens[list(indices)]
        valid = torch.ones(len(chosen), 1, 2, 2, dtype=torch.bool)
        return Batch({"tokens": chosen}, valid, torch.zeros(len(chosen), 3, 2, 2) if pictures else None)


def baseline_of(tokens: Tensor) -> float:
    return float(tokens.var(unbiased=False))


def toy_config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 20, "batch": 4, "lr": 0.01, "clip": 1.0, **changes})


def fitted(
    run: Run, *, num_losses: int = 1, held: bool = False, **changes: Any
) -> tuple[ToyMethod, FitRecord]:
    """A toy method trained on toy pictures."""
    method = ToyMethod(toy_config(**changes), num_losses=num_losses)
    return method, train_toy(method, run, held=held)


def train_toy(
    method: ToyMethod, run: Run, *, held: bool = False, pictures: ToyPictures | None = None
) -> FitRecord:
    held_out = ToyPictures(5, seed=1) if held else None
    return train(method, pictures or ToyPictures(), run, held_out=held_out)  # type: ignore[arg-type]  # no pictures


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    mine, other = left.state_dict(), right.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def main(out: Path, steps: int, losses_of_first: int, losses_of_others: int, state: Path) -> None:
    """Train as the process that the environment says; write weights and the first noise."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    words: list[str] = []
    method, record = fitted(
        Run(say=words.append, training_dir=state),
        num_losses=losses_of_others if rank else losses_of_first,
        held=True,
        steps=steps,
    )
    tensors = dict(method.state_dict())
    if method.noise:
        tensors["first_noise"] = method.noise[0]
    tensors["held_out"] = torch.tensor(record.facts["held_out_loss"], dtype=torch.float64)
    tensors["loss"] = torch.tensor(record.facts["loss"], dtype=torch.float64)
    tensors["processes"] = torch.tensor(record.facts["processes"])
    tensors["words"] = torch.tensor(len(words))
    save_file(tensors, out / f"rank{rank}.safetensors")


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:5]
    main(Path(folder), *map(int, numbers), Path(sys.argv[5] if len(sys.argv) > 5 else f"{folder}/state"))
