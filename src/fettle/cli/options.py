"""Options that several commands share, and their values' checks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fettle.errors import UsageError, nearest_name

if TYPE_CHECKING:
    from fettle.detector import Detector
    from fettle.refine.refiner import Refiner

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, no words.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")]
Refine = Annotated[str, typer.Option(help="Sharpen maps: f2pad, difference, grabcut, guided, blur, or none.")]
RefineAll = Annotated[bool, typer.Option("--refine-all", help="Refine pictures whose verdict is ok, too.")]
RefineSet = Annotated[
    list[str] | None,
    typer.Option("--refine-set", metavar="FIELD=VALUE", help="A field of F2PAD to change; may come again."),
]
RefinePreset = Annotated[
    str | None,
    typer.Option(
        "--refine-preset",
        help="Of F2PAD and difference: default, with more iterations and good pictures, in place of compact.",
    ),
]
FittedModel = Annotated[Path, typer.Argument(help="A model folder, made by 'fettle fit' or 'calibrate'.")]
Model = Annotated[Path, typer.Argument(help="A model folder, made by 'fettle fit' or 'fettle export'.")]


def parse_settings(pairs: list[str], option: str = "--set") -> dict[str, object]:
    """field=value pairs of an option; values are read as JSON where they are JSON, else as text.

    Raises:
        UsageError: a pair without '='.
    """
    settings: dict[str, object] = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{option} {pair} has no '='.", f"Write {option} field=value.")
        try:
            settings[field.strip()] = json.loads(value)
        except ValueError:
            settings[field.strip()] = value
    return settings


def parse_names(text: str | None) -> list[str]:
    """Names with commas between; none where the option is not given."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def parse_roi(text: str | None) -> tuple[float, float, float, float] | None:
    """left,top,right,bottom as four numbers. Whether they enclose an area is the frame's to say.

    Raises:
        UsageError: not four numbers.
    """
    if text is None:
        return None
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--roi {text} is not four numbers.", "Write --roi 0.1,0.1,0.9,0.9.") from None
    return left, top, right, bottom


def check_choice(option: str, value: str | None, known: Iterable[str]) -> None:
    """Refuse a name that an option does not know, with the nearest that it does.

    Raises:
        UsageError: not one of `known`; None passes.
    """
    names = list(known)
    if value is not None and value not in names:
        raise UsageError(f"--{option} cannot be '{value}'.", nearest_name(value, names))


def check_share(option: str, value: float | None) -> None:
    """Refuse a rate that is not between 0 and 1. Raises UsageError; None passes."""
    if value is not None and not 0 < value < 1:
        raise UsageError(f"--{option} {value:g} is not between 0 and 1.", "Give a share: 0.01 is 1 %.")


def check_model_out(out: Path, *, exported: bool = False) -> None:
    """Refuse a folder that a model cannot be written to: now, not after the work.

    Raises:
        UsageError: a file, a folder with something else in it, one that cannot be made or written, or, for
            an `exported` model, one with a fitted model.
    """
    from fettle.model_folder import check_replaceable

    check_replaceable(out, by_graph=exported)
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(
            f"The folder '{out}' cannot be written: '{nearest}' does not let it.",
            "Name another folder with -o.",
        )


def make_refiner(
    detector: Detector, refine: str, everything: bool, preset: str | None, settings: list[str] | None
) -> Refiner | None:
    """What the options ask for; None for "none". Raises UsageError, see `Detector.refiner`."""
    return detector.refiner(
        refine, everything=everything, preset=preset, settings=parse_settings(settings or [], "--refine-set")
    )


def check_refine_options(
    refine: str, everything: bool, preset: str | None, settings: list[str] | None
) -> None:
    """Refuse options of a refiner where there is none. Raises UsageError."""
    if refine == "none" and (everything or preset or settings):
        raise UsageError(
            "--refine-all, --refine-preset and --refine-set are of a refiner.", "Add --refine f2pad."
        )
