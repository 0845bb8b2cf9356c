"""A block of a plain vision transformer, which can also tell how much each token is looked at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
_INIT_STD = 0.02


def seen_by_all(valid: Tensor) -> Tensor:
    """Which tokens may be looked at: valid ones, or all where a picture has none; (B, N) -> (B, 1, 1, N)."""
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(width / heads)) v, full attention, with biases.

    Args:
        width: channels. heads: a divisor of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, width), mask bool broadcast to (B, heads, N, N), True = may look at -> (B, N, width)."""
        q, k, v = self._split(x)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        joined: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return joined

    def received(self, x: Tensor, valid: Tensor) -> Tensor:
        """How much each token is looked at, (B, N): a mean over heads and valid tokens that sums to 1."""
        q, k, _ = self._split(x)
        scores = (q @ k.transpose(-2, -1)).float() / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen_by_all(valid), -torch.inf).softmax(dim=-1)
        lookers = seen_by_all(valid).transpose(-2, -1)  # (B, 1, N, 1)
        total: Tensor = (weights.mean(dim=1, keepdim=True) * lookers).sum(dim=2)[:, 0]
        return total / lookers.sum(dim=2)[:, 0]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, (B, heads, N, d) each."""
        q, k, v = torch.unflatten(self.qkv(x), -1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class ViTBlock(nn.Module):
    """x + attention(LN(x)), then x + W2 gelu(W1 LN(x)); no dropout. It has 12 width^2 + 13 width parameters.

    Args:
        width: channels. heads: a divisor of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attention = SelfAttention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, N, width) -> the same; mask as in `SelfAttention`."""
        x = x + self.attention(self.norm1(x), mask)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x

    def received(self, x: Tensor, valid: Tensor) -> Tensor:
        """See `SelfAttention.received`; x is the block's input."""
        looked_at: Tensor = self.attention.received(self.norm1(x), valid)
        return looked_at


@torch.no_grad()
def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all linear layers and norms anew, as ViTs begin: weights normal 0.02, biases 0, norms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=_INIT_STD, generator=generator)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
