"""Which good pictures others are compared with: medoids of pooled features, and the nearest template.

Vectors are unit vectors, one a picture; a distance is 1 - cosine (specification of TFA-Net, section 9).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ALTERNATIONS = 10
_ROBUST = 1.4826  # times the median absolute deviation: the deviation of a normal distribution


def mean_over(features: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid positions: (B, C, h, w) and (B, h, w) bool -> (B, C)."""
    inside = valid[:, None].to(features.dtype)
    return (features * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp_min(1)


def pooled(features: Tensor, valid: Tensor) -> Tensor:
    """Unit mean over valid positions: (B, C, h, w) and (B, h, w) bool -> (B, C)."""
    return F.normalize(mean_over(features, valid), dim=1)


def by_centrality(vectors: Tensor) -> Tensor:
    """Numbers of the vectors (n, C), least summed distance to all others first; ties in their order."""
    return (vectors.double() @ vectors.double().sum(dim=0)).argsort(descending=True, stable=True)


def medoids(vectors: Tensor, number: int) -> list[int]:
    """So many of the vectors (n, C) that each other one is near one of them: k-medoids.

    Starts at the medoid, goes on with the farthest from those chosen, and then alternates between giving
    each vector to its nearest and taking each group's medoid.
    """
    cosine = vectors.double() @ vectors.double().T  # (n, n)
    chosen = [int(by_centrality(vectors)[0])]
    while len(chosen) < min(number, len(vectors)):
        chosen.append(int(cosine[:, chosen].amax(dim=1).argmin()))
    for _ in range(_ALTERNATIONS):
        nearest = cosine[:, chosen].argmax(dim=1)
        groups = [torch.nonzero(nearest == i).flatten() for i in range(len(chosen))]
        moved = [
            int(g[cosine[g][:, g].sum(dim=1).argmax()]) if len(g) else chosen[i] for i, g in enumerate(groups)
        ]
        if moved == chosen:
            break
        chosen = moved
    return sorted(set(chosen))


class Oddness(NamedTuple):
    """How far a picture is from the others: in robust deviations, and the share that is nearer."""

    z: float
    rank: float


def oddness(vectors: Tensor, of: Tensor) -> Oddness:
    """Of a vector (C,) among those of good pictures (n, C) (section 9, check 1)."""
    centre = F.normalize(vectors.double().sum(dim=0), dim=0)
    distances, own = 1 - vectors.double() @ centre, float(1 - of.double() @ centre)
    middle = distances.median()
    spread = _ROBUST * float((distances - middle).abs().median())
    return Oddness((own - float(middle)) / max(spread, 1e-12), float((distances < own).double().mean()))


def nearest(vectors: Tensor, templates: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest template of each vector, and by how much it is nearer than the next.

    Args:
        vectors: (B, C). templates: (M, C). allowed: (B, M) bool; a row of none allows all.

    Returns:
        Indices (B,), the lowest of equals, and differences of cosines (B,), infinite where it is alone.
    """
    cosine = vectors @ templates.T
    if allowed is not None:
        cosine = cosine.masked_fill(~(allowed | ~allowed.any(dim=1, keepdim=True)), -torch.inf)
    chosen = cosine.argmax(dim=1)
    best = cosine.gather(1, chosen[:, None])
    others = cosine.scatter(1, chosen[:, None], -torch.inf).amax(dim=1)
    return chosen, best[:, 0] - others
