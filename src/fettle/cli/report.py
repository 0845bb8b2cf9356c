"""fettle report: the HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    out: Annotated[
        Path, typer.Argument(help="A run folder, made by 'fettle inspect' or 'fettle evaluate -o'.")
    ],
) -> None:
    """Write the HTML report of a run folder and print its path."""
    from fettle.datasets.folder import RUN_JSON
    from fettle.report.page import write_report
    from fettle.report.products import PRODUCTS_JSON, write_products_report

    # A run that was written over an evaluation of several products is the newer one: those remove it.
    several = (out / PRODUCTS_JSON).is_file() and not (out / RUN_JSON).is_file()
    print(write_products_report(out) if several else write_report(out))
