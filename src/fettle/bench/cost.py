"""What a method costs at inspection: multiply-adds, trainable parameters, and time against its backbone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fettle.detector import Detector
from fettle.protocols import Method


@dataclass(frozen=True)
class Cost:
    """Of one method at its frame.

    Attributes:
        multiply_adds, backbone_multiply_adds: a picture, through the whole method and its backbone alone.
        trainable: parameters that a training changes.
        seconds, backbone_seconds: a picture, medians.
        ratio: median of the two times' ratio, pair by pair.
    """

    multiply_adds: int
    backbone_multiply_adds: int
    trainable: int
    seconds: float
    backbone_seconds: float
    ratio: float


def cost_of(detector: Detector, *, batch: int = 8, rounds: int = 9) -> Cost:
    """Measure on noise. Times are taken in turns, so that a busy machine slows both alike.

    Args:
        batch: pictures that go through together. rounds: pairs of timed passes.
    """
    method, frame = detector.method, detector.frame
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(batch, 3, frame.height, frame.width, generator=generator).to(detector.device)
    valid = torch.ones_like(pictures[:, :1], dtype=torch.bool)

    def whole() -> object:
        return method(pictures, valid)

    def backbone() -> object:
        return method.backbone(pictures, method.levels)

    times = interleaved(whole, backbone, rounds=rounds, device=detector.device)
    return Cost(
        multiply_adds=multiply_adds(whole) // batch,
        backbone_multiply_adds=multiply_adds(backbone) // batch,
        trainable=trainable_parameters(method),
        seconds=median(own for own, _ in times) / batch,
        backbone_seconds=median(other for _, other in times) / batch,
        ratio=median(own / other for own, other in times),
    )


@torch.no_grad()
def multiply_adds(call: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products, convolutions and attention in a call; what faiss does and sums of
    elements are not among them."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def trainable_parameters(method: Method) -> int:
    """Number of parameters that require a gradient."""
    parameters = cast(nn.Module, method).parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


@torch.inference_mode()
def interleaved(
    one: Callable[[], object], other: Callable[[], object], *, rounds: int, device: str = "cpu"
) -> list[tuple[float, float]]:
    """Seconds of both calls, in turns, `rounds` times; a first round is not counted."""
    times = [(_seconds(one, device), _seconds(other, device)) for _ in range(rounds + 1)]
    return times[1:]


def _seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, **more: object
) -> int:
    """Of softmax(q k^T) v, the softmax left out: (B, heads, N, d), (B, heads, M, d), (B, heads, M, e)."""
    batch, heads, num_queries, width = query
    return 2 * batch * heads * num_queries * key[2] * (width + value[3])


# torch counts fused attention on a GPU, but not this one.
_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
