"""fettle evaluate: metrics on labelled pictures."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fettle.cli.console import Screen, print_json, print_table
from fettle.cli.options import AsJson, Model
from fettle.cli.runs import open_run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fettle.datasets.records import Dataset, Record
    from fettle.detector import Detector, Inspected
    from fettle.inspection import Refusal
    from fettle.protocols import Json

SHOWN = (
    "image_auroc",
    "image_ap",
    "image_f1max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1max",
    "aupro",
    "aupro_005",
    "escape_rate",
)


def evaluate(
    model: Model,
    labelled: Annotated[Path, typer.Argument(help="Labelled layout or manifest; its test part is used.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write rows and pictures here.")
    ] = None,
    product: Annotated[str, typer.Option(help="Evaluate this product's pictures only.")] = "",
    as_json: AsJson = False,
) -> None:
    """Metrics on labelled pictures that the model has not learnt from."""
    from fettle.detector import Detector

    with Screen() as screen:
        result = evaluate_into(Detector.load(model), labelled, out, product, screen)
    if as_json:
        print_json(result)
    else:
        print_metrics(result)
    if result["num_refused"]:
        raise typer.Exit(3)


def evaluate_into(
    detector: Detector, labelled: Path | Dataset, out: Path | None, product: str, screen: Screen
) -> dict[str, Json]:
    """Evaluate, and write a run folder where `out` is given."""
    with ExitStack() as stack:
        run = None
        if out is not None:
            run = stack.enter_context(open_run(detector, out))

        def each(answer: Inspected[Record], mask: NDArray[np.bool_] | None) -> None:
            if run is not None:
                pixels = answer.picture.pixels
                run.add(answer.inspection, pixels, truth=answer.item.defect, mask=mask)

        def refused(record: Record, refusal: Refusal) -> None:
            screen.say(f"Refused: {refusal.reason}")
            if run is not None:
                run.refuse(refusal, truth=record.defect)

        result = detector.evaluate(
            labelled,
            product=product,
            progress=screen.progress,
            each=each,
            refused=refused,
        )
        if run is not None:
            run.finish(result)
    if result["num_seen_in_fit"]:
        screen.say(
            f"Note: {result['num_seen_in_fit']} of these pictures were learnt from: that flatters the model."
        )
    return result


def print_metrics(result: dict[str, Json]) -> None:
    """The table for a person: all defects together, then each kind."""
    per_defect = cast("dict[str, dict[str, Json]]", result["per_defect"])
    rows = [["all", result["num_defective"], *(result[key] for key in SHOWN)]]
    rows += [
        [name, values["num_defective"], *(values[key] for key in SHOWN)]
        for name, values in per_defect.items()
    ]
    print_table(["defect", "pictures", *SHOWN], rows)
    promised, measured = result["frr_promised"], result["frr_measured"]
    words = "no promise" if promised is None else f"promised {promised:.3f} (on {result['promise_on']})"
    found = "n/a" if measured is None else f"{measured:.3f} of {result['num_good']} good pictures"
    print(f"False-reject rate: {words}, measured {found}.")
