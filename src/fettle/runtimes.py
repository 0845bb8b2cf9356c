"""Engines that run an exported graph: ONNX Runtime, OpenVINO, and torch for pt2.

What precision an engine computes in is set, never left to it: some would take bfloat16 where the processor
has it, and move scores past their thresholds. The number of threads is the environment's, OMP_NUM_THREADS
where that is set.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fettle.errors import ModelFolderError, UsageError

if TYPE_CHECKING:
    import openvino

Format: TypeAlias = Literal["onnx", "openvino", "pt2"]
FORMATS: tuple[Format, ...] = get_args(Format)
INPUTS = ("pictures", "valid")
Outputs: TypeAlias = "dict[str, NDArray[Any]]"

_PACKAGES: dict[Format, str] = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "torch"}
GRAPH_FILES: dict[Format, dict[str, str]] = {
    "onnx": {"graph": "onnx"},
    "openvino": {"graph": "xml", "weights": "bin"},
    "pt2": {"graph": "pt2"},
}
"""By format the parts that a graph is stored in, and their files' suffixes."""


class Runtime(Protocol):
    """A graph, ready to run.

    Attributes:
        name, version: of the engine. computes_in: the precision it was told to compute in.
    """

    name: str
    version: str
    computes_in: str

    def __call__(self, pictures: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        """Outputs by name, of pictures (B, 3, H, W) in 0..1 and valid (B, 1, H, W)."""
        ...


def open_graph(format_: Format, files: Mapping[str, bytes], outputs: Sequence[str]) -> Runtime:
    """A runtime for a graph.

    Args:
        files: contents by part, see `GRAPH_FILES`.
        outputs: their names, in the graph's order.

    Raises:
        UsageError: the engine is not installed.
        ModelFolderError: it cannot read the graph.
    """
    need_package(_PACKAGES[format_])
    engine = _ENGINES[format_]
    missing = set(GRAPH_FILES[format_]) - set(files)
    if missing:
        raise ModelFolderError(f"The graph has no {', '.join(sorted(missing))}.", "Export the model again.")
    try:
        return engine(files, outputs)
    except Exception as error:  # each engine has errors of its own
        words = " ".join(str(error).split())[:300]
        raise ModelFolderError(
            f"{engine.name} cannot read the graph: {words}.", "Export the model again."
        ) from error


def need_package(name: str) -> None:
    """Refuse to go on without an optional package. Raises UsageError."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"The package '{name}' is needed for this and is not installed.",
            "Run pip install 'fettle[export]'.",
        ) from error


def _threads() -> int | None:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else None


class OnnxRuntime:
    """ONNX Runtime on the CPU. Float32 graphs are computed in float32; it lowers no precision by itself."""

    name = "ONNX Runtime"
    computes_in = "fp32"

    def __init__(self, files: Mapping[str, bytes], outputs: Sequence[str]) -> None:
        import onnxruntime

        self.version = version("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        threads = _threads()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            files["graph"], options, providers=["CPUExecutionProvider"]
        )
        self._outputs = list(outputs)

    def __call__(self, pictures: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        found = self._session.run(self._outputs, dict(zip(INPUTS, (pictures, valid), strict=True)))
        return dict(zip(self._outputs, found, strict=True))


_core: openvino.Core | None = None
_core_lock = Lock()


def openvino_core() -> openvino.Core:
    """OpenVINO's core, one for the whole process.

    On Linux the CPU plugin of each core gives the thread a stack for signals. When it goes it puts back the
    one before, even if that was another core's which has gone already: Ctrl-C then ends in a crash.
    """
    global _core
    import openvino

    with _core_lock:
        if _core is None:
            _core = openvino.Core()
        return _core


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Put back the thread's stack for signals after others had cores of their own, see `openvino_core`."""
    before = signal_stack()
    try:
        yield
    finally:
        gc.collect()  # their cores go now
        if before is not None:
            ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)


class SignalStack(ctypes.Structure):
    """Linux's stack_t."""

    _fields_: ClassVar = [
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    ]


def signal_stack() -> SignalStack | None:
    """Where this thread handles signals; None on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return None
    found = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found


class OpenVino:
    """OpenVINO on the CPU, computing in float32."""

    name = "OpenVINO"
    computes_in = "fp32"

    def __init__(self, files: Mapping[str, bytes], outputs: Sequence[str]) -> None:
        self.version = version("openvino")
        core = openvino_core()
        model = core.read_model(files["graph"], files["weights"])
        settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        threads = _threads()
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._compiled = core.compile_model(model, "CPU", settings)
        self._outputs = list(outputs)

    def __call__(self, pictures: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        found = self._compiled(dict(zip(INPUTS, (pictures, valid), strict=True)))
        return {name: np.array(found[name]) for name in self._outputs}  # its buffers are used again


class TorchProgram:
    """torch itself. `torch.export.load` may execute what a file holds: give it nothing of unknown origin."""

    name = "PyTorch"
    computes_in = "fp32"

    def __init__(self, files: Mapping[str, bytes], outputs: Sequence[str]) -> None:
        import torch

        self.version = version("torch")
        self._program = torch.export.load(io.BytesIO(files["graph"])).module()
        self._outputs = list(outputs)

    def __call__(self, pictures: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        import torch

        with torch.inference_mode():
            found = self._program(torch.from_numpy(pictures), torch.from_numpy(valid))
        return {name: found[name].numpy() for name in self._outputs}


_ENGINES: dict[Format, type[OnnxRuntime | OpenVino | TorchProgram]] = {
    "onnx": OnnxRuntime,
    "openvino": OpenVino,
    "pt2": TorchProgram,
}
