"""What a model keeps of good pictures for refiners, beside their reference pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator

from fettle.refine.f2pad import GoodFacts
from fettle.refine.references import References

LighterName = Literal["blur", "guided"]
_HIGH = 1.5  # of settled patch energies: a peak that few good pictures have


class LighterScale(NamedTuple):
    """Brings a less blurred map of settled energies z to the base map's unit: factor z + offset.

    Its own pixel threshold falls on the base map's, and the typical good pixel of one on the other's.
    """

    factor: FiniteFloat
    offset: FiniteFloat


class RefineFacts(BaseModel):
    """Numbers from good pictures that were not learnt from.

    Attributes:
        roi_high, peak, hold, noise_floor, flat: see `f2pad.GoodFacts`.
        roi_high_unbounded: the same of energies without a bound, which F2PAD sees where the method has such.
        lighter: how less blurred maps come to the base map's unit.
        measured: False where the model was fitted without, and these are stand-ins.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    roi_high: FiniteFloat
    roi_high_unbounded: FiniteFloat | None = None
    peak: FiniteFloat = Field(gt=0)
    hold: FiniteFloat
    noise_floor: FiniteFloat | None = Field(default=None, gt=0)
    flat: bool = False
    lighter: Mapping[LighterName, LighterScale]
    measured: bool = True

    @field_validator("lighter")
    @classmethod
    def _has_both(cls, value: Mapping[LighterName, LighterScale]) -> Mapping[LighterName, LighterScale]:
        if set(value) != set(get_args(LighterName)):
            raise ValueError(f"it has scales for {sorted(value)}")
        return value

    def with_references(self, references: References | None) -> GoodFacts:
        """As F2PAD takes them."""
        high = self.roi_high if self.roi_high_unbounded is None else self.roi_high_unbounded
        return GoodFacts(high, self.peak, self.hold, self.noise_floor, references, self.flat)


def stand_in_facts(pixel_threshold: float | None) -> RefineFacts:
    """For a model that was fitted without: a rare good patch, 1, then lies at the pixel threshold."""
    level = pixel_threshold if pixel_threshold is not None and pixel_threshold > 0 else 1.0
    scale = LighterScale(level, 0.0)
    lighter: dict[LighterName, LighterScale] = {"blur": scale, "guided": scale}
    return RefineFacts(roi_high=_HIGH, peak=4 * level, hold=level, lighter=lighter, measured=False)
