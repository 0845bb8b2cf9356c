"""What is learnt from good pictures for a refinement, one picture on its way, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fettle.refine.energy import Box
from fettle.refine.record import GateReason, RefineRecord, State
from fettle.refine.references import References
from fettle.refine.roi import Roi

_NOWHERE = Box(0, 0, 0, 0)


class GoodFacts(NamedTuple):
    """What a refinement knows of good pictures.

    Attributes:
        roi_high: 90 % quantile, over good pictures, of a picture's largest settled patch energy.
        peak: where the refined map's two halves meet, in the base map's unit, above 0: 4 times the 99.9 %
            quantile of good pixels' base map.
        hold: what the base map is held down to where the mask of a refined region says good: the pixel
            threshold.
        noise_floor: tau, the difference that fills of good pictures have; None: not measured.
        references: good pictures in the frame; None: fills are by diffusion.
        flat: the scale of the patch energy means nothing, because good patches' energies are all alike.
    """

    roi_high: float
    peak: float
    hold: float
    noise_floor: float | None = None
    references: References | None = None
    flat: bool = False


class Refined(NamedTuple):
    """One picture's answer.

    Attributes:
        anomaly_map: (H, W), in the base map's unit; the base map itself where nothing was applied.
        soft: (H, W) in 0..1: the mask is where it is above a half; None where nothing was applied.
        speaks: (H, W) bool: where the mask decides instead of the base map's threshold; None as above.
        record: what was done.
    """

    anomaly_map: Tensor
    soft: Tensor | None
    speaks: Tensor | None
    record: RefineRecord


@dataclass
class Case:
    """One picture, or tile of one, on its way: what is known of it so far."""

    view: Tensor  # (3, H, W)
    valid: Tensor  # (H, W)
    base: Tensor  # (H, W)
    energy: Tensor = field(default_factory=lambda: torch.empty(0))  # settled patch energy, (h, w)
    roi: Roi | None = None
    box: Box = _NOWHERE
    state: State | None = None
    told: dict[str, object] = field(default_factory=dict)  # fields of the record
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seconds_fill: float = 0.0
    picture: int = 0  # which it is of, or a tile of
    time_cap_s: float = 0.0  # of its iterations
    result: tuple[Tensor, Tensor, Tensor] | None = None  # map, soft, speaks

    def end(self, state: State, gate_reason: GateReason | None = None, error: str = "") -> None:
        self.state = state
        self.told |= {"gate_reason": gate_reason, "error": error}

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def window(self) -> tuple[Tensor, Tensor, Tensor]:
        """Picture (3, h, w), regions (h, w) and valid (h, w) of the window."""
        assert self.roi is not None
        place = self.box.window
        roi = torch.from_numpy(self.roi.mask[place]).to(self.view.device)
        return self.view[:, *place], roi, self.valid[place]

    def refined(self) -> Refined:
        record = RefineRecord.model_validate(
            {
                **self.told,
                "refined": self.state,
                "applied": self.result is not None,
                "seconds": self.seconds,
                "seconds_fill": self.seconds_fill,
                "notes": tuple(self.notes),
            }
        )
        if self.result is None:
            return Refined(self.base, None, None, record)
        return Refined(*self.result, record)
