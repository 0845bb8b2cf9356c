"""What good pictures score under a model that does not know them: the raw material of calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fettle.calibration import pixel_statistic
from fettle.feature_stream import GoodPicture
from fettle.images.framing import Frame
from fettle.images.loading import Loaded, load_framed
from fettle.layers.pixel_map import valid_tokens
from fettle.protocols import LeftOut, Method, Progress

_MAX_ENERGIES = 1_000_000


@dataclass
class Judged:
    """Scores of good pictures, a value a picture.

    Attributes:
        scores: picture scores (the largest over a picture's views).
        groups: the group of each picture.
        pixel_statistics: each picture's high quantile of its map (base-methods 8.5).
        energies: raw patch energies of all pictures, evenly thinned to about a million; None without any.
    """

    scores: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    pixel_statistics: list[float] = field(default_factory=list)
    energies: Tensor | None = None


def gather_judged(left_out: Iterable[LeftOut], num_pictures: int) -> Judged:
    """Sum up left-out views, which come picture by picture."""
    judged = Judged()
    energies: list[Tensor] = []
    for _, views_of_one in groupby(left_out, key=lambda view: view.key):
        views = list(views_of_one)
        judged.scores.append(max(float(view.maps.score[0]) for view in views))
        judged.groups.append(views[0].group)
        maps = np.concatenate([view.maps.anomaly_map[0].cpu().numpy() for view in views])
        valid = np.concatenate([view.valid[0, 0].cpu().numpy() for view in views])
        judged.pixel_statistics.append(pixel_statistic(maps, valid))
        energy = torch.cat([view.energies.flatten() for view in views]).cpu().sort().values
        step = math.ceil(len(energy) * num_pictures / _MAX_ENERGIES)
        energies.append(energy[step // 2 :: step])
    if energies:
        judged.energies = torch.cat(energies)
    return judged


def judge(
    method: Method, pictures: Sequence[GoodPicture], frame: Frame, *, device: str, progress: Progress
) -> Iterator[LeftOut]:
    """Good pictures that the fitted method has not learnt from, view by view. Unreadable ones are left out.

    Energies are on the method's present scale: raw while it is not settled.
    """
    for done, loaded in enumerate(load_framed(pictures, lambda picture: picture.path, frame), 1):
        progress("calibrating", done, len(pictures))
        if not isinstance(loaded, Loaded):
            continue
        for view, valid in zip(loaded.placed.views, loaded.placed.valid, strict=True):
            yield _judge_view(method, loaded.item, view, valid, device)


@torch.inference_mode()
def _judge_view(
    method: Method, picture: GoodPicture, view: NDArray[np.float32], valid: NDArray[np.bool_], device: str
) -> LeftOut:
    pixels = torch.from_numpy(view)[None].to(device)
    inside = torch.from_numpy(valid)[None].to(device)
    energy = method.patch_energy(pixels, inside)
    tokens = valid_tokens(inside, (energy.shape[-2], energy.shape[-1]))
    return LeftOut(picture.key, picture.group, method(pixels, inside), inside, energy[tokens])
