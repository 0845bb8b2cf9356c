"""What good pictures tell refiners at the end of a fit: reference pictures, and how good ones look."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fettle.calibration import Calibration, pixel_statistic, pixel_threshold
from fettle.errors import UsageError
from fettle.feature_stream import GoodPicture
from fettle.images.framing import Frame
from fettle.images.loading import Loaded, load_framed
from fettle.judged import Calibrations, HeldOut, Judged
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.pixel_map import valid_tokens
from fettle.protocols import Progress
from fettle.refine.blur import light_blur
from fettle.refine.facts import LighterName, LighterScale, RefineFacts, stand_in_facts
from fettle.refine.guided import guided_map
from fettle.refine.references import References, choose_references, noise_floor

_MOST_LOOKED_AT = 1000  # pictures that references are chosen among, besides those that were held out
_MOST_VIEWS = 20_000
_DISCS = 12  # pictures that the noise floor is measured on
_THUMBNAIL = 16  # px
_HIGH_SHARE = 0.9  # of good pictures: their largest energy is below `roi_high`
_PEAK = 4.0  # times the 99.9 % quantile of good maps
_FLAT = 1e-6


class ForRefiners(NamedTuple):
    """What a model keeps for refiners.

    `product_facts` are the same facts from each product's own pictures, in a model of many products. One that
    has none of its own takes those of all.
    """

    facts: RefineFacts
    references: References | None
    product_facts: Mapping[str, RefineFacts] = MappingProxyType({})


def learn_for_refiners(
    pictures: Sequence[GoodPicture],
    judged: Judged,
    calibrations: Calibrations,
    frame: Frame,
    *,
    num_references: int,
    generator: Generator,
    progress: Progress,
    scale: EnergyScale,
) -> ForRefiners:
    """Choose reference pictures, and measure what refiners need (f2pad.md 3, 5.3, 7).

    Args:
        pictures: all good ones.
        judged: what those that were not learnt from scored.
        calibrations: pictures that the shared one rejects are no references.
        num_references: 0 keeps none; fills are then by diffusion, and so is the noise floor's.
        generator: for the places of the noise floor's discs.
        scale: of the raw energies in `judged`.
    """
    rejected = _rejected(judged, calibrations.shared)
    held_out = {one.key: one for one in judged.held_out}
    by_key = sorted(pictures, key=lambda picture: picture.key)
    ordered = [p for i, p in enumerate(by_key) if i < _MOST_LOOKED_AT or p.key in held_out]
    looked = _Looked()
    for done, loaded in enumerate(load_framed(ordered, lambda picture: picture.path, frame), 1):
        progress("references", done, len(ordered))
        if isinstance(loaded, Loaded):
            views, valid = (torch.from_numpy(a) for a in (loaded.placed.views, loaded.placed.valid))
            key = loaded.item.key
            if key in held_out:
                looked.measure(held_out[key], views, valid, scale)
            if key not in rejected:
                looked.consider(loaded.item, views, valid)
    references, own_numbers = _references(looked, frame, num_references)

    def floor_of(own: Sequence[GoodPicture]) -> float | None:
        return _noise_floor(own, set(held_out), frame, references, own_numbers, generator)

    facts = _facts(judged, calibrations.shared, looked, floor_of(ordered))
    floors = {
        product: floor_of([picture for picture in ordered if picture.product == product])
        for product in sorted(calibrations.by_product)
    }
    return ForRefiners(facts, references, _product_facts(pictures, judged, calibrations, looked, floors))


def relearn_for_refiners(
    former: ForRefiners,
    pictures: Sequence[GoodPicture],
    judged: Judged,
    calibrations: Calibrations,
    frame: Frame,
    scale: EnergyScale,
    *,
    keep_shared: bool = False,
) -> ForRefiners:
    """The same references, and the numbers that follow from maps anew, from fresh good pictures.

    Args:
        keep_shared: these are not of all products, so that only their own products' numbers change.
    """
    held_out = {one.key: one for one in judged.held_out}
    looked = _Looked()
    known = [picture for picture in pictures if picture.key in held_out]
    for loaded in load_framed(known, lambda picture: picture.path, frame):
        if isinstance(loaded, Loaded):
            views, valid = (torch.from_numpy(a) for a in (loaded.placed.views, loaded.placed.valid))
            looked.measure(held_out[loaded.item.key], views, valid, scale)
    facts = former.facts
    if not keep_shared:
        facts = _facts(judged, calibrations.shared, looked, facts.noise_floor)
    floors = {
        product: former.product_facts.get(product, former.facts).noise_floor
        for product in calibrations.by_product
    }
    own = _product_facts(pictures, judged, calibrations, looked, floors)
    return ForRefiners(facts, former.references, {**former.product_facts, **own})


def _product_facts(
    pictures: Sequence[GoodPicture],
    judged: Judged,
    calibrations: Calibrations,
    looked: _Looked,
    floors: Mapping[str, float | None],
) -> dict[str, RefineFacts]:
    """Of each product whose own pictures tell them."""
    found: dict[str, RefineFacts] = {}
    for product, calibration in sorted(calibrations.by_product.items()):
        keys = {picture.key for picture in pictures if picture.product == product}
        facts = _facts(judged.of(keys), calibration, looked.of(keys), floors[product])
        if facts.measured:
            found[product] = facts
    return found


@dataclass
class _Looked:
    """What one walk over good pictures found."""

    peaks: dict[str, float] = field(default_factory=dict)  # largest settled energy by held-out picture's key
    unbounded: dict[str, float] = field(default_factory=dict)  # the same without a bound, where there is such
    lighter: dict[LighterName, dict[str, float]] = field(default_factory=lambda: {"blur": {}, "guided": {}})
    thumbnails: list[Tensor] = field(default_factory=list)
    owners: list[tuple[GoodPicture, int]] = field(default_factory=list)  # of each: picture, and which view

    def measure(self, one: HeldOut, views: Tensor, valid: Tensor, scale: EnergyScale) -> None:
        """Largest energy, and the pixel statistic of less blurred maps."""
        z = scale(torch.stack(list(one.energies)))  # (n, h, w)
        tokens = valid_tokens(valid, (z.shape[1], z.shape[2]))
        if not bool(tokens.any()):
            return
        self.peaks[one.key] = float(z[tokens].max())
        if one.unbounded:
            self.unbounded[one.key] = float(scale(torch.stack(list(one.unbounded)))[tokens].max())
        inside = valid[:, 0].numpy().reshape(-1, valid.shape[-1])
        maps: dict[LighterName, Tensor] = {
            "blur": light_blur(z, valid),
            "guided": guided_map(z, views, valid),
        }
        for name, values in maps.items():
            flat = values.numpy().reshape(-1, values.shape[-1])
            self.lighter[name][one.key] = pixel_statistic(flat, inside)

    def of(self, keys: Collection[str]) -> _Looked:
        """What was measured on these pictures."""

        def own(values: Mapping[str, float]) -> dict[str, float]:
            return {key: value for key, value in values.items() if key in keys}

        lighter = {name: own(values) for name, values in self.lighter.items()}
        return _Looked(own(self.peaks), own(self.unbounded), lighter)

    def consider(self, picture: GoodPicture, views: Tensor, valid: Tensor) -> None:
        """Remember small pictures of the views that show something, as long as there are not too many."""
        for number, (view, shown) in enumerate(zip(views, valid, strict=True)):
            if bool(shown.any()) and len(self.owners) < _MOST_VIEWS:
                self.thumbnails.append(F.adaptive_avg_pool2d(view, _THUMBNAIL))
                self.owners.append((picture, number))


def raw_scale(judged: Judged) -> EnergyScale:
    """The scale that a method takes from these energies."""
    scale = EnergyScale()
    if judged.energies is not None:
        scale.settle(judged.energies)
    return scale


def _rejected(judged: Judged, calibration: Calibration) -> set[str]:
    if calibration.t_reject is None:
        return set()
    scored = zip(judged.keys, judged.scores, strict=True)
    return {key for key, score in scored if score > calibration.t_reject}


def _references(
    looked: _Looked, frame: Frame, count: int
) -> tuple[References | None, Mapping[str, list[int]]]:
    """The chosen views, and by the picture's key the numbers of its views among them."""
    numbers = choose_references(looked.thumbnails, count)
    chosen = [looked.owners[number] for number in numbers]
    by_key: dict[str, list[int]] = {}
    for place, (picture, _) in enumerate(chosen):
        by_key.setdefault(picture.key, []).append(place)
    views, valid = [], []
    for loaded in load_framed(chosen, lambda owner: owner[0].path, frame):
        if isinstance(loaded, Loaded):
            number = loaded.item[1]
            views.append(torch.from_numpy(loaded.placed.views[number]))
            valid.append(torch.from_numpy(loaded.placed.valid[number]))
    if len(views) < len(chosen) or not views:  # a file that went away meanwhile leaves none
        return None, {}
    return References.from_views(torch.stack(views), torch.stack(valid)), by_key


def _noise_floor(
    pictures: Sequence[GoodPicture],
    held_out: set[str],
    frame: Frame,
    references: References | None,
    own_numbers: Mapping[str, list[int]],
    generator: Generator,
) -> float | None:
    """Of some pictures that were not learnt from, where there are such; else of any. None where none has
    room for a disc."""
    known = [picture for picture in pictures if picture.key in held_out] or list(pictures)
    loaded = [one for one in load_framed(known[:_DISCS], lambda p: p.path, frame) if isinstance(one, Loaded)]
    loaded = [one for one in loaded if one.placed.valid[0].any()]
    if not loaded:
        return None
    try:
        return noise_floor(
            torch.stack([torch.from_numpy(one.placed.views[0]) for one in loaded]),
            torch.stack([torch.from_numpy(one.placed.valid[0]) for one in loaded]),
            references,
            generator=generator,
            own=[own_numbers.get(one.item.key) for one in loaded],
        )
    except UsageError:  # a small region of interest must not cost the fit
        return None


def _facts(judged: Judged, calibration: Calibration, looked: _Looked, floor: float | None) -> RefineFacts:
    threshold = calibration.pixel_threshold
    if not looked.peaks or threshold is None:
        return stand_in_facts(threshold).model_copy(update={"noise_floor": floor or None})
    low = median(one.map_median for one in judged.held_out)
    alpha = calibration.alpha_reject

    def scale_of(name: LighterName) -> LighterScale:
        cut = pixel_threshold([*looked.lighter[name].values()], alpha)[0]
        factor = (threshold - low) / cut if cut > 0 and threshold > low else 1.0
        return LighterScale(factor, low)

    # Refined maps are clipped at the peak, and what the threshold marks must stay above it.
    peak = max(_PEAK * median(judged.pixel_statistics), 2 * threshold)
    return RefineFacts(
        roi_high=_bound(looked.peaks),
        roi_high_unbounded=_bound(looked.unbounded) if looked.unbounded else None,
        peak=peak if peak > 0 else _PEAK * 1e-6,
        hold=threshold,
        noise_floor=floor or None,
        flat=_is_flat(judged),
        lighter={"blur": scale_of("blur"), "guided": scale_of("guided")},
    )


def _bound(peaks: Mapping[str, float]) -> float:
    """What few good pictures reach."""
    return max(float(np.quantile([*peaks.values()], _HIGH_SHARE)), 1.0)


def _is_flat(judged: Judged) -> bool:
    """Whether good patches' energies are all alike: their scale then says nothing."""
    if judged.energies is None:
        return True
    low, high = judged.energies.double().quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return bool(high - low <= _FLAT)
