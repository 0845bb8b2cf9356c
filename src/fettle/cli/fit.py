"""fettle fit: learn from good pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fettle.cli.console import Screen, print_facts, print_json
from fettle.cli.options import AsJson, Out, parse_settings


def fit(
    good: Annotated[Path, typer.Argument(help="Folder of good pictures, labelled layout, or manifest.")],
    out: Out,
    method: Annotated[str, typer.Option(help="See 'fettle methods'.")] = "patchcore",
    preset: Annotated[str, typer.Option(help="compact, paper, or another of the method's.")] = "compact",
    backbone: Annotated[str | None, typer.Option(help="Name of the backbone; default: the preset's.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights file; 'random' for random weights.")] = None,
    size: Annotated[int | None, typer.Option(help="Framed size, px.")] = None,
    frame: Annotated[str | None, typer.Option(help="auto, square, pad, crop, native or tile.")] = None,
    roi: Annotated[
        str | None, typer.Option(help="Region of interest: left,top,right,bottom as shares in 0..1.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Manifest column of pictures that belong together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of the method; repeatable.")
    ] = None,
    target_frr: Annotated[float, typer.Option(help="Share of good parts that may be rejected.")] = 0.01,
    memory_mib: Annotated[int, typer.Option(help="Memory for the fit besides the network, MiB.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    strict: Annotated[bool, typer.Option(help="Fail where the promise cannot be made.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn from good pictures alone, set the thresholds, and save the model."""
    from fettle.detector import Detector

    start = time.perf_counter()
    with Screen() as screen:
        detector = Detector.fit(
            good,
            method=method,
            preset=preset,
            backbone=backbone,
            weights=weights,
            size=size,
            frame=frame,
            roi=roi,
            group=group,
            seed=seed,
            settings=parse_settings(set_ or []),
            target_frr=target_frr,
            strict=strict,
            memory_mib=memory_mib,
            device=device,
            progress=screen.progress,
            say=screen.say,
        )
        detector.save(out)
        calibration = detector.calibration
        for warning in detector.warnings():
            screen.say(f"Note: {warning}")
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "model": str(out),
                "method": method,
                "num_fit": detector.num_fit,
                "num_calibration": calibration.num_scores,
                "frr_promised": calibration.frr_promised,
                "promise_on": calibration.promise_on,
                "needed": calibration.needed,
                "seconds": seconds,
            }
        )
        return
    print_facts(
        {
            "model": out,
            "method": f"{method}, {preset}, backbone {detector.method.backbone.spec.id}",
            "frame": f"{detector.frame.width} x {detector.frame.height} px: {detector.frame.reason}",
            "pictures": f"{detector.num_fit} learnt from, {calibration.num_scores} calibrated on",
            "seconds": round(seconds, 1),
        }
    )
    for sentence in calibration.sentences():
        print(sentence)
