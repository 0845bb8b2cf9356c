"""Int8 by post-training quantisation on good pictures, undone where it moves scores too far."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fettle.export.parity import Views
from fettle.runtimes import INPUTS, openvino_core, signal_stack_kept

if TYPE_CHECKING:
    import openvino

_MOST_PICTURES = 32
_RANKED_ON = 8  # pictures that each operation is tried on
_MOST_UNDONE = 64  # operations
_CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})


def quantise(model: openvino.Model, views: Views, most: float, say: Callable[[str], None]) -> openvino.Model:
    """The model with convolutions in 8 bit, as many as keep scores near.

    A backbone's convolutions take most of the time. All else stays in float: quantised distances, blurs and
    thresholds would move maps at little gain.

    Args:
        model: with an output "score".
        views: good pictures; ranges are measured on the first of them.
        most: largest relative difference of their scores that is accepted.
    """
    os.environ.setdefault("NNCF_CI", "1")  # it would report its use to its makers
    import nncf

    nncf.set_log_level(logging.ERROR)
    rows = list(islice(_rows(views), _MOST_PICTURES))
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = {id(row): _score(compiled, row) for row in rows}

    def validate(candidate: Any, some: Iterable[dict[str, NDArray[Any]]]) -> tuple[float, list[float]]:
        away = [abs(_score(candidate, row) / expected[id(row)] - 1) for row in some]
        return 1 - max(away), [1 - one for one in away]

    others = sorted({operation.get_type_name() for operation in model.get_ops()} - _CONVOLUTIONS)
    say(f"Quantising, and trying each convolution on {min(_RANKED_ON, len(rows))} good pictures: minutes.")
    restorer = nncf.AdvancedAccuracyRestorerParameters(
        ranking_subset_size=min(_RANKED_ON, len(rows)), max_num_iterations=_MOST_UNDONE
    )
    with signal_stack_kept(), contextlib.redirect_stdout(sys.stderr):  # its progress bars
        return nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(rows),
            nncf.Dataset(rows),
            validate,
            max_drop=most,
            drop_type=nncf.DropType.ABSOLUTE,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(rows),
            ignored_scope=nncf.IgnoredScope(types=others, validate=False),
            advanced_accuracy_restorer_parameters=restorer,
        )


def num_quantised(model: openvino.Model) -> tuple[int, int]:
    """How many of the model's convolutions compute in 8 bit, and how many there are."""
    convolutions = [one for one in model.get_ops() if one.get_type_name() in _CONVOLUTIONS]
    own = [one for one in convolutions if one.input_value(0).get_node().get_type_name() == "FakeQuantize"]
    return len(own), len(convolutions)


def _rows(views: Views) -> Iterable[dict[str, NDArray[Any]]]:
    for pixels, valid, number in views:
        for i in range(number):
            yield dict(zip(INPUTS, (pixels[i : i + 1], valid[i : i + 1]), strict=True))


def _score(compiled: Any, row: dict[str, NDArray[Any]]) -> float:
    return float(np.asarray(compiled(row)["score"])[0])
