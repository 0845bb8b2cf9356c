"""The templates of a method that compares with good pictures: shown, judged, and put in others' place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch

from fettle.errors import UsageError
from fettle.feature_stream import framed_picture
from fettle.images.framing import Frame, from_input
from fettle.inspection import ComparedWith
from fettle.layers.energy_scale import EnergyScale
from fettle.protocols import UNUSUAL_TEMPLATE, Json, Method, Templated

_FEWEST_SCORES = 8  # of good pictures, below which none is called unusual
_USUAL = 0.95  # share of good pictures that score no higher than a usual template


class TemplateFacts(NamedTuple):
    """Templates for the model card: name, sha256, product and score of each, and warnings in words."""

    card: list[Json]
    warnings: list[str]


def shown_templates(method: Method) -> list[ComparedWith]:
    """The pictures that a method compares with; none where it compares with none."""
    if not isinstance(method, Templated):
        return []
    return [
        ComparedWith(template.name, template.product, from_input(template.pixels.float().cpu().numpy()))
        for template in method.templates()
    ]


@torch.inference_mode()
def judge_templates(
    method: Method, scores: Sequence[float], products: Sequence[str], device: str
) -> TemplateFacts:
    """The templates' own scores, beside those of good pictures that the method has not learnt from.

    A template that scores high looks unlike the other good pictures, and each of them is compared with it.

    Args:
        scores: of the good pictures; those of a template's product count for it, where that is known.
        products: of the good pictures, "" where not known.
    """
    facts = TemplateFacts([], [])
    for template in method.templates() if isinstance(method, Templated) else []:
        seen = method(template.pixels[None].to(device), template.valid[None].to(device))
        score = float(seen.score[0])
        facts.card.append(
            {
                "name": template.name,
                "sha256": template.sha256,
                "product": template.product,
                "score": score,
            }
        )
        own = [s for s, p in zip(scores, products, strict=True) if template.product in ("", p)]
        if template.sha256 and len(own) >= _FEWEST_SCORES and score > np.quantile(own, _USUAL):
            facts.warnings.append(
                f"{UNUSUAL_TEMPLATE}: '{template.name}' itself scores {score:.3g}, more than "
                f"{_USUAL:.0%} of the {len(own)} good pictures judged. Look at it. Another fit may choose a "
                "usual one with --set template=medoid; 'fettle calibrate --template FILE' takes one of yours."
            )
    return facts


def with_template(method: Method, path: Path, product: str, frame: Frame, device: str) -> tuple[Method, str]:
    """A copy of the method with this picture as the template, and the hash of the picture's file.

    Its energy scale is raw again. The backbone, which nothing changes, is shared.

    Raises:
        UsageError: the method compares with no template, or the frame is tiles.
        ConfigError: it has none of that product, or cannot use the picture.
        PictureError: the picture cannot be read.
    """
    if not isinstance(method, Templated):
        raise UsageError(
            f"The method '{method.name}' compares with no template.",
            "Leave the template out: the thresholds alone are then set anew.",
        )
    picture = framed_picture(path, frame, device)
    changed = copy.deepcopy(method, {id(method.backbone): method.backbone})
    changed.set_template(picture, path.name, product)
    for module in cast(torch.nn.Module, changed).modules():
        if isinstance(module, EnergyScale):
            module.load_state_dict(EnergyScale().state_dict())
    return changed, picture.sha256
