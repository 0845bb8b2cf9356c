"""What became of one picture in a refinement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from fettle.errors import FettleError
from fettle.protocols import Json

State = Literal["yes", "accepted_part", "empty_roi", "gate", "time_cap", "adversarial", "error"]
NOT_FINITE = "The patch energy of this picture is NaN or infinite."
MaskSource = Literal["solver", "difference", "solver_snap", "difference_snap"]
GateReason = Literal[
    "verdict_ok",
    "no_gradient",
    "flat_energy",
    "energy_below_hinge",
    "roi_too_large",
    "fill_not_normal",
    "insufficient",
]


class ComponentRecord(BaseModel):
    """The checks of one connected region.

    Attributes:
        accepted: passed all of them.
        pixels: size of its mask, framed px.
        rho: share of its energy that is left when its mask is replaced by the fill.
        visibility: 95 % quantile of the change ||X - N|| on its mask.
        blur, noise: share of the defect's energy, above that of the fill, which the restored picture still
            shows when all three are blurred, or noise is added to them.

    None: not measured, because an earlier check had failed or checks are off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted: bool
    pixels: int
    rho: FiniteFloat | None = None
    visibility: FiniteFloat | None = None
    blur: FiniteFloat | None = None
    noise: FiniteFloat | None = None


class RefineRecord(BaseModel):
    """One picture's refinement. JSON-safe: no number in it is NaN or infinite; None: not reached.

    Attributes:
        refined: the state. "yes": every region passed its checks; "accepted_part": some did; "empty_roi":
            nothing to refine; "gate": refused, see `gate_reason`; "time_cap": the time ended the
            iterations; "adversarial": the energy fell by an invisible or fragile change; "error".
        applied: the refined map is in use; otherwise the base map is, bit for bit.
        fill: "exemplar", "diffusion" or "mean".
        mask: where the chosen mask comes from: what the solver found, the plain difference to the fill, or
            what colour models made of one of them.
        crop: (top, left, side) of the window that was optimised, framed px; False: the whole picture.
        roi_pixels: of all regions, framed px.
        iterations: made. stop: why no more were.
        objective_before: of nothing removed, 1 by definition. objective_start: of all regions replaced.
        objective_after: the least one met; with `iters` 0, that of the start.
        energy_before, energy_after, energy_fill: of the picture, of the restored picture, of the fill.
        noise_floor: tau, the difference to a fill that good pictures have.
        seconds, seconds_fill: wall time, this picture's share of its batch; of the fill alone.
        error: one sentence. notes: what else a user should know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    refined: State
    gate_reason: GateReason | None = None
    applied: bool = False
    form: Literal["mask", "free"] = "mask"
    fill: str | None = None
    mask: MaskSource | None = None
    crop: tuple[int, int, int] | Literal[False] = False
    roi_pixels: int = 0
    components: tuple[ComponentRecord, ...] = ()
    iterations: int = 0
    stop: Literal["converged", "max_iter", "time_cap"] | None = None
    objective_before: FiniteFloat | None = None
    objective_start: FiniteFloat | None = None
    objective_after: FiniteFloat | None = None
    energy_before: FiniteFloat | None = None
    energy_after: FiniteFloat | None = None
    energy_fill: FiniteFloat | None = None
    noise_floor: FiniteFloat | None = None
    seconds: FiniteFloat = 0.0
    seconds_fill: FiniteFloat = 0.0
    error: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Json]:
        """Plain facts by name."""
        return self.model_dump(mode="json")


_REFUSED: tuple[State, ...] = ("error", "time_cap", "adversarial", "gate", "empty_roi")  # what is told first


def joined(records: Sequence[RefineRecord]) -> RefineRecord:
    """One record of a picture in tiles, from those of its tiles, the strangest tile first.

    "yes": all tiles that have a region were refined whole; "accepted_part": some of them, or in part;
    "time_cap": besides, the time ended the iterations of one. Where none was refined, the first of error,
    time_cap, adversarial, gate and empty_roi that one has; a gate for want of any energy comes last. Pixels,
    components, iterations and seconds are of all tiles, the rest of the first tile that was refined, or is in
    the state told.
    """
    if len(records) == 1:
        return records[0]
    applied = [record for record in records if record.applied]
    if applied:
        first = applied[0]
        states = {record.refined for record in records if not _has_no_region(record)}
        state: State = "yes" if states == {"yes"} else "accepted_part"
        if "time_cap" in states:
            state = "time_cap"
    else:
        first = min(records, key=_place_among_refused)
        state = first.refined
    notes = [note for record in records for note in (*record.notes, record.error) if note]
    if applied:
        notes.append(f"{len(applied)} of {len(records)} tiles were refined.")
    return first.model_copy(
        update={
            "refined": state,
            "roi_pixels": sum(record.roi_pixels for record in records),
            "components": tuple(part for record in records for part in record.components),
            "iterations": sum(record.iterations for record in records),
            "seconds": sum(record.seconds for record in records),
            "seconds_fill": sum(record.seconds_fill for record in records),
            "notes": tuple(dict.fromkeys(notes)),
        }
    )


def _has_no_region(record: RefineRecord) -> bool:
    return record.refined == "empty_roi" or record.gate_reason == "energy_below_hinge"


def _place_among_refused(record: RefineRecord) -> int:
    quiet = record.gate_reason == "energy_below_hinge"
    return len(_REFUSED) if quiet else _REFUSED.index(record.refined)


def in_one_line(error: Exception) -> str:
    """What went wrong."""
    if isinstance(error, FettleError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no words with it'}."


def finite(value: float) -> float | None:
    """The number, or None where it is none that JSON knows."""
    return value if math.isfinite(value) else None
