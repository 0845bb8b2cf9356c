"""fettle export: a model as one graph for another engine, and the proof that it gives the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fettle.cli.console import Screen, print_facts, print_json
from fettle.cli.options import AsJson, FittedModel, Out, check_model_out


def export(
    model: FittedModel,
    out: Out,
    format_: Annotated[str, typer.Option("--format", help="onnx, openvino or pt2.")],
    precision: Annotated[str, typer.Option(help="Of the weights: fp32, fp16 or int8.")] = "fp32",
    pictures: Annotated[
        Path | None,
        typer.Option(help="Good pictures to compare on; default: those that the model keeps."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            help="Set the thresholds anew, in this precision, on --pictures; the model must not know them."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the model as one graph, run it in its own engine, and compare. Exit code 1: too far apart."""
    from fettle.detector import Detector
    from fettle.export.parity import sentence
    from fettle.export.run import export_model

    check_model_out(out, exported=True)
    with Screen() as screen:
        facts = export_model(
            Detector.load(model),
            out,
            format_,
            precision=precision,
            pictures=pictures,
            calibrate=calibrate,
            progress=screen.progress,
            say=screen.say,
        )
    parity = facts.parity
    if as_json:
        print_json({"model": str(out), **facts.model_dump(mode="json")})
    else:
        print_facts(
            {
                "model": out,
                "format": f"{facts.format}, weights in {facts.precision}",
                "engine": f"{parity.runtime} {parity.runtime_version}, computing in {parity.computes_in}",
                "batches": ", ".join(map(str, parity.batches)),
                "latency": f"{parity.latency_ms:.1f} ms, PyTorch {parity.torch_latency_ms:.1f} ms: "
                f"ratio {parity.latency_ratio:.2f}",
            }
        )
        for note in facts.notes:
            print(note)
        print(sentence(parity))
    if not parity.passed:
        raise typer.Exit(1)
