"""F2PAD as specified by Fettle after Tao, Xu, Du (arXiv 2407.06519): from a feature-level map to pixels.

For each picture an optimisation at inspection finds the smallest part whose replacement by good surface makes
the method find the picture good. Nothing is trained. Sections named in comments are those of the refiner's
specification.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fettle.errors import UsageError
from fettle.layers.pixel_map import pixel_map, valid_tokens
from fettle.protocols import Method
from fettle.refine.case import Case, GoodFacts, Refined
from fettle.refine.energy import Box, WindowEnergy, crop_step, hinged, patch_energies
from fettle.refine.filling import fill_window, usable_references
from fettle.refine.finish import finish
from fettle.refine.grabcut import have_opencv
from fettle.refine.record import NOT_FINITE, finite, in_one_line
from fettle.refine.roi import Roi, crop_box, find_roi, of_mask, widened
from fettle.refine.settings import F2PADConfig, Lengths
from fettle.refine.solver import Problem, solve

__all__ = ["GoodFacts", "Refined", "refine_f2pad"]

_CROP_TOLERANCE = 0.1  # median difference of patch energies between crop and frame
_MOST_REL = 0.9  # share of a component's peak that a region is cut at
_MAX_FILL_ENERGY = 0.9  # E(F) / E(X)
_DEFAULT_NOISE_FLOOR = 16 / 255  # with it the least visible change is the same as by its other bound


def refine_f2pad(
    method: Method,
    views: Tensor,
    valid: Tensor,
    base_maps: Tensor,
    facts: GoodFacts,
    config: F2PADConfig,
    *,
    chosen: Sequence[bool],
    pictures: Sequence[int] | None = None,
) -> list[Refined]:
    """Refine maps of framed pictures. Scores and verdicts are not touched: this says where, not whether.

    Whatever goes wrong with a picture is its record's, and its base map stands.

    Args:
        views: (B, 3, H, W) in 0..1. valid: (B, 1, H, W) bool. base_maps: (B, H, W), the method's own.
        chosen: which pictures to refine; the others get the state "gate", reason "verdict_ok".
        pictures: numbers of the pictures that views are tiles of: such tiles share one picture's time cap.
            None: each view is a picture.

    Raises:
        UsageError: `snap` is "always" and OpenCV is not installed, or numbers of pictures differ.
    """
    if not len(views) == len(valid) == len(base_maps) == len(chosen):
        raise UsageError("Views, valid, maps and chosen differ in number.", "Give one of each per picture.")
    if config.snap == "always" and not have_opencv():
        raise UsageError("snap=always needs OpenCV, which is not installed.", "pip install 'fettle[refine]'.")
    with torch.inference_mode(False), torch.enable_grad(), _frozen(method):
        cases = [
            Case(view.detach().clone().float(), inside[0].clone(), base.detach().clone())
            for view, inside, base in zip(views, valid, base_maps, strict=True)
        ]
        numbers = range(len(cases)) if pictures is None else pictures
        for case, wanted, number in zip(cases, chosen, numbers, strict=True):
            case.picture = number
            if not wanted:
                case.end("gate", "verdict_ok")
            elif facts.flat:
                case.end("gate", "flat_energy")
        _Refinement(method, facts, config, tuple(views.shape[-2:]), views.device).run(cases)
        return [case.refined() for case in cases]


@contextmanager
def _frozen(method: Method) -> Iterator[None]:
    """Nothing of the method asks for a gradient: the picture alone does."""
    parameters = method.parameters() if isinstance(method, nn.Module) else ()
    asking = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class _Refinement:
    """The pipeline of section 5 with its fixed surroundings."""

    def __init__(
        self,
        method: Method,
        facts: GoodFacts,
        config: F2PADConfig,
        frame: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.method = method
        self.facts = facts
        self.config = config
        self.frame = (frame[0], frame[1])
        self.whole = Box(0, 0, *self.frame)
        self.device = device
        self.lengths = Lengths(config, *self.frame)
        self.step = crop_step(method)
        usable = usable_references(facts.references, config)
        self.references = None if usable is None else usable.to(device)
        self.noise_floor = _DEFAULT_NOISE_FLOOR if facts.noise_floor is None else facts.noise_floor

    def run(self, cases: list[Case]) -> None:
        for case in cases:
            case.told["form"] = self.config.form
        self._each(cases, self._look)
        self._each(cases, self._check_crop)
        tiles = Counter(case.picture for case in cases if case.state is None)
        for case in cases:
            case.time_cap_s = self.config.time_cap_s / max(tiles[case.picture], 1)
        self._each(cases, self._optimise)

    def _each(self, cases: Sequence[Case], work: Callable[[list[Case]], None]) -> None:
        """Work on the open cases, those of one window size together; what fails is tried picture by picture,
        so that nobody suffers from a batch mate."""
        for batch in self._batches([case for case in cases if case.state is None]):
            start = time.perf_counter()
            try:
                work(batch)
            except Exception as failure:
                for case in batch:
                    self._alone(case, work, failure if len(batch) == 1 else None)
            for case in batch:
                case.seconds += (time.perf_counter() - start) / len(batch)

    @staticmethod
    def _alone(case: Case, work: Callable[[list[Case]], None], failure: Exception | None) -> None:
        try:
            if failure is not None:
                raise failure
            case.state = None
            work([case])
        except Exception as error:
            case.result = None
            case.end("error", error=in_one_line(error))

    def _batches(self, cases: list[Case]) -> Iterator[list[Case]]:
        """By window size, as many as fit the caches (section 9)."""

        def size(case: Case) -> tuple[int, int]:
            return (case.box.height or self.frame[0], case.box.width or self.frame[1])

        for (height, width), same in groupby(sorted(cases, key=size), key=size):
            together, count = list(same), self._batch_size(height, width)
            for start in range(0, len(together), count):
                yield together[start : start + count]

    def _batch_size(self, height: int, width: int) -> int:
        most = 8 if self.device.type == "cpu" else 64
        return min(max(most * 128 * 128 // (height * width), 1), most)

    def _look(self, cases: list[Case]) -> None:
        """Gates that need the whole picture, and its regions (5.1)."""
        views = torch.stack([case.view for case in cases]).requires_grad_()
        valid = torch.stack([case.valid for case in cases])[:, None]
        with_gradient = patch_energies(self.method, views, valid)
        energies = with_gradient.detach()
        tokens = valid_tokens(valid, (energies.shape[-2], energies.shape[-1]))
        pixels = pixel_map(energies, valid, 0).cpu().numpy()
        for case, energy, inside, pixel in zip(cases, energies, tokens, pixels, strict=True):
            case.energy = energy
            case.told["noise_floor"] = finite(self.noise_floor)
            if self.facts.noise_floor is None:
                case.note("The difference of good fills was never measured: a default stands in for it.")
            if not bool(energy[inside].isfinite().all()):
                case.end("error", error=NOT_FINITE)
            elif not with_gradient.requires_grad:
                case.end("gate", "no_gradient")
            elif float(hinged(energy[inside], self.config.kappa).sum()) <= 0:
                case.end("gate", "energy_below_hinge")
            else:
                self._find_roi(case, pixel)

    def _find_roi(self, case: Case, pixel: NDArray[np.float32]) -> None:
        config, valid = self.config, case.valid.cpu().numpy()
        case.roi = of_mask(valid)
        most = config.max_roi_share * valid.sum()
        for rel in (config.roi_rel, 2 * config.roi_rel, 4 * config.roi_rel) if config.roi else ():
            case.roi = find_roi(
                pixel,
                valid,
                high=self.facts.roi_high,
                low=config.roi_low,
                rel=min(rel, _MOST_REL),
                dilate=self.lengths.dilate,
            )
            if case.roi.mask.sum() <= most:
                break
        num_pixels = int(case.roi.mask.sum())
        case.told["roi_pixels"] = num_pixels
        if not num_pixels:
            case.end("empty_roi")
        elif config.roi and num_pixels > most:
            case.end("gate", "roi_too_large")
        else:
            case.box = self._crop(case.roi) or self.whole

    def _crop(self, roi: Roi) -> Box | None:
        if self.step is None:
            return None
        return crop_box(
            roi.mask,
            margin=self.lengths.margin,
            least=self.lengths.crop_side,
            multiple=np.lcm(self.method.backbone.spec.side_step, self.step).item(),
            step=self.step,
        )

    def _energy(self, cases: Sequence[Case], grid: tuple[int, int]) -> WindowEnergy:
        return WindowEnergy.of(
            self.method,
            torch.stack([case.valid[case.box.window] for case in cases])[:, None],
            [case.box for case in cases],
            self.frame,
            grid,
            cropped=cases[0].box != self.whole,
            rim=self.lengths.rim,
            kappa=self.config.kappa,
            near=torch.stack([self._near(case) for case in cases]) if self.config.near else None,
        )

    def _near(self, case: Case) -> Tensor:
        """In and around the regions, (1, h, w) bool of the window."""
        assert case.roi is not None
        near = widened(case.roi.mask, self.lengths.around)[case.box.window]
        return torch.from_numpy(near)[None].to(self.device)

    def _grid(self, case: Case) -> tuple[int, int]:
        """Patches of the window."""
        rows, columns = case.energy.shape
        return (
            rows * case.box.height // self.frame[0],
            columns * case.box.width // self.frame[1],
        )

    @torch.no_grad()
    def _check_crop(self, cases: list[Case]) -> None:
        """A crop whose energies are not those of the whole picture is not used (5.2)."""
        if cases[0].box == self.whole:
            return
        grid = self._grid(cases[0])
        windows = [case.window() for case in cases]
        found = self._energy(cases, grid).patches(torch.stack([window[0] for window in windows]))
        for case, (_, roi, _), energy in zip(cases, windows, found, strict=True):
            top = case.box.top * case.energy.shape[0] // self.frame[0]
            left = case.box.left * case.energy.shape[1] // self.frame[1]
            own = case.energy[top : top + grid[0], left : left + grid[1]]
            patches = valid_tokens(roi[None, None], grid)[0]
            difference = float((energy - own).abs()[patches].median())
            if not difference <= _CROP_TOLERANCE:
                case.box = self.whole
                case.note(f"A crop's energies differ by {difference:.2g} in the median: none was used.")

    def _optimise(self, cases: list[Case]) -> None:
        """Fill, gates, iterations, and what follows from them."""
        grid = self._grid(cases[0])
        energy = self._energy(cases, grid)
        problem, keep = self._problem(cases, energy)
        if not keep:
            return
        energy, kept = energy.rows(keep), [cases[row] for row in keep]
        solutions = solve(problem, energy, self.config, [case.time_cap_s for case in kept])
        with torch.no_grad():
            for row, (case, solution) in enumerate(zip(kept, solutions, strict=True)):
                if solution.stop == "not_finite":
                    case.end("error", error="The energy or its gradient became NaN or infinite.")
                else:
                    finish(
                        case,
                        problem.rows([row]),
                        energy.rows([row]),
                        solution,
                        self.config,
                        self.lengths,
                        noise_floor=self.noise_floor,
                        facts=self.facts,
                        batch=self._batch_size(case.box.height, case.box.width),
                    )

    @torch.no_grad()
    def _problem(self, cases: Sequence[Case], energy: WindowEnergy) -> tuple[Problem, list[int]]:
        """The problem of the cases that pass the gates before solving, and which they are."""
        windows = [case.window() for case in cases]
        picture = torch.stack([window[0] for window in windows])
        before = energy(picture)
        roi = torch.stack([window[1] for window in windows])[:, None].float()
        filled = torch.stack([self._fill(case, *window) for case, window in zip(cases, windows, strict=True)])
        after_fill = energy(filled)
        strange = after_fill > _MAX_FILL_ENERGY * before
        for row in strange.nonzero()[:, 0].tolist():
            if cases[row].told["fill"] == "exemplar":  # what surrounds the region may fill it better
                cases[row].note("A fill from good pictures was found as strange as the region.")
                other = self._fill(cases[row], *windows[row], diffusion=True)
                filled[row], after_fill[row] = other, energy.rows([row])(other[None])[0]
        difference = (picture - filled) * roi
        for case, own, own_fill in zip(cases, before.tolist(), after_fill.tolist(), strict=True):
            if case.box != self.whole:
                case.told["crop"] = (case.box.top, case.box.left, case.box.height)
            case.told |= {"energy_before": finite(own), "energy_fill": finite(own_fill)}
            if not np.isfinite(own) or not np.isfinite(own_fill):
                case.end("error", error="The energy of this picture or its fill is NaN or infinite.")
            elif own <= 0:
                case.end("gate", "energy_below_hinge")
            elif own_fill > _MAX_FILL_ENERGY * own:
                case.end("gate", "fill_not_normal")
            elif not self.config.time_cap_s:
                case.told["stop"] = "time_cap"
                case.end("time_cap")
        keep = [row for row, case in enumerate(cases) if case.state is None]
        floor = after_fill if self.config.floor == "fill" else torch.zeros_like(after_fill)
        parts = (picture, roi, difference, before, after_fill, floor)
        return Problem(*(part[keep] for part in parts)), keep

    def _fill(
        self, case: Case, picture: Tensor, roi: Tensor, valid: Tensor, *, diffusion: bool = False
    ) -> Tensor:
        start = time.perf_counter()
        pixels, kind = fill_window(
            picture,
            roi,
            valid,
            None if diffusion else self.references,
            case.box,
            self.frame,
            kind=self.config.fill,
            ring=self.lengths.ring,
            turn=self.config.turn,
        )
        case.told["fill"] = kind
        case.seconds_fill += time.perf_counter() - start
        return pixels
