"""One training in several processes, by Hugging Face accelerate.

A launcher (`accelerate launch`, torchrun) starts the same command several times and says in the environment
which process is which. torch is imported inside functions, so that a command line may ask who it is.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fettle.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

Precision = Literal["fp32", "bf16"]


def is_main_process() -> bool:
    """Whether this is the one process, or the first of several: the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def process_device(device: str) -> str:
    """The device of this process: of several processes on "cuda", each takes the GPU of its local number."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if several and device == "cuda" else device


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use here. Raises UsageError."""
    import torch

    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UsageError(
            f"The device '{device}' cannot be used here ({reason}).",
            "'fettle doctor' lists the devices; 'cpu' always works.",
        ) from error


def choose_precision(wanted: Literal["auto", "fp32", "bf16"], device: str) -> Precision:
    """The precision of a training: "auto" takes bfloat16 on a GPU that computes it, else float32.

    Raises:
        ConfigError: bfloat16 is asked for on a GPU that has none.
    """
    import torch

    on_gpu = torch.device(device).type == "cuda"
    gpu_has = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and on_gpu and not gpu_has:
        raise ConfigError(f"The GPU {device} does not compute bfloat16.", "Set precision=auto.")
    return "bf16" if wanted == "bf16" or (wanted == "auto" and gpu_has) else "fp32"


@dataclass(frozen=True)
class Processes:
    """The processes of one training.

    Attributes:
        rank: number of this process, from 0. count: how many there are.
        precision: "fp32" or "bf16".
    """

    accelerator: Accelerator
    device: torch.device
    rank: int
    count: int
    precision: Precision

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Where the network computes in the training's precision; parameters and losses are float32."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, the same in each; a single process gets its own tensor back."""
        if self.count == 1:
            return tensor
        mean: Tensor = self.accelerator.reduce(tensor, "mean")
        return mean

    def share(self, true: bool) -> float:
        """The share of the processes for which something is true."""
        import torch

        one = torch.tensor(float(true), device=self.device)
        return float(true) if self.count == 1 else float(self.mean(one))

    def average_gradients(self, parameters: Iterable[Tensor], figures: Tensor, having: float) -> Tensor:
        """Average gradients, in place, and `figures` (n,) over the processes that have a loss.

        One message for all of them. A parameter that no process has a gradient for keeps none, so that AdamW
        leaves it alone.

        Args:
            having: the share of the processes that have a loss; the others give zeros.
        """
        import torch

        if self.count == 1:
            return figures
        own = list(parameters)
        has = figures.new_tensor([parameter.grad is not None for parameter in own])
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in own]
        mean = self.mean(torch.cat([*parts, has, figures])) / having
        sizes = [*(len(part) for part in parts), len(has), len(figures)]
        *gradients, has, figures = torch.split(mean, sizes)
        for parameter, gradient, present in zip(own, gradients, has.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if present else None
        return figures

    def check_agree(self, what: str, number: int, remedy: str) -> None:
        """Refuse to start where processes hold different things, `number` (below 2^32) telling them apart.

        Also waits until every process has come here.

        Raises:
            UsageError: the processes' numbers differ.
        """
        import torch

        own = torch.tensor(number, dtype=torch.float64, device=self.device)
        agree = (self.mean(own) == own).double()
        if float(self.mean(agree)) < 1:
            raise UsageError(f"The {self.count} processes do not hold the same {what}.", remedy)


@contextmanager
def open_processes(device: str, precision: Literal["auto", "fp32", "bf16"]) -> Iterator[Processes]:
    """The processes that a launcher started, or this one alone; `device` says where each computes.

    accelerate keeps its state in global singletons. They are set aside before and put back after, so that
    one training neither sees another's settings nor leaves its own.

    Raises:
        ConfigError: see `choose_precision`.
        UsageError: several processes on GPUs, and this one is not on its own.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    chosen = choose_precision(precision, device)
    own_device = torch.device(device)
    singletons = [kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)]
    before = [dict(state) for state in singletons]
    for state in singletons:
        state.clear()
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if chosen == "bf16" else "no", cpu=own_device.type == "cpu"
        )
        count = int(accelerator.num_processes)
        if count > 1:
            atexit.unregister(_leave_group)
            atexit.register(_leave_group)
            if own_device.type != "cpu" and own_device != accelerator.device:
                raise UsageError(
                    f"Process {accelerator.process_index} computes on {own_device}, not on its own GPU "
                    f"{accelerator.device}.",
                    "Name the device 'cuda' and start one process a GPU.",
                )
        yield Processes(accelerator, own_device, int(accelerator.process_index), count, chosen)
    finally:
        for state, content in zip(singletons, before, strict=True):
            state.clear()
            state.update(content)


def _leave_group() -> None:
    """At exit only: a second training in the same processes uses the same group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
