"""A fitted model's thresholds set anew from fresh good pictures, with another template where one is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

from fettle.errors import DataError
from fettle.fitting import FittedParts
from fettle.gathering import GatheredPictures
from fettle.inspection import Refusal
from fettle.judged import Calibrations, calibrate_judged, gather_judged
from fettle.judging import judge
from fettle.layers.energy_scale import EnergyScale
from fettle.protocols import UNUSUAL_TEMPLATE, Json, Method, Progress
from fettle.refining import raw_scale, relearn_for_refiners
from fettle.templates import judge_templates, with_template


class GivenTemplate(NamedTuple):
    """A picture to compare with from now on, and the product whose template it replaces ("" where one is)."""

    path: Path
    product: str


def recalibrate(
    parts: FittedParts,
    gather: Callable[[], GatheredPictures],
    *,
    template: GivenTemplate | None,
    target_frr: float | None,
    strict: bool,
    device: str,
    progress: Progress,
) -> FittedParts:
    """The same model with other thresholds. What is handed over stays as it is.

    Args:
        gather: gives good pictures, once the template was found fit; those that the model has learnt from are
            left out.
        target_frr: None keeps the model's.

    Thresholds shared by all products come from all of them, so they stay where one has no fresh picture.

    Raises:
        DataError: no fresh picture, or none of some product where the template changes.
        CalibrationError: `strict`, and too few of them.
        UsageError: a template, and the method takes none. PictureError: it cannot be read.
    """
    products = parts.calibrations.by_product
    method, card = parts.method, {**parts.card}
    if template is not None:
        method = _take_template(parts, template, card, device)
    gathered = gather()
    learnt = set(cast("list[str]", card["picture_keys"]))
    fresh = [picture for picture in gathered.pictures if picture.key[:16] not in learnt]
    num_known = len(gathered.pictures) - len(fresh)
    if not fresh:
        raise DataError(
            f"The model has learnt from all {num_known} pictures given.",
            "Give good pictures that it has not.",
        )
    missing = sorted(set(products) - {picture.product for picture in fresh})
    if missing and template is not None:
        raise DataError(
            f"The template changes, and there is no fresh picture of {', '.join(missing)}.",
            "Give good pictures of each product that the model knows.",
        )
    refused: list[Refusal] = []
    views = judge(method, fresh, parts.frame, device=device, progress=progress, refused=refused.append)
    judged = gather_judged(views, len(fresh))
    product_of = {picture.key: picture.product for picture in fresh if products}
    calibrations = calibrate_judged(
        judged,
        product_of,
        mode="holdout",
        target_frr=parts.calibrations.shared.alpha_reject if target_frr is None else target_frr,
        grouped=gathered.column is not None,
        strict=strict,
    )
    warnings = [*cast("list[Json]", card["warnings"])]
    if template is not None:
        if judged.energies is not None:
            method.settle(judged.energies)
        shown = [product_of.get(key, "") for key in judged.keys]
        found = judge_templates(method, judged.scores, shown, device)
        card["templates"] = found.card
        warnings = [words for words in warnings if not str(words).startswith(UNUSUAL_TEMPLATE)]
        warnings += found.warnings
    notes: list[Json] = []
    if num_known:
        notes.append(f"{num_known} calibration pictures were learnt from and were left out.")
    column = fit_column(card)
    if gathered.column is None and column:
        notes.append(f"The model was fitted by '{column}', which these pictures lack: each counts by itself.")
    unread: list[Json] = [refusal.reason for refusal in [*gathered.refused, *refused]]
    for_refiners = parts.for_refiners
    shared = parts.calibrations.shared if missing else calibrations.shared
    if for_refiners is not None:
        scale = EnergyScale() if template is None else raw_scale(judged)  # else they are settled already
        for_refiners = relearn_for_refiners(
            for_refiners, fresh, judged, calibrations, parts.frame, scale, keep_shared=bool(missing)
        )
    if missing:
        notes.append(
            f"No fresh picture of {', '.join(missing)}: the former thresholds stay, and those shared by all."
        )
    card["calibration_refused"] = unread
    card["promise"] = " ".join(shared.sentences())
    card["warnings"] = warnings
    card["calibration_notes"] = [*notes, *unread]
    both = Calibrations(shared, {**products, **calibrations.by_product})
    return FittedParts(method, (), parts.frame, both, card, for_refiners)


def fit_column(card: Mapping[str, Json]) -> str | None:
    """The column that the fit grouped its pictures by; a card may come from outside and hold anything."""
    data = card.get("data")
    column = data.get("group_column") if isinstance(data, dict) else None
    return column if isinstance(column, str) else None


def _take_template(parts: FittedParts, template: GivenTemplate, card: dict[str, Json], device: str) -> Method:
    """A copy of the method with this template; the card tells, and the model now knows the picture."""
    method, sha256 = with_template(parts.method, template.path, template.product, parts.frame, device)
    card["picture_keys"] = [*cast("list[Json]", card["picture_keys"]), sha256[:16]]
    former = cast("list[Json]", card.get("template_changes", []))
    change: Json = {"name": template.path.name, "sha256": sha256, "product": template.product}
    card["template_changes"] = [*former, change]
    return method
