"""A refiner by name: F2PAD, and what it competes with."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fettle.errors import DataError, UsageError, nearest_name
from fettle.layers.pixel_map import pixel_map, valid_tokens
from fettle.protocols import Json, Method
from fettle.refine.blur import light_blur
from fettle.refine.energy import Box
from fettle.refine.f2pad import Refined, refine_f2pad
from fettle.refine.facts import RefineFacts
from fettle.refine.filling import usable_references
from fettle.refine.grabcut import grabcut_of_map, have_opencv
from fettle.refine.guided import guided_map
from fettle.refine.readout import refined_map
from fettle.refine.record import NOT_FINITE, RefineRecord, in_one_line
from fettle.refine.references import References
from fettle.refine.roi import crop_box, find_roi
from fettle.refine.settings import OF_THE_SOLVER, F2PADConfig, Lengths, make_f2pad_config

RefinerName = Literal["blur", "guided", "grabcut", "difference", "f2pad"]
REFINERS: tuple[RefinerName, ...] = get_args(RefinerName)
_FIELDS: Mapping[str, Collection[str]] = {  # that each reads; f2pad reads all
    "blur": (),
    "guided": (),
    "grabcut": ("roi_low", "roi_rel", "roi_dilate", "crop_margin", "crop_side"),
    "difference": set(F2PADConfig.model_fields) - OF_THE_SOLVER,
}
_STEP = 16  # px that a window of GrabCut starts at a multiple of


@dataclass(frozen=True)
class Refiner:
    """Sharpens a method's maps. Scores and verdicts stay.

    Attributes:
        name: "blur" and "guided" are the method's own map with less blur, or filtered along the picture's
            edges; "grabcut" cuts by colours, seeded by the map; "difference" is F2PAD without an iteration.
        facts, references: of good pictures; F2PAD fills from all of these references.
        config: of F2PAD. product_facts: in place of `facts`, for pictures of these products.
        everything: pictures whose verdict is ok, too.
    """

    name: RefinerName
    facts: RefineFacts
    references: References | None
    config: F2PADConfig
    product_facts: Mapping[str, RefineFacts]
    everything: bool = False

    def __call__(
        self,
        method: Method,
        views: Tensor,
        valid: Tensor,
        base_maps: Tensor,
        chosen: Sequence[bool],
        pictures: Sequence[int] | None = None,
        products: Sequence[str] | None = None,
    ) -> list[Refined]:
        """Refine the chosen ones. Whatever goes wrong with one is its record's, and its base map stands.

        Args:
            views: (B, 3, H, W) in 0..1. valid: (B, 1, H, W) bool. base_maps: (B, H, W), the method's own.
            pictures: see `refine_f2pad`.
            products: of each view, "" where it is not known; None: of none.
        """
        asked = products or [""] * len(views)
        names = [name if name in self.product_facts else "" for name in asked]
        found: dict[int, Refined] = {}
        for name in dict.fromkeys(names):
            own = [i for i, one in enumerate(names) if one == name]
            answers = self._alike(
                method,
                views[own],
                valid[own],
                base_maps[own],
                self.product_facts.get(name, self.facts),
                [chosen[i] for i in own],
                None if pictures is None else [pictures[i] for i in own],
            )
            found |= dict(zip(own, answers, strict=True))
        return [self._told(found[i], name) for i, name in enumerate(asked)]

    def _told(self, refined: Refined, product: str) -> Refined:
        """With a note where numbers of other products stand in for this one's."""
        record = refined.record
        if not self.product_facts or product in self.product_facts or record.gate_reason == "verdict_ok":
            return refined
        why = f"'{product}' has none of its own" if product else "no product was named"
        note = f"Numbers of all products together were used: {why}."
        return refined._replace(record=record.model_copy(update={"notes": (*record.notes, note)}))

    def _alike(
        self,
        method: Method,
        views: Tensor,
        valid: Tensor,
        base_maps: Tensor,
        facts: RefineFacts,
        chosen: Sequence[bool],
        pictures: Sequence[int] | None,
    ) -> list[Refined]:
        """Views that these facts are about."""
        if self.name in ("f2pad", "difference"):
            known = facts.with_references(self.references)
            return refine_f2pad(
                method, views, valid, base_maps, known, self.config, chosen=chosen, pictures=pictures
            )
        rows = zip(views, valid, base_maps, chosen, strict=True)
        return [
            self._one(method, *(part[None] for part in row[:3]), facts=facts, chosen=row[3]) for row in rows
        ]

    @torch.no_grad()
    def _one(
        self, method: Method, view: Tensor, valid: Tensor, base: Tensor, *, facts: RefineFacts, chosen: bool
    ) -> Refined:
        if not chosen:
            return Refined(base[0], None, None, RefineRecord(refined="gate", gate_reason="verdict_ok"))
        start = time.perf_counter()
        try:
            z = method.patch_energy(view, valid).float()
            if not bool(z[valid_tokens(valid, (z.shape[-2], z.shape[-1]))].isfinite().all()):
                raise DataError(NOT_FINITE, "Look at its pixels.")
            refined = (self._cut if self.name == "grabcut" else self._lighter)(z, view, valid, base, facts)
        except Exception as error:
            refined = Refined(base[0], None, None, RefineRecord(refined="error", error=in_one_line(error)))
        seconds = {"seconds": time.perf_counter() - start}
        return refined._replace(record=refined.record.model_copy(update=seconds))

    def _lighter(self, z: Tensor, view: Tensor, valid: Tensor, base: Tensor, facts: RefineFacts) -> Refined:
        """The map with less blur, in the base map's unit."""
        if self.name == "guided":
            scale, found = facts.lighter["guided"], guided_map(z, view, valid)
        else:
            scale, found = facts.lighter["blur"], light_blur(z, valid)
        lighter = torch.where(valid[0, 0], scale.factor * found[0] + scale.offset, 0)
        return Refined(lighter, None, None, RefineRecord(refined="yes", applied=True))

    def _cut(self, z: Tensor, view: Tensor, valid: Tensor, base: Tensor, facts: RefineFacts) -> Refined:
        height, width = view.shape[-2:]
        lengths = Lengths(self.config, height, width)
        pixel_z = pixel_map(z, valid, 0)[0].cpu().numpy()
        roi = find_roi(
            pixel_z,
            valid[0, 0].cpu().numpy(),
            high=facts.roi_high,
            low=self.config.roi_low,
            rel=self.config.roi_rel,
            dilate=lengths.dilate,
        )
        if not roi.mask.any():
            return Refined(base[0], None, None, RefineRecord(refined="empty_roi"))
        box = crop_box(
            roi.mask, margin=lengths.margin, least=lengths.crop_side, multiple=2 * _STEP, step=_STEP
        )
        place = (box or Box(0, 0, height, width)).window
        pixels = (view[0] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        found = grabcut_of_map(pixels[place], pixel_z[place], roi.mask[place])
        known = {"roi_pixels": int(roi.mask.sum()), "crop": (box.top, box.left, box.height) if box else False}
        if found is None or not found.any():
            gate = RefineRecord(refined="gate", gate_reason="insufficient").model_copy(update=known)
            return Refined(base[0], None, None, gate)
        mask = np.zeros((height, width), np.float32)
        mask[place] = found
        soft = torch.from_numpy(mask).to(base.device)
        inside = torch.from_numpy(roi.mask).to(base.device)
        record = RefineRecord(refined="yes", applied=True).model_copy(update=known)
        return Refined(
            refined_map(base[0], soft, inside, peak=facts.peak, hold=facts.hold),
            soft,
            torch.ones_like(soft, dtype=torch.bool),
            record,
        )

    def describe(self) -> dict[str, Json]:
        """For a run's card."""
        return {
            "name": self.name,
            "all": self.everything,
            "facts_measured": self.facts.measured,
            "references": 0 if self.references is None else len(self.references.pixels),
            "settings": self.config.model_dump(mode="json"),
        }


def make_refiner(
    name: str,
    facts: RefineFacts,
    references: References | None,
    *,
    product_facts: Mapping[str, RefineFacts] | None = None,
    everything: bool = False,
    preset: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Refiner:
    """A refiner of this name.

    Raises:
        UsageError: no such name or preset, one that this refiner does not take, or OpenCV is not installed
            and it needs that.
        ConfigError: a setting that F2PAD does not have, or a value that it does not take.
    """
    if name not in REFINERS:
        raise UsageError(f"There is no refiner '{name}'.", nearest_name(name, ("none", *REFINERS)))
    if name == "grabcut" and not have_opencv():
        raise UsageError("GrabCut needs OpenCV, which is not installed.", "Run pip install 'fettle[refine]'.")
    config = make_f2pad_config(preset or "compact", settings or {})
    if preset and name not in ("f2pad", "difference"):
        raise UsageError(f"The refiner '{name}' takes no preset.", "It is of f2pad and difference.")
    for field in settings or {}:
        if field not in _FIELDS.get(name, F2PADConfig.model_fields):
            raise UsageError(f"The refiner '{name}' takes no '{field}'.", "It is a field of f2pad.")
    if name == "difference":
        config = config.model_copy(update={"iters": 0})
    own = next(known for known in REFINERS if known == name)
    return Refiner(own, facts, usable_references(references, config), config, product_facts or {}, everything)
