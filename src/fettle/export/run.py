"""From a model to an exported folder: trace, write, run, compare, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from torch.export import ExportedProgram

from fettle.detector import Detector
from fettle.errors import UsageError, nearest_name
from fettle.export.graph import trace
from fettle.export.parity import TOLERANCES, Views, good_views, measure_parity
from fettle.export.quantise import num_quantised, quantise
from fettle.export.writers import halve_weights, onnx_model, openvino_files, openvino_model, pt2_file, quiet
from fettle.exported import ExportFacts
from fettle.model_folder import GraphFile, write_model, write_parity
from fettle.model_parts import pack_exported
from fettle.protocols import Progress, no_progress, no_words
from fettle.runtimes import FORMATS, GRAPH_FILES, INPUTS, Format, need_package, open_graph

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
    progress: Progress = no_progress,
    say: Callable[[str], None] = no_words,
) -> ExportFacts:
    """Export a model, compare the graph with it, and write the folder, whatever the comparison says.

    Args:
        out: folder to write; must be new, empty or a model's.
        format_: one of `FORMATS`. precision: of the weights; all is computed in float32, but for "int8".
        pictures: folder of good pictures to compare on; None: those that the model keeps for refiners, which
            it has learnt from, so that int8, whose noise a memory of them would magnify, does not take them.

    Returns:
        What was written; `parity.passed` says whether it may be used.

    Raises:
        UsageError: a format or precision that is not offered, an extra that is not installed, a model that
            cannot be exported, or no picture to compare on.
    """
    chosen = check_offered(detector, format_, precision)
    if precision == "int8" and pictures is None:
        raise UsageError(
            "Weights in int8 are fitted to good pictures that the model has not learnt from.",
            "Name a folder of such with --pictures.",
        )
    views = good_views(detector, pictures, say)
    say("Tracing the graph.")
    program, outputs = trace(detector.method, detector.fold_methods, detector.calibration, detector.frame)
    say(f"Writing it as {format_}.")
    files, notes = _files(chosen, precision, program, outputs, views, say)
    with quiet():
        runtime = open_graph(chosen, files, outputs)
    parity = measure_parity(detector, runtime, views, TOLERANCES[precision], progress)
    facts = ExportFacts(
        format=chosen, precision=precision, inputs=INPUTS, outputs=outputs, parity=parity, notes=notes
    )
    graph = {part: GraphFile(suffix, files[part]) for part, suffix in GRAPH_FILES[chosen].items()}
    write_model(out, pack_exported(detector.parts(), facts), {}, graph)
    write_parity(out, {"format": chosen, "precision": precision, **parity.model_dump(mode="json")})
    return facts


def _files(
    format_: Format,
    precision: str,
    program: ExportedProgram,
    outputs: Sequence[str],
    views: Views,
    say: Callable[[str], None],
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The graph's files by part, and what a user should know of them."""
    if format_ == "pt2":
        return {"graph": pt2_file(program)}, ()
    model = onnx_model(program, outputs)
    if format_ == "onnx":
        return {"graph": (halve_weights(model) if precision == "fp16" else model).SerializeToString()}, ()
    converted = openvino_model(model)
    if precision != "int8":
        return openvino_files(converted, half=precision == "fp16"), ()
    quantised = quantise(converted, views, TOLERANCES["int8"].score, say)
    note = "{} of {} convolutions compute in 8 bit, the rest in fp32.".format(*num_quantised(quantised))
    return openvino_files(quantised, half=False), (note,)


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
