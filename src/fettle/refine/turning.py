"""Where a good picture shows the surroundings of a region turned, and between its pixels.

Parts come in any pose, and a window of whole pixels leaves a difference along every edge. So places are
looked for on small pictures at angles all around, and the best are followed by Gauss-Newton steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.refine.search import Window, window_sums

if TYPE_CHECKING:
    from fettle.refine.references import References

_ANGLES = sorted(range(-165, 181, 15), key=abs)  # degrees, those near 0 first
_FOUND, _KEPT = 12, 4  # places: of the search, and of those once they were followed on small pictures
_STEPS = 8  # of Gauss-Newton
_DAMPING = 1e-3  # share of the mean curvature: along a straight edge nothing else holds a place
_CLEARLY = 0.9  # share that the difference must fall to
_FAR = math.cos(math.radians(30))  # of turns that need a better reason
_FAR_COUNTS = 1.2  # factor of their difference
_ROUNDING = 3 / 255**2  # squared difference of colours that is as good as none


class Place(NamedTuple):
    """Where a reference shows a region and its surroundings.

    Attributes:
        reference: its number.
        motion: (3, 3), a turn and a shift, from offsets (x, y, 1) from the centre of the surroundings' box to
            places (x, y, 1) in the reference, px.
    """

    reference: int
    motion: Tensor

    @property
    def turn(self) -> float:
        """Degrees, from x towards y, by which the reference shows the surroundings turned."""
        return math.degrees(math.atan2(float(self.motion[1, 0]), float(self.motion[0, 0])))

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of a box of this size with the same centre, not turned, px."""
        x, y = self.motion[:2, 2].tolist()
        return round(y - (height - 1) / 2), round(x - (width - 1) / 2)

    def shown_by(self, references: References, height: int, width: int) -> Tensor:
        """What the reference shows in a box of this size, (3, height, width) in 0..1.

        Bicubic: between pixels, bilinear sampling would take a good part of a surface's grain away.
        """
        offsets = _offsets(torch.ones(height, width, dtype=torch.bool, device=self.motion.device))
        pixels = references.pixels[self.reference][None].to(self.motion.dtype) / 255
        return _sampled(pixels, (self.motion @ offsets)[None], mode="bicubic").reshape(3, height, width)


class Surroundings(NamedTuple):
    """What is compared.

    Attributes:
        own: (3, h, w) in 0..1, the box of a region and its ring. ring: (h, w) bool, the pixels compared.
        used: (h, w) bool, those that a reference must have room for: region and ring.
    """

    own: Tensor
    ring: Tensor
    used: Tensor


def closer_place(
    around: Surroundings,
    references: References,
    window: Window,
    *,
    scale: int,
    left_out: Collection[int] = (),
) -> Place | None:
    """A place that fits clearly better than a window of whole pixels does; None: there is none.

    What must fall by 10 % is the mean squared difference on the ring, less the mean difference of each
    colour: first by a motion of the window itself, and from there by another place. Between pixels grain is
    smoother, and so differs less by chance alone. Turned by more than 30 degrees it must fall by 25 %, since
    a turn that fits round surroundings may be wrong inside.

    Args:
        window: the best window.
        scale: px a cell of the small pictures on which turned places are looked for.
        left_out: numbers of references that must not be used.
    """
    height, width = around.ring.shape
    scale = min(scale, *references.size)
    at = torch.tensor([[window.left + (width - 1) / 2], [window.top + (height - 1) / 2], [0.0]])
    straight = _motion(*at.to(around.own))
    before = _costs(around, references, [window.reference], straight)[0]
    if before <= _ROUNDING:
        return None
    numbers, motions = _turned_places(around, references, scale, left_out)
    if numbers and scale > 3:
        motions, costs = _followed(around, references, numbers, motions, scale // 2)
        order = costs.argsort(stable=True)
        numbers, motions = [numbers[i] for i in order.tolist()], motions[order]
    numbers = [window.reference, *numbers[:_KEPT]]
    motions, _ = _followed(around, references, numbers, torch.cat([straight, motions[:_KEPT]]), 1)
    moved, *others = _costs(around, references, numbers, motions)
    cosines = motions[1:, 0, 0].tolist()
    others = [c * _FAR_COUNTS if cos < _FAR else c for c, cos in zip(others, cosines, strict=True)]
    chosen = 0 if moved <= _CLEARLY * before else None
    best = min(others, default=math.inf)
    if best <= _CLEARLY * (before if chosen is None else moved):
        chosen = 1 + others.index(best)
    return None if chosen is None else Place(numbers[chosen], motions[chosen])


def _turned_places(
    around: Surroundings, references: References, scale: int, left_out: Collection[int]
) -> tuple[list[int], Tensor]:
    """Numbers of references and motions (n, 3, 3): the best few of each one's best place at each angle."""
    small = references.smaller(scale)
    values, weight = _pooled(around.own, around.ring, scale)
    _, used = _pooled(around.own, around.used, scale)
    layers = torch.cat([(values - 0.5) * weight, weight[None], used[None]])
    costs, motions = [], []
    for angle in _ANGLES:
        turned = _turned(layers, around.ring.shape, scale, math.radians(angle))  # (5, h, w)
        filled = (turned[4] > 1e-3 * turned[4].max()).nonzero()
        (top, left), (bottom, right) = filled.amin(0).tolist(), (filled.amax(0) + 1).tolist()
        centred, share = turned[:3, top:bottom, left:right], turned[3, top:bottom, left:right]
        sums = [part for _, part in window_sums(centred, share, small)]
        if not sums:
            continue
        least, places = torch.cat(sums).min(dim=1)
        energy = (centred.square().sum(dim=0) / share.clamp_min(1e-6)).sum()
        costs.append((least + energy) / share.sum())
        columns = small.size[1] - share.shape[1] + 1
        x = (places % columns - left + turned.shape[2] / 2) * scale - 0.5
        y = (places // columns - top + turned.shape[1] / 2) * scale - 0.5
        motions.append(_motion(x, y, torch.full_like(x, math.radians(angle))))
    if not costs:
        return [], around.own.new_zeros(0, 3, 3)
    by_angle = torch.stack(costs)  # (angles, R)
    by_angle[:, list(left_out)] = math.inf
    flat = by_angle.flatten()
    order = flat.argsort(stable=True)[:_FOUND]
    order = order[flat[order].isfinite()]
    return [i % by_angle.shape[1] for i in order.tolist()], torch.cat(motions)[order]


def _turned(layers: Tensor, size: torch.Size, scale: int, turn: float) -> Tensor:
    """Small pictures (C, h, w) of a box of `size` px, as they look turned: (C, h', w'), centre on centre."""
    cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
    height, width = layers.shape[1:]
    rows, columns = math.ceil(height * cos + width * sin) + 1, math.ceil(width * cos + height * sin) + 1
    offsets = _offsets(torch.ones(rows, columns, dtype=torch.bool, device=layers.device), scale)
    back = _motion(*torch.tensor([[(size[1] - 1) / 2], [(size[0] - 1) / 2], [-turn]]).to(layers))
    return _sampled(layers[None], back @ offsets, scale, padding="zeros").reshape(-1, rows, columns)


def _followed(
    around: Surroundings, references: References, numbers: list[int], motions: Tensor, scale: int
) -> tuple[Tensor, Tensor]:
    """Motions (n, 3, 3) after Gauss-Newton steps of a turn and a shift, and their mean squared differences.

    The steps move the own picture (inverse compositional: Baker and Matthews, Lucas-Kanade 20 years on,
    2004), so that its slopes serve all places and steps. Of each place the best step is kept.
    """
    pixels = references.smaller(scale).pixels[numbers].to(around.own.dtype) / 255
    values, weight = _pooled(around.own, around.ring, scale)
    known = weight > 0.5 * weight.max()
    offsets = _offsets(known, scale, around.ring.shape)
    target, weight = values[:, known], weight[known]
    x_slope, y_slope = _slopes(values, known)[..., known] / scale  # (3, P)
    reach = offsets[:2].abs().max().clamp_min(1)
    slopes = torch.stack([x_slope, y_slope, (y_slope * offsets[0] - x_slope * offsets[1]) / reach])
    slopes = _less_mean(slopes, weight)
    weighted = (slopes * weight).flatten(1)  # (3, 3 P), by unknown
    curvature = weighted @ slopes.flatten(1).T
    damping = (_DAMPING * curvature.diagonal().mean() + 1e-12) * torch.eye(3).to(curvature)
    solve = torch.linalg.inv(curvature + damping) @ weighted
    kept, least = motions, torch.full_like(motions[:, 0, 0], math.inf)
    for step in range(_STEPS + 1):
        off = _less_mean(_sampled(pixels, motions @ offsets, scale) - target, weight)  # (n, 3, P)
        costs = (off.square().sum(dim=1) * weight).sum(dim=1) / weight.sum()
        better = costs < least
        kept, least = torch.where(better[:, None, None], motions, kept), torch.where(better, costs, least)
        if step < _STEPS:
            x, y, turn = (off.flatten(1) @ solve.T).unbind(1)
            motions = motions @ torch.linalg.inv(_motion(x, y, turn / reach))
    return kept, least


def _costs(around: Surroundings, references: References, numbers: list[int], motions: Tensor) -> list[float]:
    """Mean squared differences on the ring; infinite where a reference has no room."""
    pixels = references.pixels[numbers].to(around.own.dtype) / 255
    at_ring = motions @ _offsets(around.ring)
    off = _sampled(pixels, at_ring, mode="bicubic") - around.own[:, around.ring]
    off = _less_mean(off, torch.ones_like(off[0, 0]))
    at_used = motions @ _offsets(around.used)
    height, width = references.size
    last = torch.tensor([width, height]).to(at_used)[:, None] - 0.5
    room = ((at_used[:, :2] >= -0.5) & (at_used[:, :2] <= last)).flatten(1).all(dim=1)
    if not references.all_valid:
        blank = (~references.valid[numbers]).to(off.dtype)
        room &= (_sampled(blank, at_used)[:, 0] < 1e-3).all(dim=1)
    costs: list[float] = off.square().sum(dim=1).mean(dim=1).masked_fill(~room, math.inf).tolist()
    return costs


def _less_mean(values: Tensor, weight: Tensor) -> Tensor:
    """(n, 3, P) less its weighted mean over the places: of the light, which is carried over afterwards."""
    return values - (values * weight).sum(dim=2, keepdim=True) / weight.sum()


def _motion(x: Tensor, y: Tensor, turn: Tensor) -> Tensor:
    """(n, 3, 3): a turn, rad, from x towards y, and then a shift, px."""
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    rows = [cos, -sin, x, sin, cos, y, zero, zero, zero + 1]
    return torch.stack(rows, dim=1).reshape(-1, 3, 3)


def _offsets(where: Tensor, scale: int = 1, size: torch.Size | None = None) -> Tensor:
    """(3, P): x, y, 1 of the true cells (h, w), px from the centre of their box; float32.

    Args:
        scale: px a cell. size: height and width of the box, px; by default that of all cells.
    """
    height, width = (side * scale for side in where.shape) if size is None else size
    y, x = ((where.nonzero().T + 0.5) * scale).unbind(0)
    return torch.stack([x - width / 2, y - height / 2, torch.ones_like(x)])


def _sampled(
    pixels: Tensor, places: Tensor, scale: int = 1, *, mode: str = "bilinear", padding: str = "border"
) -> Tensor:
    """Pictures (n, C, h, w), of `scale` px a cell, at places (n, 3, P) in px: (n, C, P)."""
    height, width = pixels.shape[2:]
    sides = torch.tensor([width * scale, height * scale]).to(places)[:, None]
    grid = (2 * places[:, :2] + 1) / sides - 1
    return F.grid_sample(pixels, grid.mT[:, :, None], mode, padding, align_corners=False)[..., 0]


def _pooled(own: Tensor, known: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Means over each cell's known pixels, (3, h', w'), and their share of the cell, (h', w')."""
    weight = known.to(own.dtype)
    room = (0, -weight.shape[1] % scale, 0, -weight.shape[0] % scale)
    share = F.avg_pool2d(F.pad(weight[None], room), scale)
    return F.avg_pool2d(F.pad(own * weight, room), scale) / share.clamp_min(1e-6), share[0]


def _slopes(values: Tensor, known: Tensor) -> Tensor:
    """(2, 3, h, w): along x and along y, a cell; 0 where a neighbour is not known."""
    padded, inside = F.pad(values, (1, 1, 1, 1)), F.pad(known, (1, 1, 1, 1))
    along_x = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2 * (inside[1:-1, 2:] & inside[1:-1, :-2])
    along_y = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2 * (inside[2:, 1:-1] & inside[:-2, 1:-1])
    return torch.stack([along_x, along_y])
