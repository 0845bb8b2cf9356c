"""fettle inspect: verdict, map and regions for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fettle.cli.console import Screen, print_facts, print_json
from fettle.cli.options import (
    AsJson,
    Model,
    Out,
    Refine,
    RefineAll,
    RefinePreset,
    RefineSet,
    check_choice,
    check_refine_options,
    make_refiner,
    parse_names,
)
from fettle.cli.runs import add_or_refuse, open_run
from fettle.protocols import Json


def inspect(
    model: Model,
    paths: Annotated[list[Path], typer.Argument(help="Pictures, folders of pictures, or manifests.")],
    out: Out,
    product: Annotated[
        str, typer.Option(help="The product's name: kept in each row, and choosing its thresholds.")
    ] = "",
    overlays: Annotated[bool, typer.Option("--overlays", help="Also write full-size overlays.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also draw what the method sees, if it can show it.")
    ] = False,
    mm_per_pixel: Annotated[float | None, typer.Option(help="Scale, for areas and lengths in mm.")] = None,
    min_area: Annotated[int, typer.Option(min=1, help="Smaller regions are left out, px.")] = 1,
    refine: Refine = "none",
    refine_all: RefineAll = False,
    refine_preset: RefinePreset = None,
    refine_set: RefineSet = None,
    contours: Annotated[
        str | None,
        typer.Option(
            help="Also write the regions' outlines: coco, labelme, yolo or png, with commas between."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Inspect pictures: rows as JSONL, CSV and Parquet, and pictures for the report."""
    from fettle.calibration import RegionRules, RunningShare
    from fettle.datasets.picture_list import list_pictures
    from fettle.detector import Detector, Inspected
    from fettle.report.contours import FORMATS, ContourWriter

    check_refine_options(refine, refine_all, refine_preset, refine_set)
    formats = parse_names(contours)
    for name in formats:
        check_choice("contours", name, FORMATS)
    pictures = list_pictures(paths)
    detector = Detector.load(model)
    refiner = make_refiner(detector, refine, refine_all, refine_preset, refine_set)
    share = RunningShare(detector.calibration_of(product))
    rules = RegionRules(min_area_px=min_area, mm_per_pixel=mm_per_pixel)
    with (
        Screen() as screen,
        open_run(detector, out, product=product, overlays=overlays, explain=explain, refiner=refiner) as run,
        ContourWriter(
            out, formats, detector.calibration_of(product).pixel_threshold, min_area, pictures
        ) as outlines,
    ):

        def note(sentence: str | None) -> None:
            if sentence is not None:
                screen.say(f"Note: {sentence}")

        answers = detector.inspect_items(
            pictures, lambda path: path, product=product, rules=rules, explain=explain, refiner=refiner
        )
        for done, answer in enumerate(answers, 1):
            screen.progress("inspecting", done, len(pictures))
            if isinstance(answer, Inspected):
                if add_or_refuse(run, screen, answer):
                    outlines.add(answer.inspection)
                note(share.update(answer.inspection.verdict))
            else:
                run.refuse(answer[1])
                screen.say(f"Refused: {answer[1].reason}")
        note(share.finish())
        summary = run.finish()
    counts: dict[str, Json] = {
        "pictures": summary.pictures,
        "ok": summary.ok,
        "review": summary.review,
        "reject": summary.reject,
        "refused": summary.refused,
        "out": str(out),
    }
    if as_json:
        print_json(counts)
    else:
        print_facts(counts)
    if summary.refused:
        raise typer.Exit(3)
