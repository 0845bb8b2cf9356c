"""Multi-head attention under a mask that hides each token's own neighbourhood (UniAD, arXiv 2206.03687).

A mask is boolean with True = may attend, as `scaled_dot_product_attention` wants it. `neighbour_mask` is the
only place where one is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fettle.errors import ConfigError


@lru_cache(maxsize=32)
def neighbour_mask(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor:
    """Which tokens each token may attend to: all but itself and those in the window about it.

    Token (y, x) is row y W + x. The pair i, j is forbidden where |y_i - y_j| <= wh // 2 and
    |x_i - x_j| <= ww // 2, so an even side acts as the next odd one.

    Args:
        grid: (H, W), tokens. window: (wh, ww), tokens.

    Returns:
        (H W, H W) bool, True = may attend. Shared between calls: never write to it.

    Raises:
        ConfigError: some token would see nobody.
    """
    (height, width), (high, wide) = grid, window
    if height // 2 <= high // 2 and width // 2 <= wide // 2:  # the middle token's window is the whole grid
        largest = 2 * (max(height, width) // 2) - 1
        remedy = f"The largest that fits is {largest} x {largest}." if largest > 0 else "No window fits it."
        raise ConfigError(
            f"On a grid of {height} x {width} tokens a window of {high} x {wide} hides everything from "
            "some token.",
            f"{remedy} Use a smaller window or larger pictures.",
        )
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        rows = torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        near_rows = (rows[:, None] - rows).abs() <= high // 2  # (H, H)
        near_columns = (columns[:, None] - columns).abs() <= wide // 2  # (W, W)
        hidden = near_rows[:, None, :, None] & near_columns[None, :, None, :]  # (H, W, H, W)
        return ~hidden.reshape(height * width, height * width)


def sees_nobody(allowed: Tensor, valid: Tensor) -> Tensor:
    """Tokens that no valid token is left for: (N, N) bool and (B, N) bool -> (B, N) bool."""
    return ~(allowed & valid[:, None, :]).any(dim=-1)


def visible(allowed: Tensor, valid: Tensor) -> Tensor:
    """The mask of a batch, in which padding is never looked at.

    Where a token is left with no valid token at all, it looks at what the mask alone allows: an empty
    softmax means nothing.

    Args:
        allowed: (N, N) bool, True = may attend.
        valid: (B, N) bool.

    Returns:
        (B, 1, N, N) bool, True = may attend.
    """
    seen = allowed & valid[:, None, :]
    lonely = sees_nobody(allowed, valid)[:, :, None]
    return (seen | (lonely & allowed))[:, None]


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(width / heads)) v with biases everywhere; batch first.

    Parameters are named and packed as those of `nn.MultiheadAttention`: `in_proj_weight` (3 width, width).

    Args:
        width: channels of queries, keys and values. heads: a divisor of it.
        dropout: on the attention weights, in training only.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            query: (B, N, width). key, value: (B, M, width).
            mask: bool, True = may attend; broadcast to (B, heads, N, M).

        Returns:
            (B, N, width).
        """
        q, k, v = self._projected((query, key, value))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        joined: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return joined

    def received(self, query: Tensor, key: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
        """How much each key is looked at by valid queries (B, N): a mean over heads and queries, (B, M)."""
        q, k = self._projected((query, key))
        scores = (q @ k.transpose(-2, -1)).float() / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).mean(dim=1)  # (B, N, M)
        total: Tensor = (weights * valid[:, :, None]).sum(dim=1)
        return total / valid.sum(dim=1, keepdim=True).clamp_min(1)

    def _projected(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Queries, keys and values of these inputs, as many as there are: (B, heads, N, d) each."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return [
            torch.unflatten(F.linear(x, weight, bias), -1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=False)
        ]

    def extra_repr(self) -> str:
        return f"width={self.in_proj_weight.shape[1]}, heads={self.heads}, dropout={self.dropout}"
