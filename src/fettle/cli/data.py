"""fettle data: describe a data set, render the procedural parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fettle.cli.console import Screen, print_facts, print_json
from fettle.cli.options import AsJson, Out, parse_names
from fettle.protocols import Json

app = typer.Typer(help="Data sets: describe one, or render the procedural parts.", no_args_is_help=True)


@app.command("describe")
def describe(
    folder: Annotated[Path, typer.Argument(help="Folder or manifest.")],
    layout: Annotated[
        str, typer.Option(help="auto, folder, mvtec, mvtec3d, visa, magnetic_tile or manifest.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Counts, sizes, suspicious files, and trivial scores that would tell the label without looking."""
    from fettle.datasets.describe import describe as describe_dataset
    from fettle.datasets.open import open_dataset

    with Screen() as screen:
        found = describe_dataset(open_dataset(folder, layout), screen.progress)
    if as_json:
        print_json(found.to_json())
    else:
        print(found.to_text())


@app.command("parts")
def parts(
    out: Out,
    products: Annotated[str, typer.Option(help="Names, separated by commas; default: all.")] = "",
    train: Annotated[int, typer.Option(help="Good training pictures a product.")] = 60,
    test_good: Annotated[int, typer.Option(help="Good test pictures a product.")] = 20,
    defects: Annotated[int, typer.Option(help="Test pictures of each defect kind.")] = 4,
    size: Annotated[int, typer.Option(help="Side, px.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Render pictures of parts with exact defect masks, in the MVTec-AD layout."""
    from fettle.datasets.parts import PRODUCTS, write_parts

    names = tuple(parse_names(products)) or PRODUCTS
    with Screen() as screen:
        written = write_parts(
            out,
            products=names,
            train=train,
            test_good=test_good,
            defects=defects,
            size=size,
            seed=seed,
            progress=screen.progress,
        )
    facts: dict[str, Json] = {"out": str(out), "pictures": written.pictures}
    if as_json:
        print_json({**facts, "products": [*written.products]})
    else:
        print_facts({**facts, "products": ", ".join(written.products)})
