"""Does a method copy what it should not know? Two diagnoses of the study "attention" (AGPNet).

The identity index is how much larger the error is on pasted defects than beside them: 1 means that defects
are rebuilt as well as anything else. The mask correlation tells whether the mask that guided the training
leaks into the score. Neither looks at a real defect or its label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.bench.pasted import paste_defects
from fettle.bench.views import Views, batches, framed_views, held_out_good
from fettle.datasets.records import Dataset
from fettle.detector import Detector
from fettle.errors import UsageError
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.pixel_map import valid_tokens
from fettle.layers.token_grid import aligned_to
from fettle.perturb.attention import joint_prior
from fettle.protocols import Explains, Json, Method

_MOST_PICTURES = 60
_ROUNDING = 1e-6  # a spread below this share of the values is that of float32


class IdentityIndex(NamedTuple):
    """Errors on tokens of pasted defects against untouched ones.

    Attributes:
        value: their ratio, 1 is pure copying; None where there is no token of either kind, or no error.
        defect, untouched: mean raw errors.
        num_defect: tokens that count as defects.
    """

    value: float | None
    defect: float
    untouched: float
    num_defect: int


def diagnose(
    detector: Detector, dataset: Dataset, *, seed: int = 0, most: int = _MOST_PICTURES
) -> dict[str, Json]:
    """Both diagnoses on good pictures of the test part: what `run_cells` takes as `after`.

    Its keys: identity_index, defect_error, untouched_error, num_defect_tokens, num_pictures, mask_correlation
    and prior_correlation (None where the method has no such map).
    """
    views = framed_views(held_out_good(dataset, most), detector.frame)
    index = identity_index(detector, views, seed)
    return {
        "identity_index": index.value,
        "defect_error": index.defect,
        "untouched_error": index.untouched,
        "num_defect_tokens": index.num_defect,
        "num_pictures": len(views.pixels),
        **cast("dict[str, Json]", correlations(detector, views)),
    }


@torch.no_grad()
def identity_index(detector: Detector, good: Views, seed: int = 0) -> IdentityIndex:
    """Mean raw error on pasted defects over that on the same pictures' untouched tokens.

    A token counts as a defect if more than half of its pixels are pasted, as untouched if none is.
    """
    pasted = paste_defects(list(good.pixels), seed, list(good.valid))
    pictures = np.stack([one.picture for one in pasted])
    masks = torch.from_numpy(np.stack([one.mask for one in pasted]))  # (n, H, W)
    sums, counts = [0.0, 0.0], [0, 0]
    done = 0
    for batch, valid in batches(Views(pictures, good.valid), detector.device):
        energy = raw_energy(detector.method, batch, valid)  # (B, h, w)
        inside = valid_tokens(valid, (energy.shape[-2], energy.shape[-1]))
        share = token_share(masks[done : done + len(batch)].to(energy.device), energy)
        for kind, tokens in enumerate((share > 0.5, share == 0)):
            chosen = energy[tokens & inside].double()
            sums[kind] += float(chosen.sum())
            counts[kind] += len(chosen)
        done += len(batch)
    defect, untouched = (total / max(count, 1) for total, count in zip(sums, counts, strict=True))
    known = min(counts) > 0 and untouched > 0
    return IdentityIndex(defect / untouched if known else None, defect, untouched, counts[0])


@torch.no_grad()
def correlations(detector: Detector, good: Views) -> dict[str, float | None]:
    """Of the raw error with the mask that guided the training, and with the backbone's cue alone.

    The first is None for a method that explains no mask; the second is there for every one. Pearson, over the
    valid tokens of all pictures.
    """
    method = detector.method
    energies: list[Tensor] = []
    maps: dict[str, list[Tensor]] = {"mask": [], "prior": []}
    for pictures, valid in batches(good, detector.device):
        energy = raw_energy(method, pictures, valid)
        inside = valid_tokens(valid, (energy.shape[-2], energy.shape[-1]))
        energies.append(energy[inside])
        for name, own in _maps_on_grid(method, pictures, valid, inside).items():
            maps[name].append(own[inside])
    return {
        f"{name}_correlation": pearson(torch.cat(energies), torch.cat(parts)) if parts else None
        for name, parts in maps.items()
    }


def _maps_on_grid(method: Method, pictures: Tensor, valid: Tensor, inside: Tensor) -> Mapping[str, Tensor]:
    """The "mask" and the "prior" that the method has, (B, h, w) each."""
    grid = (inside.shape[-2], inside.shape[-1])
    found = {}
    if isinstance(method, Explains):
        mask = method.explain(pictures, valid).maps.get("mask")  # (B, H, W), 0 where not valid
        if mask is not None:
            share = F.adaptive_avg_pool2d(valid.float(), grid)[:, 0].clamp_min(1e-6)
            found["mask"] = F.adaptive_avg_pool2d(mask[:, None], grid)[:, 0] / share
    backbone = method.backbone
    _, prior = backbone.features_and_cue(pictures, method.levels, backbone.cues[0])  # (B, K, h, w)
    on_grid = aligned_to(prior, grid, "mean").flatten(2)
    found["prior"] = joint_prior(on_grid, inside.flatten(1), 0.0).view_as(inside)
    return found


def raw_energy(method: Method, pictures: Tensor, valid: Tensor) -> Tensor:
    """`Method.patch_energy` with its scale undone, (B, h, w): 0 where nothing is strange.

    Raises:
        UsageError: a method whose energy is on another scale.
    """
    scale = getattr(method, "scale", None)
    if not isinstance(scale, EnergyScale):
        raise UsageError(
            f"The scale of method '{method.name}' is not known.", "Give it an EnergyScale named 'scale'."
        )
    return method.patch_energy(pictures, valid) * (scale.rare - scale.median) + scale.median


def token_share(masks: Tensor, energy: Tensor) -> Tensor:
    """Share of each token's pixels that are masked: (B, H, W) bool and (B, h, w) -> (B, h, w)."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), (energy.shape[-2], energy.shape[-1]))[:, 0]


def pearson(one: Tensor, other: Tensor) -> float | None:
    """Correlation of two lists of numbers (n,); None where one of them is constant."""
    both = torch.stack([one, other]).double()
    rounding = _ROUNDING * both.norm(dim=1)
    both = both - both.mean(dim=1, keepdim=True)
    lengths = both.norm(dim=1)
    if not bool((lengths > rounding).all()):
        return None
    return float(both[0] @ both[1] / lengths.prod())
