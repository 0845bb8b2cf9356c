"""fettle fit: learn from good pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from fettle.cli.console import Screen, print_facts, print_json
from fettle.cli.options import (
    AsJson,
    Out,
    check_choice,
    check_model_out,
    check_share,
    parse_names,
    parse_roi,
    parse_settings,
)
from fettle.cli.runs import print_promises, product_promises, say_refused
from fettle.protocols import Json, no_progress, no_words

if TYPE_CHECKING:
    from fettle.detector import Detector


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
    roi_mask: Annotated[
        Path | None, typer.Option(help="Mask picture, white inside the region of interest.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Manifest column of pictures that belong together.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=1, help="Few-shot: learn from so many good pictures alone, of each product."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of the method; repeatable.")
    ] = None,
    target_frr: Annotated[float, typer.Option(help="Share of good parts that may be rejected.")] = 0.01,
    calibration: Annotated[
        str, typer.Option(help="auto, leave_one_out, holdout, kfold or cross: who judges good pictures.")
    ] = "auto",
    memory_mib: Annotated[int, typer.Option(help="Memory for the fit besides the network, MiB.")] = 512,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    multi_class: Annotated[
        bool, typer.Option("--multi-class", help="One model for the products in GOOD, thresholds for each.")
    ] = False,
    products: Annotated[
        str | None, typer.Option(help="With --multi-class: these only, names with commas between.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps features; default: FETTLE_CACHE, or the user's.")
    ] = None,
    cache_mib: Annotated[
        int,
        typer.Option(
            min=0, help="Bound on features kept for trainings, and on those of this fit, MiB; 0: keep none."
        ),
    ] = 8192,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder for a TensorBoard log of the training.")
    ] = None,
    refine_refs: Annotated[
        int, typer.Option(min=0, max=256, help="Good pictures that the model keeps for --refine; 0: none.")
    ] = 32,
    strict: Annotated[bool, typer.Option(help="Fail where the promise cannot be made.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn from good pictures alone, set the thresholds, and save the model."""
    from fettle.detector import Detector
    from fettle.images.framing import FrameMode
    from fettle.judging import CalibrationMode
    from fettle.training import forget, is_main_process

    check_choice("frame", frame, get_args(FrameMode))
    check_choice("calibration", calibration, get_args(CalibrationMode))
    check_share("target-frr", target_frr)
    check_model_out(out)

    training_dir = out.with_name(f"{out.absolute().name}.training")
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
            roi=parse_roi(roi),
            roi_mask=roi_mask,
            group=group,
            shots=shots,
            seed=seed,
            settings=parse_settings(set_ or []),
            target_frr=target_frr,
            strict=strict,
            calibration=calibration,
            memory_mib=memory_mib,
            device=device,
            multi_class=multi_class,
            products=tuple(parse_names(products)),
            cache_dir=cache_dir,
            cache_mib=cache_mib,
            training_dir=training_dir,
            log_dir=log_dir,
            refine_refs=refine_refs,
            progress=screen.progress if is_main_process() else no_progress,
            say=screen.say if is_main_process() else no_words,
        )
        if not is_main_process():  # the first of several processes writes and speaks
            return
        detector.save(out)
        forget(training_dir)
        refused = _refused(detector.card)
        say_refused(screen, refused)
        for warning in detector.warnings():
            screen.say(f"Note: {warning}")
    promised = detector.calibration
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "model": str(out),
                "method": method,
                "shots": shots,
                "num_fit": detector.num_fit,
                "num_calibration": promised.num_scores,
                "frr_promised": promised.frr_promised,
                "promise_on": promised.promise_on,
                "needed": promised.needed,
                "seconds": seconds,
                **product_promises(detector),
            }
        )
    else:
        _print_model(detector, out, method, preset, seconds)
    if refused:
        raise typer.Exit(3)


def _print_model(detector: Detector, out: Path, method: str, preset: str, seconds: float) -> None:
    """What was fitted and what it promises, for a person."""
    promised = detector.calibration
    groups = "" if promised.num_groups is None else f", in {promised.num_groups} groups"
    print_facts(
        {
            "model": out,
            "method": f"{method}, {preset}, backbone {detector.method.backbone.spec.id}",
            "frame": f"{detector.frame.width} x {detector.frame.height} px: {detector.frame.reason}",
            "pictures": f"{detector.num_fit} learnt from, {promised.num_pictures} calibrated on{groups}",
            "seconds": f"{seconds:.1f}",
        }
    )
    print_promises(detector)


def _refused(card: Mapping[str, Json]) -> list[str]:
    """Why pictures were left out of the fit, a sentence each."""
    data = cast("dict[str, Json]", card["data"])
    return [refusal["reason"] for refusal in cast("list[dict[str, str]]", data["refused"])]
