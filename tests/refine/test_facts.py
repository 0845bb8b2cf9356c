"""What a model keeps for refiners: as it is written, as it is read, and what stands in for it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fettle.refine.facts import LighterScale, RefineFacts, stand_in_facts
from fettle.refine.references import References

LIGHTER = {"blur": LighterScale(0.1 + 0.2, 0.7), "guided": LighterScale(2.0, -1 / 3)}


def facts(**changed: Any) -> RefineFacts:
    fields: dict[str, Any] = {
        "roi_high": 1.1,
        "peak": 4.3,
        "hold": 2.2,
        "noise_floor": 0.21,
        "lighter": LIGHTER,
    }
    return RefineFacts(**{**fields, **changed})


@pytest.mark.parametrize("changed", [{}, {"noise_floor": None}, {"flat": True, "measured": False}])
def test_facts_come_back_from_json_bit_for_bit(changed: dict[str, Any]) -> None:
    written = json.dumps(facts(**changed).model_dump(mode="json"), allow_nan=False)
    assert RefineFacts.model_validate(json.loads(written)) == facts(**changed)


def test_read_scales_have_their_names() -> None:
    again = RefineFacts.model_validate(facts().model_dump(mode="json"))
    assert (again.lighter["guided"].factor, again.lighter["guided"].offset) == (2.0, -1 / 3)


@pytest.mark.parametrize(
    "changed",
    [
        {"roi_high": math.nan},
        {"peak": 0.0},
        {"peak": math.inf},
        {"noise_floor": 0.0},
        {"noise_floor": -1.0},
        {"lighter": {"blur": LIGHTER["blur"]}},
        {"lighter": {**LIGHTER, "grabcut": LIGHTER["blur"]}},
        {"lighter": {**LIGHTER, "blur": (math.nan, 0.0)}},
        {"lighter": {**LIGHTER, "blur": (1.0,)}},
        {"more": 1},
    ],
)
def test_what_no_fit_writes_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        facts(**changed)


def test_f2pad_gets_the_numbers_and_the_references() -> None:
    references = References(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 1, 8, 8, dtype=torch.bool)
    )
    good = facts(flat=True).with_references(references)
    assert (good.roi_high, good.peak, good.hold, good.noise_floor, good.flat) == (1.1, 4.3, 2.2, 0.21, True)
    assert good.references is references


@pytest.mark.parametrize(
    ("threshold", "level"), [(0.25, 0.25), (30.0, 30.0), (None, 1.0), (0.0, 1.0), (-2.0, 1.0)]
)
def test_stand_ins_put_a_rare_good_patch_at_the_pixel_threshold(
    threshold: float | None, level: float
) -> None:
    found = stand_in_facts(threshold)
    assert not found.measured and not found.flat and found.noise_floor is None
    assert found.roi_high > 1
    assert found.peak == 4 * level
    for scale in found.lighter.values():
        assert scale.factor * 1 + scale.offset == level
        assert scale.factor * 0 + scale.offset == 0
