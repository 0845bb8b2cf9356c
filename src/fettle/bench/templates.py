"""How TFA-Net does with its template: diagnoses and controls of the study "template".

- fusion: metrics of the one trained model by each way of joining its two maps.
- templates: image AUROC with other good pictures put in the template's place, without a new training.
- own_token_share: how much of what is rebuilt at a token depends on the input at that very token. One over
  the number of tokens is no more than any other; near 1 the token copies itself, and a defect with it.
- controls: maps for which nothing was trained. A method that is no better than these has seen no defect.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fettle.bench.views import batches, framed_views, held_out_good
from fettle.datasets.few_shot import few_shot_order
from fettle.datasets.records import Dataset
from fettle.detector import Detector
from fettle.layers.pixel_map import pixel_map
from fettle.layers.token_grid import score_of_map, valid_on_grid
from fettle.methods.tfanet import TFANet
from fettle.protocols import Json, Maps, Method
from fettle.templates import with_template

KEYS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
FUSIONS = ("product", "sum", "distance", "direction")
_MOST_PICTURES = 16
_TOKENS = 8  # of each picture, whose share is looked at
_DRAWS = 4  # random directions in which the rebuilt token is moved

Control = Literal["energy", "template"]


def diagnose_template(detector: Detector, dataset: Dataset, *, others: int = 0) -> dict[str, Json]:
    """All of the above, as `run_cells` takes it.

    Args:
        others: templates to put in place; 0 leaves that out.
    """
    method = cast(TFANet, detector.method)
    found: dict[str, Json] = {
        "own_token_share": own_token_share(detector, dataset),
        "tokens": method.bank.tokens.shape[1],
        "fusion": {name: _metrics(_with(detector, _fused_by(method, name)), dataset) for name in FUSIONS},
    }
    if others:
        paths = [record.path for record in dataset.good_for_training()]
        order = few_shot_order([path.as_posix() for path in paths], 0)[:others]
        found["templates"] = [_with_other(detector, dataset, Path(path)) for path in order]
    return found


def controls(detector: Detector, dataset: Dataset) -> dict[str, Json]:
    """Metrics of the two maps for which nothing was trained, on the features of a fitted TFA-Net."""
    method = cast(TFANet, detector.method)
    kinds: tuple[Control, ...] = ("energy", "template")
    return {kind: _metrics(_with(detector, Untrained(method, kind)), dataset) for kind in kinds}


class Untrained(nn.Module):
    """The mean square of the features ("energy"), or of their distance from the template's ("template")."""

    def __init__(self, method: TFANet, kind: Control) -> None:
        super().__init__()
        self.method = method
        self.kind = kind

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        fused = self.method.target(pictures)
        if self.kind == "template":
            fused = fused - self.method.target_of_templates()[:1]
        config = self.method.config
        sigma = config.smooth_sigma * min(pictures.shape[-2:]) / 256
        anomaly_map = pixel_map(fused.square().mean(dim=1), valid, sigma)
        return Maps(anomaly_map, score_of_map(anomaly_map, valid[:, 0], config.score))


def own_token_share(detector: Detector, dataset: Dataset) -> float:
    """Mean share over good test pictures and some of their tokens, see `share_of_cell`."""
    method = cast(TFANet, detector.method)
    generator = torch.Generator().manual_seed(0)
    patch = method.config.patch
    first = torch.zeros(1, dtype=torch.long, device=detector.device)  # the template
    shares: list[float] = []
    views = framed_views(held_out_good(dataset, _MOST_PICTURES), detector.frame)
    for pictures, valid in batches(views, detector.device, size=1):
        with torch.no_grad():
            fused = method.target(pictures)
        tokens = valid_on_grid(fused[..., ::patch, ::patch], valid)[0].nonzero()
        rebuild = partial(method.rebuild, valid=valid, which=first)
        for token in torch.randperm(len(tokens), generator=generator)[:_TOKENS]:
            row, column = (int(place) * patch for place in tokens[token])
            cell = (slice(row, row + patch), slice(column, column + patch))
            shares.append(share_of_cell(rebuild, fused, cell, generator))
    return sum(shares) / len(shares)


def share_of_cell(
    rebuild: Callable[[Tensor], Tensor], fused: Tensor, cell: tuple[slice, slice], generator: torch.Generator
) -> float:
    """|d p_i / d f_i|^2 over the sum of |d p_i / d f_j|^2 over all cells j (18.12 of the specification).

    The squared lengths are estimated by random directions of what is rebuilt in the cell, p_i.

    Args:
        rebuild: (1, C, h, w) to the same. cell: rows and columns of i.
    """
    own = total = 0.0
    for _ in range(_DRAWS):
        leaf = fused.clone().requires_grad_(True)
        rebuilt = rebuild(leaf)[:, :, *cell]
        direction = torch.randn(rebuilt.shape, generator=generator).to(rebuilt)
        (gradient,) = torch.autograd.grad((rebuilt * direction).sum(), leaf)
        own += float(gradient[:, :, *cell].square().sum())
        total += float(gradient.square().sum())
    return own / max(total, 1e-30)


def _fused_by(method: TFANet, fusion: str) -> TFANet:
    """The same method with its maps joined otherwise; nothing is copied but the settings."""
    changed = copy.copy(method)
    changed.config = method.config.model_copy(update={"fusion": fusion})
    return changed


def _with_other(detector: Detector, dataset: Dataset, path: Path) -> dict[str, Json]:
    method, _ = with_template(detector.method, path, "", detector.frame, detector.device)
    return {"name": path.name, **_metrics(_with(detector, cast(nn.Module, method)), dataset)}


def _with(detector: Detector, method: nn.Module) -> Detector:
    """A detector that judges by this; its thresholds say nothing."""
    changed = copy.copy(detector)
    changed.method = cast(Method, method)
    changed.fold_methods = ()
    return changed


def _metrics(detector: Detector, dataset: Dataset) -> dict[str, Json]:
    result = detector.evaluate(dataset)
    return {key: result[key] for key in KEYS}
