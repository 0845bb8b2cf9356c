"""What good pictures scored under a model that does not know them, and the thresholds from it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fettle.calibration import Calibration, Mode, calibrate, pixel_statistic
from fettle.layers.pixel_map import valid_tokens
from fettle.protocols import LeftOut

MOST_HELD_OUT = 256
_MAX_ENERGIES = 1_000_000


class HeldOut(NamedTuple):
    """A good picture that was not learnt from, as a refiner's facts need it.

    Attributes:
        energies: raw patch energies of each view, (h, w). map_median: median of its map's valid pixels.
        unbounded: as `energies`, without a bound, of a method that has such; else none.
    """

    key: str
    energies: tuple[Tensor, ...]
    map_median: float
    unbounded: tuple[Tensor, ...] = ()


@dataclass
class Judged:
    """Scores of good pictures, a value a picture, in the order of `keys`.

    Attributes:
        scores: picture scores (the largest over a picture's views).
        groups: the group of each picture.
        pixel_statistics: each picture's high quantile of its map.
        energies: raw patch energies of all pictures, evenly thinned to about a million; None without any.
        held_out: more of the first few hundred pictures.
    """

    scores: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    pixel_statistics: list[float] = field(default_factory=list)
    energies: Tensor | None = None
    keys: list[str] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)

    def extend(self, other: Judged) -> None:
        """Take in further pictures."""
        self.scores += other.scores
        self.groups += other.groups
        self.pixel_statistics += other.pixel_statistics
        self.keys += other.keys
        self.held_out = (self.held_out + other.held_out)[:MOST_HELD_OUT]
        energies = [part for part in (self.energies, other.energies) if part is not None]
        self.energies = torch.cat(energies) if energies else None

    def of(self, keys: Collection[str]) -> Judged:
        """These pictures alone; `energies` stay those of all."""
        chosen = [i for i, key in enumerate(self.keys) if key in keys]
        return Judged(
            [self.scores[i] for i in chosen],
            [self.groups[i] for i in chosen],
            [self.pixel_statistics[i] for i in chosen],
            self.energies,
            [self.keys[i] for i in chosen],
            [one for one in self.held_out if one.key in keys],
        )


@dataclass(frozen=True)
class Calibrations:
    """Thresholds from all pictures together, and from each product's own."""

    shared: Calibration
    by_product: dict[str, Calibration]


def calibrate_judged(
    judged: Judged,
    product_of: Mapping[str, str],
    *,
    mode: Mode,
    target_frr: float,
    grouped: bool,
    strict: bool,
    folds: Sequence[int] | None = None,
) -> Calibrations:
    """Thresholds from what good pictures scored.

    Args:
        product_of: product by picture key; empty for a model of one product, which has no other thresholds.
        grouped: pictures of one group count once.
        strict: fail where the promise cannot be made, for all together or for one product.
    """

    def from_pictures(chosen: Sequence[int]) -> Calibration:
        own_groups = [judged.groups[i] for i in chosen]
        return calibrate(
            [judged.scores[i] for i in chosen],
            target_frr=target_frr,
            mode=mode,
            groups=own_groups if grouped else None,
            folds=folds,
            pixel_statistics=[judged.pixel_statistics[i] for i in chosen] or None,
            strict=strict,
        )

    by_product: dict[str, list[int]] = {}
    if mode == "none":  # nothing was judged, and yet the model knows its products
        by_product = {product: [] for product in product_of.values()}
    for i, key in enumerate(judged.keys):
        if key in product_of:
            by_product.setdefault(product_of[key], []).append(i)
    shared = from_pictures(range(len(judged.keys)))
    return Calibrations(shared, {name: from_pictures(own) for name, own in sorted(by_product.items())})


def gather_judged(left_out: Iterable[LeftOut], num_pictures: int) -> Judged:
    """Sum up left-out views, which come picture by picture."""
    judged = Judged()
    energies: list[Tensor] = []
    for key, views_of_one in groupby(left_out, key=lambda view: view.key):
        views = list(views_of_one)
        judged.scores.append(max(float(view.maps.score[0]) for view in views))
        judged.groups.append(views[0].group)
        judged.keys.append(key)
        maps = np.concatenate([view.maps.anomaly_map[0].cpu().numpy() for view in views])
        valid = np.concatenate([view.valid[0, 0].cpu().numpy() for view in views])
        judged.pixel_statistics.append(pixel_statistic(maps, valid))
        grids = [view.energy[0].cpu() for view in views]
        if len(judged.held_out) < MOST_HELD_OUT:
            median = float(np.median(maps[valid])) if valid.any() else 0.0
            unbounded = tuple(view.unbounded[0].cpu() for view in views if view.unbounded is not None)
            judged.held_out.append(HeldOut(key, tuple(grids), median, unbounded))
        inside = [
            valid_tokens(v.valid.cpu(), (g.shape[0], g.shape[1]))[0]
            for v, g in zip(views, grids, strict=True)
        ]
        energy = torch.cat([grid[own] for grid, own in zip(grids, inside, strict=True)]).sort().values
        step = math.ceil(len(energy) * num_pictures / _MAX_ENERGIES)
        energies.append(energy[step // 2 :: step])
    if energies:
        judged.energies = torch.cat(energies)
    return judged
