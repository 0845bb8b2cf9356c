"""fettle demo: the main job on rendered parts, from good pictures to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fettle.cli.console import Screen, print_json, print_table
from fettle.cli.evaluate import SHOWN, evaluate_into, rates_sentence
from fettle.cli.options import AsJson

_PRODUCTS = 2


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Render parts, learn from good ones, inspect unseen ones, print the metrics, write the report."""
    from fettle.datasets.parts import PRODUCTS, write_parts
    from fettle.detector import Detector
    from fettle.report.index import write_index
    from fettle.report.page import write_report

    results = {}
    reports = {}
    with Screen() as screen:
        names = PRODUCTS[:_PRODUCTS]
        screen.say(f"Rendering {' and '.join(names)} into {out / 'parts'}.")
        write_parts(out / "parts", products=names, progress=screen.progress)
        for name in names:
            screen.say(f"{name}: learning from its good pictures, then inspecting unseen ones.")
            detector = Detector.fit(out / "parts" / name, progress=screen.progress)
            detector.save(out / name / "model")
            detector = Detector.load(out / name / "model")
            results[name] = evaluate_into(detector, out / "parts" / name, out / name / "run", name, screen)
            reports[name] = write_report(out / name / "run")
        index = write_index(out / "report.html", results, reports)
    if as_json:
        print_json({"out": str(out), "report": str(index), "per_product": {**results}})
        return
    rows = [[name, *(result[key] for key in SHOWN)] for name, result in results.items()]
    print_table(["product", *SHOWN.values()], rows)
    for name, result in results.items():
        print(f"{name}: {rates_sentence(result)}")
    print(f"Report: {index}")
