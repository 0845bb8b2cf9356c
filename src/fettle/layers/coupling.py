"""A normalising flow of conditional coupling blocks (Gudovskiy et al., WACV 2022, arXiv 2107.12571).

A flow turns features into a standard normal variable, step by step and without loss, and keeps count of how
each step stretches the volume: so it knows the density of what it was given. In a coupling block (Real NVP,
arXiv 1605.08803) a half of the channels stays, and tells, with a condition, how the other half is scaled and
shifted. Equations: specification of the base methods, sections 6.3 and 6.4.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mixing: TypeAlias = Literal["rotation", "permutation"]
"""How the channels change places between two blocks: by a random orthogonal matrix, or a random order."""

_MOST_SCALE = 1.9  # alpha: exp(s) lies within exp(-1.9) .. exp(1.9)
_DAMPING = 0.1  # of what the small network says, before the tanh
_GAIN_BETA = 0.5
_GAIN_START = 2 * math.log(math.exp(5) - 1)  # at which the gain is 1


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix of determinant 1, uniform over all of them: (size, size), float32."""
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal().sign()  # without it the decomposition's own choice of signs is not uniform
    if float(torch.linalg.slogdet(q).sign) < 0:
        q[:, 0] *= -1
    rotation: Tensor = q.float()
    return rotation


class ConditionalCoupling(nn.Module):
    """One block: coupling, gain and offset of each channel, mixing.

    The mixing is drawn by `initialise`, kept, and never trained; until then channels keep their places.

    Args:
        channels: C, of which the first C - floor(C / 2) stay and tell what happens to the others.
        condition: P, channels of the condition.
        hidden: width of the small network's hidden layer, times that of its input.
    """

    order: Tensor  # (C,) int64, of a permutation
    rotation: Tensor  # (C, C)

    def __init__(self, channels: int, condition: int, hidden: int, mixing: Mixing) -> None:
        super().__init__()
        self.sizes = [channels - channels // 2, channels // 2]
        self.mixing = mixing
        width = self.sizes[0] + condition
        self.net = nn.Sequential(
            nn.Linear(width, hidden * width), nn.ReLU(), nn.Linear(hidden * width, 2 * self.sizes[1])
        )
        self.gain = nn.Parameter(torch.full((channels,), _GAIN_START))
        self.offset = nn.Parameter(torch.zeros(channels))
        if mixing == "rotation":
            self.register_buffer("rotation", torch.eye(channels))
        else:
            self.register_buffer("order", torch.arange(channels))

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C), (n, P) -> what comes out (n, C), and the logarithm of the volume's stretch (n,)."""
        stays, moves = torch.split(x, self.sizes, dim=1)
        scale, shift = self._told(stays, condition)
        y = torch.cat([stays, moves * scale.exp() + shift], dim=1)
        gain = self._gain()
        y = gain * y + self.offset
        mixed = (y @ self.rotation.T).to(y.dtype) if self.mixing == "rotation" else y[:, self.order]
        return mixed, scale.sum(dim=1) + gain.log().sum()

    def inverse(self, z: Tensor, condition: Tensor) -> Tensor:
        """What came in, (n, C), from what came out."""
        y = z @ self.rotation if self.mixing == "rotation" else z[:, self.order.argsort()]
        stays, moved = torch.split((y - self.offset) / self._gain(), self.sizes, dim=1)
        scale, shift = self._told(stays, condition)
        return torch.cat([stays, (moved - shift) * (-scale).exp()], dim=1)

    def _told(self, stays: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and the shift, of the channels that move: (n, floor(C / 2)) each."""
        told = _DAMPING * self.net(torch.cat([stays, condition], dim=1)).to(stays.dtype)
        scale, shift = told.chunk(2, dim=1)
        return _MOST_SCALE * torch.tanh(scale), shift

    def _gain(self) -> Tensor:
        return 0.1 * F.softplus(self.gain, beta=_GAIN_BETA)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw weights and mixing anew, on the CPU."""
        for module in self.net:
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        nn.init.constant_(self.gain, _GAIN_START)
        nn.init.zeros_(self.offset)
        if self.mixing == "rotation":
            self.rotation.copy_(random_rotation(len(self.gain), generator))
        else:
            self.order.copy_(torch.randperm(len(self.gain), generator=generator))

    def extra_repr(self) -> str:
        return f"channels={len(self.gain)}, mixing={self.mixing}"


class ConditionalFlow(nn.Module):
    """Blocks one after another, to a standard normal variable.

    Args:
        channels: C. condition: P. blocks: their number. hidden, mixing: of each, see `ConditionalCoupling`.
    """

    def __init__(self, channels: int, condition: int, blocks: int, hidden: int, mixing: Mixing) -> None:
        super().__init__()
        self.channels = channels
        self.blocks = nn.ModuleList(
            ConditionalCoupling(channels, condition, hidden, mixing) for _ in range(blocks)
        )

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C), (n, P) -> the normal variable (n, C), and the logarithm of the volume's stretch (n,)."""
        log_det = x.new_zeros(x.shape[0])
        for block in self.blocks:
            x, own = block(x, condition)
            log_det = log_det + own
        return x, log_det

    def inverse(self, z: Tensor, condition: Tensor) -> Tensor:
        """Features (n, C) from the normal variable."""
        for block in reversed(self.blocks):
            assert isinstance(block, ConditionalCoupling)
            z = block.inverse(z, condition)
        return z

    def log_likelihood(self, x: Tensor, condition: Tensor) -> Tensor:
        """log p(x | condition) / C, (n,)."""
        z, log_det = self(x, condition)
        log_p: Tensor = log_det - 0.5 * z.square().sum(dim=1)
        return log_p / self.channels - 0.5 * math.log(2 * math.pi)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw weights and mixing anew, on the CPU, block by block."""
        for block in self.blocks:
            assert isinstance(block, ConditionalCoupling)
            block.initialise(generator)
