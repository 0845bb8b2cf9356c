"""A traced graph as files: ONNX, OpenVINO or pt2, with weights in float32 or in half precision."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.export import ExportedProgram

from fettle.errors import UsageError
from fettle.export.graph import first_line
from fettle.runtimes import INPUTS, openvino_core

if TYPE_CHECKING:
    import onnx
    import openvino

_MOST_BYTES = (2 << 30) - (64 << 20)  # a protobuf holds less than 2 GiB
_SMALL = 1024  # elements; what is smaller stays in float32: thresholds, scales, biases
_MOST_HALF = 60_000.0  # a larger value does not fit half precision


def onnx_model(program: ExportedProgram, outputs: Sequence[str]) -> onnx.ModelProto:
    """The graph by torch's current exporter, in one piece.

    Raises:
        UsageError: an operation that ONNX does not have, or more than 2 GiB.
    """
    with quiet():
        try:
            exported = torch.onnx.export(
                program, (), dynamo=True, input_names=INPUTS, output_names=outputs, verbose=False
            )
        except Exception as error:  # the exporter's own are no public names
            raise UsageError(
                f"The model cannot be written as ONNX: {first_line(error)}.", "Export it as pt2."
            ) from error
    assert exported is not None
    model: onnx.ModelProto = exported.model_proto
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        node.ClearField("metadata_props")  # the trace's stack: paths of this machine
        node.ClearField("doc_string")
    if model.ByteSize() > _MOST_BYTES:
        raise UsageError(
            f"The graph has {model.ByteSize() / 2**30:.1f} GiB, and an ONNX file holds less than 2.",
            "Use a smaller memory bank or backbone, or --format pt2.",
        )
    return model


def halve_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Keep large float32 constants in half precision; all is computed in float32 still, in place."""
    import onnx
    from onnx import numpy_helper

    graph, casts = model.graph, []
    for constant in graph.initializer:
        if constant.data_type != onnx.TensorProto.FLOAT or np.prod(constant.dims) < _SMALL:
            continue
        values = numpy_helper.to_array(constant)
        if not np.abs(values).max() < _MOST_HALF:
            continue
        name, half = constant.name, f"{constant.name}_half"
        constant.CopyFrom(numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(onnx.helper.make_node("Cast", [half], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def set_onnx_constants(model: onnx.ModelProto, values: Mapping[str, float]) -> None:
    """Give float32 constants other values, by name, in place."""
    from onnx import numpy_helper

    by_name = {constant.name: constant for constant in model.graph.initializer}
    for name, value in values.items():
        by_name[name].CopyFrom(numpy_helper.from_array(np.asarray(value, np.float32), name))


def set_openvino_constants(model: openvino.Model, values: Mapping[str, float]) -> None:
    """Give float32 constants other values, by name, in place."""
    from openvino import opset13

    by_name = {operation.get_friendly_name(): operation for operation in model.get_ops()}
    for name, value in values.items():
        constant = opset13.constant(np.asarray(value, np.float32))
        constant.set_friendly_name(name)
        by_name[name].output(0).replace(constant.output(0))


def openvino_model(model: onnx.ModelProto) -> openvino.Model:
    """The graph by OpenVINO's converter."""
    return openvino_core().read_model(model.SerializeToString())


def openvino_files(model: openvino.Model, *, half: bool) -> dict[str, bytes]:
    """Graph and weights as files, the latter in half precision where asked for."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        openvino.save_model(model, path, compress_to_fp16=half)
        return {"graph": path.read_bytes(), "weights": path.with_suffix(".bin").read_bytes()}


def pt2_file(program: ExportedProgram) -> bytes:
    """The graph as `torch.export.save` writes it."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the converters' remarks, which are for their developers."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
