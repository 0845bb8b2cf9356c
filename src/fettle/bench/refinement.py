"""Refine pictures by several refiners and measure each, in the two ways that they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

from fettle.calibration import Calibration
from fettle.datasets.records import Record
from fettle.detector import Detector
from fettle.evaluation import Evaluation
from fettle.images.decode import read_mask
from fettle.inspection import Inspection, Verdict
from fettle.labelled_run import promise_of
from fettle.protocols import Json

KEYS = (
    *("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro", "iou", "iou_pooled", "boundary_f", "hd95"),
    *("hd95_median", "empty_predictions", "num_good", "num_defective", "seconds_per_refined_image"),
)
BY_DEFECT = ("num_defective", "pixel_ap", "aupro", "iou", "boundary_f", "hd95")


def refine_and_measure(
    detector: Detector,
    parts: Mapping[str, Sequence[Record]],
    arms: Mapping[str, tuple[str, Mapping[str, object]]],
    product: str = "",
) -> dict[str, Json]:
    """Figures by part, arm and mode: "all" refines every picture, "gated" those whose verdict is not ok.

    Args:
        parts: labelled pictures, good ones too, by the part's name; one may be in several.
        arms: a refiner's name and the fields to change, by the arm's name.
        product: whose pictures they are, of a model of many.
    """
    records = {record.path: record for part in parts.values() for record in part}
    base = {path: _inspect(detector, record, "none", {}, product) for path, record in records.items()}
    found: dict[str, dict[str, Json]] = {name: {} for name in parts}
    for arm, (refiner, fields) in arms.items():
        refined = base
        if refiner != "none":
            refined = {
                path: _inspect(detector, record, refiner, fields, product) for path, record in records.items()
            }
        for name, part in parts.items():
            answers = [(one, base[one.path], refined[one.path]) for one in part]
            found[name][arm] = _figures(
                detector.calibration_of(product),
                [
                    (one, plain, sharp)
                    for one, plain, sharp in answers
                    if plain is not None and sharp is not None
                ],
            )
    return cast("dict[str, Json]", found)


def _figures(calibration: Calibration, answers: Sequence[tuple[Record, Inspection, Inspection]]) -> Json:
    """By mode, of records with their plain and their refined answers."""
    evaluations = {mode: _evaluation(calibration) for mode in ("all", "gated")}
    states: Counter[str] = Counter()
    for record, plain, refined in answers:
        if refined.refinement is not None:
            state, reason = refined.refinement["refined"], refined.refinement.get("gate_reason")
            states[f"{state} {reason}" if reason else str(state)] += not record.is_good
        mask = None
        if record.mask is not None:
            mask = read_mask(record.mask, refined.anomaly_map.shape)[0]
        evaluations["all"].update(refined, record.defect, mask)
        as_used = plain if plain.verdict is Verdict.OK else refined
        evaluations["gated"].update(as_used, record.defect, mask)
    modes: dict[str, Json] = {}
    for mode, evaluation in evaluations.items():
        result = evaluation.compute(0.0)
        by_defect = cast("dict[str, dict[str, Json]]", result["per_defect"])
        modes[mode] = {
            **{key: result[key] for key in KEYS},
            "per_defect": {name: {key: own[key] for key in BY_DEFECT} for name, own in by_defect.items()},
            **({"states": dict(states)} if mode == "all" else {}),
        }
    return modes


def _evaluation(calibration: Calibration) -> Evaluation:
    return Evaluation(promise_of(calibration), boundaries=True, pixel_threshold=calibration.pixel_threshold)


def _inspect(
    detector: Detector, record: Record, refiner: str, fields: Mapping[str, object], product: str
) -> Inspection | None:
    """The answer for one picture, whatever its verdict; None where it was refused."""
    made = detector.refiner(refiner, everything=True, settings=fields)
    (answer,) = detector.inspect([record.path], product=product, refine=made)
    return answer if isinstance(answer, Inspection) else None
