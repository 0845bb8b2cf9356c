"""An exported graph in the place of a method: what inspection needs, and clear words for all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fettle.errors import ModelFolderError, UsageError
from fettle.model_folder import PARITY
from fettle.protocols import BackboneSpec, Json, Maps
from fettle.runtimes import Format, Runtime


class Parity(BaseModel):
    """How far an exported graph is from the model, on good pictures.

    Attributes:
        passed: whether all is within the tolerances.
        pictures: framed views that were compared; source: where they came from.
        batches: pictures at a time, all of which were run.
        max_score_diff: largest |difference| of a score, relative to that score, but at least to the median
            of those that the model was calibrated on: a picture that it knows may score 0. None: not finite.
        max_map_diff: largest |difference| of a map, relative to the largest value of all maps, but at least
            to what good pictures' maps reach in the median. None: not finite.
        verdict_flips: views whose verdict differs, in any batch.
        score_tolerance, map_tolerance, flips_tolerance: the most of each that passes.
        latency_ms, torch_latency_ms: median time of one picture alone, graph and model.
        latency_ratio: the former over the latter.
        runtime, runtime_version, computes_in: what ran the graph.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    pictures: int = Field(ge=1)
    source: str
    batches: tuple[int, ...]
    max_score_diff: float | None
    max_map_diff: float | None
    verdict_flips: int
    score_tolerance: float
    map_tolerance: float
    flips_tolerance: int
    latency_ms: float
    torch_latency_ms: float
    latency_ratio: float
    runtime: str
    runtime_version: str
    computes_in: str


class ExportFacts(BaseModel):
    """What an exported model's manifest says of its graph.

    Attributes:
        format: of the graph. precision: of its weights.
        inputs, outputs: their names, in order.
        notes: what was done on the way that a user should know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parity: Parity
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportedBackbone:
    """What is still known of a backbone that lies inside a graph."""

    spec: BackboneSpec


class ExportedMethod(nn.Module):
    """A graph that answers as the method did that it was made from.

    Args:
        name, config, levels, spec: of that method and its backbone.
        facts: of the graph.
        runtime: runs it.
    """

    def __init__(
        self,
        name: str,
        config: BaseModel,
        levels: Sequence[str],
        spec: BackboneSpec,
        facts: ExportFacts,
        runtime: Runtime,
    ) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.levels = tuple(levels)
        self.backbone = ExportedBackbone(spec)
        self.facts = facts
        self._graph = runtime

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        """Final map, score, and the folds' scores where the graph has them."""
        return ask(self._graph, pictures, valid)

    def patch_energy(self, pictures: Tensor, valid: Tensor, *_: Any) -> Tensor:
        """Refused: a graph gives no patch energy."""
        self.refuse("gives no patch energies")

    def refuse(self, what: str) -> NoReturn:
        """Raises UsageError: an exported model cannot do this."""
        raise UsageError(
            f"An exported model ({self.facts.format}) {what}.", "Use the model that it was exported from."
        )

    def extra_repr(self) -> str:
        return f"{self.name}, {self.facts.format} {self.facts.precision}"


def ask(graph: Runtime, pictures: Tensor, valid: Tensor) -> Maps:
    """What a graph answers, see `Method.__call__`."""
    found = graph(pictures.cpu().numpy(), valid.cpu().numpy())
    tensors = {name: torch.from_numpy(part).to(pictures.device) for name, part in found.items()}
    return Maps(tensors["anomaly_map"], tensors["score"], tensors.get("remarks"), tensors.get("fold_scores"))


def refuse_unproven(folder: Path, export: Json, trusted: bool) -> None:
    """Refuse an exported model that answers otherwise than its origin, or whose file may run code.

    Args:
        export: what the manifest says of the graph; None: there is none.
        trusted: pt2 is taken.

    Raises:
        ModelFolderError, UsageError: it is refused.
    """
    if not isinstance(export, dict):
        return
    parity = export.get("parity")
    if not isinstance(parity, dict) or parity.get("passed") is not True:
        raise ModelFolderError(
            f"The exported model {folder} did not pass its parity check, see {PARITY} there.",
            "Use the model that it was exported from, or export it with another precision.",
        )
    if export.get("format") == "pt2" and not trusted:
        raise UsageError(
            f"The exported model {folder} is a pt2 file, and torch may execute what such a file holds.",
            "Export it as onnx or openvino, or load it with Detector.load(folder, trusted=True).",
        )
