"""From a model to an exported folder: trace, write, run, compare, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

from torch import Tensor, nn
from torch.export import ExportedProgram

from fettle.detector import Detector
from fettle.errors import UsageError, nearest_name
from fettle.export.graph import graph_thresholds, trace
from fettle.export.parity import TOLERANCES, Views, good_views, measure_parity
from fettle.export.quantise import num_quantised, quantise
from fettle.export.writers import (
    halve_weights,
    onnx_model,
    openvino_files,
    openvino_model,
    pt2_file,
    quiet,
    set_onnx_constants,
    set_openvino_constants,
)
from fettle.exported import ExportFacts, ask
from fettle.model_folder import GraphFile, check_replaceable, write_model, write_parity
from fettle.model_parts import pack_exported
from fettle.protocols import Maps, Method, Progress, no_progress, no_words
from fettle.runtimes import FORMATS, GRAPH_FILES, INPUTS, Format, Runtime, need_package, open_graph

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]

OFFERED: dict[Format, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16"),
    "openvino": ("fp32", "fp16", "int8"),
    "pt2": ("fp32",),
}
"""By format the precisions of weights that are offered."""

_NEEDED: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "pt2": (),
}


def export_model(
    detector: Detector,
    out: Path,
    format_: str,
    *,
    precision: str = "fp32",
    pictures: Path | None = None,
    calibrate: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = no_words,
) -> ExportFacts:
    """Export a model, compare the graph with it, and write the folder, whatever the comparison says.

    Args:
        out: folder to write; must be new, empty or an exported model's.
        format_: one of `FORMATS`. precision: of the weights; all is computed in float32, but for "int8".
        pictures: folder of good pictures to compare on; None: those that the model keeps for refiners, which
            it has learnt from, so that int8, whose noise a memory of them would magnify, does not take them.
        calibrate: set the thresholds anew on `pictures`, from what the graph itself scores there. It is then
            compared with the model calibrated on them too.

    Returns:
        What was written; `parity.passed` says whether it may be used.

    Raises:
        UsageError: a folder that may not be replaced, a format or precision that is not offered, an extra
            that is not installed, a model that cannot be exported, or no picture to compare on.
        DataError, CalibrationError: `calibrate`, and no fresh picture, or too few.
    """
    check_replaceable(out, by_graph=True)
    chosen = check_offered(detector, format_, precision)
    if precision == "int8" and pictures is None:
        raise UsageError(
            "Weights in int8 are fitted to good pictures that the model has not learnt from.",
            "Name a folder of such with --pictures.",
        )
    if calibrate:
        _check_calibrating(precision, pictures)
    views = good_views(detector, pictures, say)
    say("Tracing the graph.")
    folds = () if calibrate else detector.fold_methods
    program, outputs = trace(detector.method, folds, detector.calibration, detector.frame)
    say(f"Writing it as {format_}.")
    graph, notes = _converted(chosen, precision, program, outputs, views, say)
    files = _files(chosen, precision, graph)
    with quiet():
        runtime = open_graph(chosen, files, outputs)
    shipped = detector
    if calibrate:
        assert pictures is not None
        shipped = _calibrated(detector, runtime, pictures, progress)
        detector = detector.recalibrated(pictures, strict=True, progress=progress)
        set_constants = set_onnx_constants if chosen == "onnx" else set_openvino_constants
        set_constants(graph, graph_thresholds(shipped.calibration))
        files = _files(chosen, precision, graph)
        runtime = open_graph(chosen, files, outputs)
        number = shipped.calibration.num_scores
        notes += (f"Thresholds are set on {number} good pictures, as weights in {precision} score them.",)
    parity = measure_parity(detector, runtime, views, TOLERANCES[precision], progress)
    facts = ExportFacts(
        format=chosen, precision=precision, inputs=INPUTS, outputs=outputs, parity=parity, notes=notes
    )
    stored = {part: GraphFile(suffix, files[part]) for part, suffix in GRAPH_FILES[chosen].items()}
    write_model(out, pack_exported(shipped.parts(), facts), {}, stored)
    write_parity(out, {"format": chosen, "precision": precision, **parity.model_dump(mode="json")})
    return facts


def _converted(
    format_: Format,
    precision: str,
    program: ExportedProgram,
    outputs: Sequence[str],
    views: Views,
    say: Callable[[str], None],
) -> tuple[Any, tuple[str, ...]]:
    """The graph in the format's own form: an ExportedProgram, an onnx.ModelProto or an openvino.Model; and
    what a user should know of it."""
    if format_ == "pt2":
        return program, ()
    model = onnx_model(program, outputs)
    if format_ == "onnx":
        return (halve_weights(model) if precision == "fp16" else model), ()
    converted = openvino_model(model)
    if precision != "int8":
        return converted, ()
    quantised = quantise(converted, views, TOLERANCES["int8"].score, say)
    return quantised, (
        "{} of {} convolutions compute in 8 bit, the rest in fp32.".format(*num_quantised(quantised)),
    )


def _files(format_: Format, precision: str, graph: Any) -> dict[str, bytes]:
    """A converted graph's files by part."""
    if format_ == "pt2":
        return {"graph": pt2_file(graph)}
    if format_ == "onnx":
        return {"graph": graph.SerializeToString()}
    return openvino_files(graph, half=precision == "fp16")


class _Shipped(nn.Module):
    """A method whose maps and scores a graph computes."""

    def __init__(self, method: Method, runtime: Runtime) -> None:
        super().__init__()
        self.name, self.config, self.levels = method.name, method.config, method.levels
        self.backbone = method.backbone
        self.patch_energy = method.patch_energy
        self._graph = runtime

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        return ask(self._graph, pictures, valid)


def _calibrated(detector: Detector, runtime: Runtime, pictures: Path, progress: Progress) -> Detector:
    """The model with thresholds from what the graph scores on fresh good pictures."""
    shipped = cast(Method, _Shipped(detector.method, runtime))
    parts = replace(detector.parts(), method=shipped, fold_methods=())
    changed = Detector.of(parts, detector.device).recalibrated(pictures, strict=True, progress=progress)
    return Detector.of(replace(changed.parts(), method=detector.method), detector.device)


def _check_calibrating(precision: str, pictures: Path | None) -> None:
    if precision == "fp32":
        raise UsageError(
            "Weights in fp32 score as the model does, so there is nothing to set anew.",
            "Run fettle calibrate on the model, then export it.",
        )
    if pictures is None:
        raise UsageError(
            "Thresholds are set on good pictures that the model has not learnt from.",
            "Name a folder of such with --pictures.",
        )


def check_offered(detector: Detector, format_: str, precision: str) -> Format:
    """The format, where it and the precision are offered for this model and their packages installed.

    Raises:
        UsageError: not so.
    """
    chosen = next((known for known in FORMATS if known == format_), None)
    if chosen is None:
        raise UsageError(f"There is no format '{format_}'.", nearest_name(format_, FORMATS))
    if precision not in get_args(Precision):
        raise UsageError(
            f"There is no precision '{precision}'.", nearest_name(precision, get_args(Precision))
        )
    if precision not in OFFERED[chosen]:
        raise UsageError(
            f"The format '{format_}' is not offered in {precision}.",
            f"It comes in {', '.join(OFFERED[chosen])}.",
        )
    detector.refuse_exported("is not exported again")
    if chosen not in detector.method.traits.exports:
        able = ", ".join(detector.method.traits.exports) or "no format"
        raise UsageError(
            f"The method '{detector.method.name}' cannot be exported to {format_}.", f"It can to {able}."
        )
    for package in (*_NEEDED[chosen], *(("nncf",) if precision == "int8" else ())):
        need_package(package)
    return chosen
