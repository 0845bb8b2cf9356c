"""Which good pictures others are compared with: medoids of pooled features, and the nearest template.

A vector is a picture's. Among good pictures distances are squared and Euclidean; of unit vectors that is
twice 1 - cosine. Pooled features that are standardised have no length to lose: around their mean a direction
would be chance, and an odd picture one of many.
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


def from_middle(vectors: Tensor, middle: Tensor) -> Tensor:
    """Squared distances of vectors (n, C) from a point (C,), in double precision."""
    return (vectors.double() - middle.double()).square().sum(dim=1)


def by_centrality(vectors: Tensor) -> Tensor:
    """Numbers of the vectors (n, C), least summed distance to all others first; ties in their order.

    The sum of squared distances to all grows with the distance from their mean.
    """
    return from_middle(vectors, vectors.double().mean(dim=0)).argsort(stable=True)


def medoids(vectors: Tensor, number: int) -> list[int]:
    """So many of the vectors (n, C) that each other one is near one of them: k-medoids.

    Starts at the medoid, goes on with the farthest from those chosen, and then alternates between giving
    each vector to its nearest and taking each group's medoid.
    """
    chosen = [int(by_centrality(vectors)[0])]
    if number == 1:
        return chosen
    far = torch.cdist(vectors.double(), vectors.double()).square()  # (n, n)
    while len(chosen) < min(number, len(vectors)):
        chosen.append(int(far[:, chosen].amin(dim=1).argmax()))
    for _ in range(_ALTERNATIONS):
        owner = far[:, chosen].argmin(dim=1)
        groups = [torch.nonzero(owner == i).flatten() for i in range(len(chosen))]
        moved = [
            int(own[far[own][:, own].sum(dim=1).argmin()]) if len(own) else former
            for own, former in zip(groups, chosen, strict=True)
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
    centre = vectors.double().mean(dim=0)
    distances, own = from_middle(vectors, centre), from_middle(of[None], centre)[0]
    middle = distances.median()
    spread = _ROBUST * float((distances - middle).abs().median())
    return Oddness(float(own - middle) / max(spread, 1e-12), float((distances < own).double().mean()))


def nearest(vectors: Tensor, templates: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest template of each unit vector by cosine, and by how much it is nearer than the next.

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
