"""From a solved window to a picture's answer: read-out, acceptance, state and map (sections 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fettle.refine.acceptance import Checked, check_components
from fettle.refine.case import Case, GoodFacts
from fettle.refine.energy import WindowEnergy
from fettle.refine.grabcut import have_opencv
from fettle.refine.readout import choose_mask, cleaned, read_out, refined_map, refined_share, snapped
from fettle.refine.record import ComponentRecord, GateReason, MaskSource, State, finite
from fettle.refine.roi import Roi, widened
from fettle.refine.settings import F2PADConfig, Lengths
from fettle.refine.solver import Problem, Solution

_SNAPPED: dict[MaskSource, MaskSource] = {"solver": "solver_snap", "difference": "difference_snap"}
_LOWERED = 0.6  # share of energy that N leaves: below it the solver has made the picture look good


class _Mask(NamedTuple):
    """A window's mask M and its read-out r, (h, w), and where it comes from."""

    mask: Tensor
    soft: Tensor
    source: MaskSource


@torch.no_grad()
def finish(
    case: Case,
    problem: Problem,
    energy: WindowEnergy,
    solution: Solution,
    config: F2PADConfig,
    lengths: Lengths,
    *,
    noise_floor: float,
    facts: GoodFacts,
    batch: int,
) -> None:
    """End a case.

    Args:
        problem, energy: of this window alone.
        noise_floor: tau. batch: windows to compute at once.
    """
    assert case.roi is not None
    place = case.box.window
    roi = Roi(case.roi.mask[place], case.roi.labels[place], case.roi.num_components)
    chosen = _mask(case, problem, energy, solution, config, lengths, noise_floor, batch)
    if config.acceptance:
        checked = check_components(
            problem.picture[0],
            problem.restored(solution.unknown[None])[0] if config.form == "free" else None,
            chosen.mask,
            problem.difference[0],
            roi,
            energy,
            noise_floor=noise_floor,
            above_fill=config.floor == "fill",
            around=lengths.around,
            batch=batch,
        )
    else:
        checked = _unchecked(chosen.mask, roi)
    case.told |= {
        "components": tuple(check.record for check in checked),
        "mask": chosen.source,
        "iterations": solution.iterations,
        "stop": solution.stop,
        "objective_before": 1.0,
        "objective_start": finite(solution.objective_start),
        "objective_after": finite(solution.objective),
        "energy_after": finite(solution.energy),
    }
    left = float(problem.share(problem.before.new_tensor([solution.energy])))
    case.end(*_state(solution, checked, left))
    accepted = [number for number, check in enumerate(checked, 1) if check.record.accepted]
    if accepted:
        _compose(case, chosen, accepted, facts, lengths.around)


def _mask(
    case: Case,
    problem: Problem,
    energy: WindowEnergy,
    solution: Solution,
    config: F2PADConfig,
    lengths: Lengths,
    noise_floor: float,
    batch: int,
) -> _Mask:
    """The candidate with the least objective, cleaned up: read-outs of what the solver found and of the plain
    difference to the fill, and what colour models make of each."""
    picture, roi, valid = case.window()
    unknowns: dict[MaskSource, Tensor] = {"solver": solution.unknown}
    if config.judge and config.iters:
        full = problem.difference[0] if config.form == "free" else problem.roi[0]
        unknowns["difference"] = full
    candidates: list[_Mask] = []
    snaps: list[_Mask] = []
    for source, unknown in unknowns.items():
        reads = [
            read_out(
                picture,
                roi,
                problem.difference[0],
                unknown,
                valid,
                cut=level * noise_floor,
                config=config,
                lengths=lengths,
            )
            for level in (config.levels if config.judge else config.levels[:1])
        ]
        candidates += [_Mask(read.mask, read.soft, source) for read in reads]
        read = reads[0]
        if config.snap != "off" and have_opencv():
            seeds = read.difference > config.levels[0] * noise_floor
            snap = snapped(picture, roi, seeds, lengths.margin)
            if snap is not None:
                snaps.append(_Mask(snap, read.soft, _SNAPPED[source]))
    candidates = snaps if config.snap == "always" and snaps else candidates + snaps
    best = candidates[0]
    candidates = [one for one in candidates if bool(one.mask.any())]  # an empty mask refines nothing
    if len(candidates) == 1:
        best = candidates[0]
    elif candidates:
        weight = config.lambda1 if config.choice_lambda is None else config.choice_lambda
        best = candidates[choose_mask([one.mask for one in candidates], problem, energy, weight, batch)]
    pixels = cleaned(best.mask.cpu().numpy(), roi.cpu().numpy(), lengths)
    return best._replace(mask=torch.from_numpy(pixels).to(roi.device))


def _unchecked(mask: Tensor, roi: Roi) -> list[Checked]:
    """Every component accepted."""
    counts = np.bincount(roi.labels[mask.cpu().numpy()], minlength=roi.num_components + 1)
    return [Checked(ComponentRecord(accepted=True, pixels=int(count)), True) for count in counts[1:]]


def _state(solution: Solution, checked: Sequence[Checked], left: float) -> tuple[State, GateReason | None]:
    """The state of a solved picture (section 8). `left` is the share of energy that N leaves."""
    accepted = [check.record.accepted for check in checked]
    if solution.stop == "time_cap":
        return "time_cap", None
    if all(accepted):
        return "yes", None
    if any(accepted):
        return "accepted_part", None
    if left <= _LOWERED and any(check.sufficient for check in checked):
        return "adversarial", None
    return "gate", "insufficient"


def _compose(case: Case, chosen: _Mask, accepted: Sequence[int], facts: GoodFacts, around: float) -> None:
    """The frame's map, read-out and where they count (7.6)."""
    assert case.roi is not None
    passed = np.isin(case.roi.labels, accepted)
    place = case.box.window
    device = chosen.mask.device
    inside = torch.from_numpy(passed[place]).to(device)
    share = torch.zeros_like(case.base, dtype=torch.float32)
    share[place] = refined_share(chosen.soft, chosen.mask & inside, inside)
    whole = torch.from_numpy(passed).to(device)
    rejected = widened(case.roi.mask & ~passed, around)
    speaks = torch.from_numpy(~rejected | passed).to(device)
    refined = refined_map(case.base, share, whole, peak=facts.peak, hold=facts.hold)
    case.result = (refined, share, speaks)
