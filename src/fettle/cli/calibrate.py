"""fettle calibrate: set a model's thresholds anew on fresh good pictures, with another template too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fettle.cli.console import Screen, print_json
from fettle.cli.options import AsJson, FittedModel, Out, check_model_out, check_share
from fettle.cli.runs import print_promises, product_promises


def calibrate(
    model: FittedModel,
    good: Annotated[Path, typer.Argument(help="Good pictures that the model has not learnt from.")],
    out: Out,
    target_frr: Annotated[
        float | None, typer.Option(help="Share of good parts that may be rejected; default: as before.")
    ] = None,
    product: Annotated[
        str, typer.Option(help="Of a model of several products: set the thresholds of this one alone.")
    ] = "",
    group: Annotated[
        str | None,
        typer.Option(help="Column of pictures that belong together; default: the fit's, where there is one."),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="Good picture to compare with from now on, in place of the former.")
    ] = None,
    template_of: Annotated[
        str, typer.Option(help="With --template: the product whose template it replaces.")
    ] = "",
    strict: Annotated[bool, typer.Option(help="Fail where the promise cannot be made.")] = False,
    as_json: AsJson = False,
) -> None:
    """Set the thresholds anew from fresh good pictures; what the model learnt stays."""
    from fettle.detector import Detector

    check_share("target-frr", target_frr)
    check_model_out(out)
    start = time.perf_counter()
    with Screen() as screen:
        detector = Detector.load(model).recalibrated(
            good,
            target_frr=target_frr,
            product=product,
            group=group,
            template=template,
            template_product=template_of,
            strict=strict,
            progress=screen.progress,
        )
        detector.save(out)
        for warning in detector.warnings():
            screen.say(f"Note: {warning}")
    calibration = detector.calibration
    if as_json:
        print_json(
            {
                "model": str(out),
                "method": detector.method.name,
                "num_calibration": calibration.num_scores,
                "frr_promised": calibration.frr_promised,
                "promise_on": calibration.promise_on,
                "needed": calibration.needed,
                "seconds": time.perf_counter() - start,
                **product_promises(detector),
            }
        )
    else:
        print_promises(detector)
    if detector.card["calibration_refused"]:
        raise typer.Exit(3)
