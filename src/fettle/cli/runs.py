"""Run folders as the commands open them, and pictures that a command had to refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fettle.errors import PictureError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fettle.cli.console import Screen
    from fettle.detector import Detector, Inspected
    from fettle.protocols import Json
    from fettle.refine.refiner import Refiner
    from fettle.report.run_folder import RunWriter

Item = TypeVar("Item")

_MOST_NAMED = 20


def open_run(
    detector: Detector,
    out: Path,
    *,
    product: str = "",
    overlays: bool = False,
    explain: bool = False,
    refiner: Refiner | None = None,
) -> RunWriter:
    """A writer for the run folder `out`, with the model's card and the product's thresholds.

    Raises:
        UsageError: `out` is a file, cannot be written, or holds a model; or `explain`, and the method cannot.
            A former run is still there then.
    """
    from fettle.model_folder import MANIFEST
    from fettle.report.run_folder import RunWriter, Thresholds

    if (out / MANIFEST).exists():
        raise UsageError(f"'{out}' holds a model.", "Name another folder for the rows with -o.")
    if explain:
        detector.explainer()
    calibration = detector.calibration_of(product)
    thresholds = Thresholds(calibration.t_review, calibration.t_reject, calibration.pixel_threshold)
    return RunWriter(
        out,
        card={
            **detector.describe(product),
            **({} if refiner is None else {"refinement": refiner.describe()}),
        },
        thresholds=thresholds,
        overlays=overlays,
        templates=detector.templates(),
    )


def add_or_refuse(
    run: RunWriter,
    screen: Screen,
    answer: Inspected[Item],
    *,
    truth: str | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> bool:
    """Write an answer down. One that cannot be kept becomes a refused row, and the run goes on.

    Returns:
        whether it was written as an answer.
    """
    from fettle.inspection import Refusal

    try:
        run.add(answer.inspection, answer.picture.pixels, truth=truth, mask=mask, explained=answer.explained)
    except PictureError as error:
        screen.say(f"Refused: {error}")
        run.refuse(Refusal(answer.inspection.path, str(error)), truth=truth)
        return False
    return True


def print_promises(detector: Detector) -> None:
    """What a model promises, and for each product, for a person."""
    for sentence in detector.calibration.sentences():
        print(sentence)
    for name, own in detector.product_calibrations.items():
        print(f"{name}: {' '.join(own.sentences()[:2])}")


def product_promises(detector: Detector) -> dict[str, Json]:
    """What is promised for each product of a model of many."""
    if not detector.product_calibrations:
        return {}
    promises: dict[str, Json] = {
        name: {
            "num_calibration": own.num_scores,
            "frr_promised": own.frr_promised,
            "promise_on": own.promise_on,
            "needed": own.needed,
        }
        for name, own in detector.product_calibrations.items()
    }
    return {"products": promises}


def say_refused(screen: Screen, reasons: Sequence[str]) -> None:
    """Name refused pictures; the first ones where there are many."""
    for reason in reasons[:_MOST_NAMED]:
        screen.say(f"Refused: {reason}")
    if len(reasons) > _MOST_NAMED:
        screen.say(f"Refused: {len(reasons) - _MOST_NAMED} more, all named in the model card.")
