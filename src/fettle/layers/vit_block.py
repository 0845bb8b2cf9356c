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

    With `last` only the last so many tokens ask, all are still looked at, and the others' answers, which
    nobody wants, are not computed.

    Args:
        width: channels. heads: a divisor of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        """x (B, N, width), mask bool broadcast to (B, heads, N, N), True = may look at -> (B, N or `last`,
        width)."""
        q, k, v = self._split(x, last)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        joined: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return joined

    def weights(self, x: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        """How much each token looks at each, (B, N or `last`, N): a mean over heads, each row's sum is 1."""
        q, k, _ = self._split(x, last)
        scores = (q @ k.transpose(-2, -1)).float() / q.shape[-1] ** 0.5
        looked_at: Tensor = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).mean(dim=1)
        return looked_at

    def received(self, x: Tensor, valid: Tensor) -> Tensor:
        """How much each token is looked at, (B, N): a mean over heads and valid tokens that sums to 1."""
        mask = seen_by_all(valid)
        lookers = mask[:, 0].transpose(-2, -1)  # (B, N, 1)
        total: Tensor = (self.weights(x, mask) * lookers).sum(dim=1)
        return total / lookers.sum(dim=1)

    def _split(self, x: Tensor, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, N or `last`, d), keys and values (B, heads, N, d)."""
        if last is None:
            q, k, v = torch.unflatten(self.qkv(x), -1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        width, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
        asked = F.linear(x[:, -last:], weight[:width], bias[:width])
        told = F.linear(x, weight[width:], bias[width:])
        k, v = torch.unflatten(told, -1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return torch.unflatten(asked, -1, (self.heads, -1)).transpose(1, 2), k, v


class ViTBlock(nn.Module):
    """x + attention(LN(x)), then x + W2 gelu(W1 LN(x)); no dropout. It has 12 width^2 + 13 width parameters.

    Args:
        width: channels. heads: a divisor of it. eps: of the layer norms.
    """

    def __init__(self, width: int, heads: int, eps: float = EPS) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        """(B, N, width) -> (B, N or `last`, width); mask and `last` as in `SelfAttention`."""
        own = x if last is None else x[:, -last:]
        own = own + self.attention(self.norm1(x), mask, last)
        own = own + self.fc2(F.gelu(self.fc1(self.norm2(own))))
        answer: Tensor = own
        return answer

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
