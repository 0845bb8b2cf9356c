"""How strong should training noise be? A closed form, before anything is trained (AGPNet, section 6.5).

Of a token-by-token linear denoiser the best answer is known: it keeps each principal direction of the good
tokens by g = v / (v + w^2 s^2), v the variance along it, w the strength and s the unit of the noise. What it
does not keep is its error. A decoder that sees other tokens can undo more noise, so that its own best
strength is probably higher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.bench.pasted import paste_defects
from fettle.bench.views import Views, batches, framed_views
from fettle.errors import UsageError
from fettle.images.framing import Frame
from fettle.layers.pixel_map import valid_tokens
from fettle.metrics import image_auroc
from fettle.protocols import Method

WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.2, 2.0, 4.0)


class LinearDenoiser(NamedTuple):
    """Mean (C,) of good tokens, their principal directions (C, C) in columns, and variances (C,), float64."""

    mean: Tensor
    directions: Tensor
    variances: Tensor


def probe_noise_scale(
    method: Method,
    frame: Frame,
    learn: Sequence[Path],
    held_out: Sequence[Path],
    *,
    weights: Sequence[float] = WEIGHTS,
    pastes: int = 2,
    seed: int = 0,
    device: str = "cpu",
) -> dict[float, float]:
    """Image AUROC of pasted defects against the same pictures without, by the strength of the noise.

    No defect and no label is looked at.

    Args:
        method: fitted or not: one whose `features` are {"tokens": (B, C, h, w)}.
        learn: good pictures for mean and covariance. held_out: other good pictures, to be judged.
        weights: strengths w, in units of each picture's RMS.
        pastes: defects that are pasted into each held-out picture, one at a time.

    Raises:
        UsageError: a method without tokens. DataError: no picture that can be read.
    """
    denoiser = fit_denoiser(
        tokens[inside] for tokens, inside in _tokens(method, framed_views(learn, frame), device)
    )
    good = framed_views(held_out, frame)
    scores = [_scores(method, good, denoiser, weights, device)]
    for paste in range(pastes):
        pasted = paste_defects(list(good.pixels), seed * pastes + paste, list(good.valid))
        changed = Views(np.stack([one.picture for one in pasted]), good.valid)
        scores.append(_scores(method, changed, denoiser, weights, device))
    is_defect = np.arange(len(good.pixels) * (1 + pastes)) >= len(good.pixels)
    aurocs = (image_auroc(own.numpy(), is_defect) for own in torch.cat(scores, dim=1))
    return {weight: auroc for weight, auroc in zip(weights, aurocs, strict=True) if auroc is not None}


def fit_denoiser(good: Iterable[Tensor]) -> LinearDenoiser:
    """From good tokens, (n, C) at a time."""
    count, total, product = 0, torch.zeros(()), torch.zeros(())
    for tokens in good:
        rows = tokens.double().cpu()
        count, total, product = count + len(rows), total + rows.sum(dim=0), product + rows.T @ rows
    mean = total / count
    variances, directions = torch.linalg.eigh(product / count - mean[:, None] * mean)
    return LinearDenoiser(mean, directions, variances.clamp_min(0))


def residual(tokens: Tensor, denoiser: LinearDenoiser, noise: Tensor) -> Tensor:
    """Length of what the denoiser takes away: (B, h, w, C) and the noise's deviation (B,) -> (B, h, w)."""
    along = (tokens.double() - denoiser.mean) @ denoiser.directions  # (B, h, w, C)
    power = noise.double().square()[:, None]  # (B, 1)
    taken = power / (denoiser.variances + power).clamp_min(1e-300)  # 1 - g, (B, C)
    return (along * taken[:, None, None]).square().sum(dim=3).sqrt()


def largest_mean(error: Tensor, inside: Tensor) -> Tensor:
    """The largest mean of 3 x 3 tokens, of the valid ones among them: (B, h, w), (B, h, w) -> (B,)."""
    weights = inside.to(error.dtype)
    sums, shares = (F.avg_pool2d(part[:, None], 3, 1, padding=1)[:, 0] for part in (error * weights, weights))
    return (sums / shares.clamp_min(1e-9)).masked_fill(~inside, 0).flatten(1).amax(dim=1)


def _scores(
    method: Method, views: Views, denoiser: LinearDenoiser, weights: Sequence[float], device: str
) -> Tensor:
    """(weights, pictures)."""
    scores = []
    for tokens, inside in _tokens(method, views, device):
        squares = tokens.double().square().mean(dim=3)  # (B, h, w)
        number = inside.sum(dim=(1, 2)).clamp_min(1)
        rms = ((squares * inside).sum(dim=(1, 2)) / number).sqrt()  # (B,)
        errors = (residual(tokens, denoiser, weight * rms) for weight in weights)
        scores.append(torch.stack([largest_mean(error, inside) for error in errors]))
    return torch.cat(scores, dim=1)


@torch.no_grad()
def _tokens(method: Method, views: Views, device: str) -> Iterable[tuple[Tensor, Tensor]]:
    """Tokens (B, h, w, C) and whether each is valid (B, h, w), on the CPU, batch by batch."""
    for pictures, valid in batches(views, device):
        tokens = method.features(pictures, valid).get("tokens")  # (B, C, h, w)
        if tokens is None:
            raise UsageError(f"Method '{method.name}' has no tokens.", "Use agpnet, uniad or fpfnet.")
        grid = (tokens.shape[-2], tokens.shape[-1])
        yield tokens.permute(0, 2, 3, 1).cpu(), valid_tokens(valid, grid).cpu()
