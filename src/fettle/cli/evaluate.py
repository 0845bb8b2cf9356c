"""fettle evaluate: metrics on labelled pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fettle.cli.console import Screen, print_json, print_table
from fettle.cli.options import (
    AsJson,
    Model,
    RefineAll,
    RefinePreset,
    RefineSet,
    check_refine_options,
    make_refiner,
)
from fettle.cli.runs import add_or_refuse, open_run
from fettle.errors import UsageError, nearest_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fettle.datasets.records import Dataset, Record
    from fettle.detector import Detector, Inspected
    from fettle.inspection import Refusal
    from fettle.protocols import Json
    from fettle.refine.refiner import Refiner

SHOWN = {
    "image_auroc": "image\nAUROC",
    "image_ap": "image\nAP",
    "image_f1max": "image\nF1",
    "pixel_auroc": "pixel\nAUROC",
    "pixel_ap": "pixel\nAP",
    "pixel_f1max": "pixel\nF1",
    "aupro": "AUPRO\n0.3",
    "aupro_005": "AUPRO\n0.05",
    "escape_rate": "escape\nrate",
}
"""The metrics that a person is shown, with their heads."""


SHOWN_BOUNDARIES = {"iou": "IoU", "boundary_f": "boundary\nF", "hd95": "HD95\npx"}
"""And those of boundaries, where they were measured."""


def shown_metrics(result: Mapping[str, Json]) -> dict[str, str]:
    """The metrics of a table for a person, with their heads."""
    return SHOWN | (SHOWN_BOUNDARIES if "iou" in result else {})


def evaluate(
    model: Model,
    labelled: Annotated[Path, typer.Argument(help="Labelled layout or manifest; its test part is used.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write rows and pictures here.")
    ] = None,
    product: Annotated[str, typer.Option(help="Evaluate this product's pictures only.")] = "",
    explain: Annotated[
        bool,
        typer.Option("--explain", help="With -o: also draw what the method sees, if it can show it."),
    ] = False,
    refine: Annotated[
        str | None,
        typer.Option(
            help="Sharpen maps and measure boundaries: f2pad, difference, grabcut, guided, blur, "
            "or none to measure them only."
        ),
    ] = None,
    refine_all: RefineAll = False,
    refine_preset: RefinePreset = None,
    refine_set: RefineSet = None,
    as_json: AsJson = False,
) -> None:
    """Metrics on labelled pictures that the model has not learnt from."""
    from fettle.detector import Detector

    check_refine_options(refine or "none", refine_all, refine_preset, refine_set)
    if explain and out is None:
        raise UsageError("--explain draws into a run folder, and there is none.", "Name one with -o.")
    with Screen() as screen:
        detector = Detector.load(model)
        result = evaluate_into(
            detector,
            labelled,
            out,
            product,
            screen,
            explain=explain,
            refiner=make_refiner(detector, refine or "none", refine_all, refine_preset, refine_set),
            boundaries=refine is not None,
        )
    if as_json:
        print_json(result)
    elif "per_product" in result:
        print_products(result)
    else:
        print_metrics(result)
    if result["num_refused"]:
        raise typer.Exit(3)


def evaluate_into(
    detector: Detector,
    labelled: Path | Dataset,
    out: Path | None,
    product: str,
    screen: Screen,
    *,
    explain: bool = False,
    refiner: Refiner | None = None,
    boundaries: bool = False,
) -> dict[str, Json]:
    """Evaluate, and write a run folder where `out` is given; one for each product of a model of many.

    Raises:
        UsageError: the data set has no test picture of that product; `explain`, and the method cannot.
    """
    from fettle.report.products import product_folders, write_products
    from fettle.report.run_folder import remove_run

    dataset = detector.open_labelled(labelled, product) if isinstance(labelled, Path) else labelled
    _check_product(dataset, product)
    several = bool(detector.product_calibrations) and not product
    folders: dict[str, Path] = {}
    if out is not None:
        products = sorted({record.product for record in dataset.for_testing()})
        folders = product_folders(out, products) if several else {product: out}
        if several:
            remove_run(out)
    not_kept: Counter[str] = Counter()
    with ExitStack() as stack:
        runs = {
            name: stack.enter_context(
                open_run(detector, folder, product=name, explain=explain, refiner=refiner)
            )
            for name, folder in folders.items()
        }

        def name_of(record: Record) -> str:
            return record.product if several else product

        def each(answer: Inspected[Record], mask: NDArray[np.bool_] | None) -> None:
            name = name_of(answer.item)
            run = runs.get(name)
            if run is not None:
                kept = add_or_refuse(run, screen, answer, truth=answer.item.defect, mask=mask)
                not_kept[name] += not kept

        def refused(record: Record, refusal: Refusal) -> None:
            screen.say(f"Refused: {refusal.reason}")
            run = runs.get(name_of(record))
            if run is not None:
                run.refuse(refusal, truth=record.defect)

        result = detector.evaluate(
            dataset,
            product=product,
            progress=screen.progress,
            each=each,
            refused=refused,
            explain=explain,
            refiner=refiner,
            boundaries=boundaries,
        )
        own = cast("dict[str, dict[str, Json]]", result["per_product"] if several else {product: result})
        for name, number in not_kept.items():
            own[name]["num_refused"] = cast(int, own[name]["num_refused"]) + number
        if several:
            result["num_refused"] = cast(int, result["num_refused"]) + not_kept.total()
        for name, run in runs.items():
            run.finish(own[name])
    if out is not None and several:
        write_products(out, folders, result)
    pooled = cast("dict[str, Json]", result["pooled"]) if several else {}
    for note in _notes({**result, **pooled}):
        screen.say(f"Note: {note}")
    return result


def _check_product(dataset: Dataset, product: str) -> None:
    known = {record.product for record in dataset.for_testing() if record.product}
    if product and product not in known:
        remedy = nearest_name(product, known) if known else "It names no products: leave --product out."
        raise UsageError(f"'{dataset.root}' has no test picture of product '{product}'.", remedy)


def _notes(result: dict[str, Json]) -> list[str]:
    """What a reader of the figures should know."""
    notes = []
    if result["num_seen_in_fit"]:
        notes.append(
            f"{result['num_seen_in_fit']} of these pictures were learnt from: that flatters the model."
        )
    if not result["num_defective"]:
        notes.append("there is no defective picture, so nothing but the false-reject rate can be measured.")
    if not result["num_good"]:
        notes.append("there is no good picture, so the false-reject rate cannot be measured.")
    if result["pictures_without_mask"]:
        notes.append(
            f"{result['pictures_without_mask']} defective pictures have no mask and are in no pixel metric."
        )
    return notes


def print_metrics(result: dict[str, Json]) -> None:
    """The table for a person: all defects together, then each kind."""
    per_defect = cast("dict[str, dict[str, Json]]", result["per_defect"])
    shown = shown_metrics(result)
    rows = [["all", result["num_defective"], *(result[key] for key in shown)]]
    rows += [
        [name, values["num_defective"], *(values[key] for key in shown)]
        for name, values in per_defect.items()
    ]
    print_table(["defect", "n", *shown.values()], rows)
    print(rates_sentence(result))


def print_products(result: dict[str, Json]) -> None:
    """The table for a person: each product by its own thresholds, their mean, and all by shared ones."""
    per_product = cast("dict[str, dict[str, Json]]", result["per_product"])
    lines = {
        **per_product,
        "mean": cast("dict[str, Json]", result["mean"]),
        "pooled": cast("dict[str, Json]", result["pooled"]),
    }
    shown = shown_metrics(lines["mean"])
    rows = [
        [name, values["num_defective"], *(values[key] for key in shown)] for name, values in lines.items()
    ]
    print_table(["product", "n", *shown.values()], rows)
    for name, values in per_product.items():
        print(f"{name}: {rates_sentence(values)}")


def rates_sentence(result: dict[str, Json]) -> str:
    """What was promised for good parts, and what was measured on them."""
    promised, measured = result["frr_promised"], result["frr_measured"]
    event = "not ok" if result["promise_on"] == "review" else "reject"
    words = "nothing promised" if promised is None else f"promised at most {promised:.3f} on average"
    found = "nothing measured" if measured is None else f"measured {measured:.3f}"
    rate = f"False-reject rate (good parts judged {event})"
    return f"{rate}: {words}, {found}; {result['num_good']} good pictures."
