"""Whether a mask may stand: it explains the energy, shows, and does not break (section 8)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fettle.layers.pixel_map import valid_tokens
from fettle.refine.energy import WindowEnergy, in_parts
from fettle.refine.record import ComponentRecord, finite
from fettle.refine.roi import Roi, widened
from fettle.refine.sharing import blurred

MAX_RHO = 0.6  # share of the energy that may be left when the mask is replaced
MAX_BLUR = 0.3  # share that may be left under a blur
MAX_NOISE = 0.5  # share that may be left under noise
_BLUR_SIGMA = 1.0  # px
_NOISE = 0.02
_NOISE_SEED = 0
_LEAST_VISIBLE = 4 / 255


class Checked(NamedTuple):
    """A component's record, and whether its mask explains the energy whatever the other checks say."""

    record: ComponentRecord
    sufficient: bool


@torch.no_grad()
def check_components(
    picture: Tensor,
    restored: Tensor | None,
    mask: Tensor,
    difference: Tensor,
    roi: Roi,
    energy: WindowEnergy,
    *,
    noise_floor: float,
    above_fill: bool,
    around: float,
    batch: int,
) -> list[Checked]:
    """The checks of each component of the regions.

    Args:
        picture: X (3, H, W). difference: D. mask: M (H, W) bool.
        restored: N of the free form (3, H, W), which must also hold under a blur and noise. In the mask form,
            None, N is X - M D: a mixture of two pictures hides nothing.
        roi: of the window.
        energy: of this window. batch: windows to compute at once.
        noise_floor: tau.
        above_fill: rho is the share of the energy above the fill's that is left.
        around: px of a component's surroundings whose patches count.
    """
    labels = torch.from_numpy(roi.labels).to(mask.device)
    parts = [mask & (labels == label) for label in range(1, roi.num_components + 1)]
    good = picture - difference
    versions = [picture, good, *(picture - part * difference for part in parts)]
    if restored is not None:
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(_NOISE_SEED)) * _NOISE
        probed = torch.stack([picture, restored, good])
        versions += [*blurred(probed, _BLUR_SIGMA), *(probed + noise.to(picture)).clamp(0, 1)]
    excess = in_parts(energy, torch.stack(versions), batch)
    least_visible = max(noise_floor / 4, _LEAST_VISIBLE)
    change_size = (mask * difference if restored is None else picture - restored).norm(dim=0)
    checked = []
    for i, part in enumerate(parts):
        near = torch.from_numpy(widened(roi.labels == i + 1, around)).to(mask.device)
        patches = valid_tokens(near[None, None], (excess.shape[-2], excess.shape[-1]))[0]
        own = excess[:, patches].sum(dim=1).tolist()
        floor = own[1] if above_fill else 0.0
        before, left = own[0] - floor, own[2 + i] - floor
        rho = left / before if before > 0 else 1.0
        sufficient = bool(part.any()) and rho <= MAX_RHO
        if not sufficient:
            checked.append(Checked(_record(False, part, rho), False))
            continue
        visibility = float(change_size[part].quantile(0.95))
        accepted, probes = visibility >= least_visible, own[2 + len(parts) :]
        shares = [_left(*probes[:3]), _left(*probes[3:])] if probes else []
        accepted &= all(share <= most for share, most in zip(shares, (MAX_BLUR, MAX_NOISE), strict=False))
        checked.append(Checked(_record(accepted, part, rho, visibility, *shares), True))
    return checked


def _left(before: float, restored: float, good: float) -> float:
    """Share of what a probe shows of the defect that it still shows of the restored picture.

    A probe raises energies where all is good too: what it shows of the filled picture is taken off. Where it
    shows nothing of the defect, nothing is left.
    """
    return max(restored - good, 0.0) / (before - good) if before > good else 0.0


def _record(accepted: bool, part: Tensor, *measured: float) -> ComponentRecord:
    names = ("rho", "visibility", "blur", "noise")
    values = {name: finite(value) for name, value in zip(names, measured, strict=False)}
    return ComponentRecord(accepted=accepted, pixels=int(part.sum()), **values)
