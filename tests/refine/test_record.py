"""One record of a picture in tiles."""

from __future__ import annotations

import pytest

from fettle.refine.record import ComponentRecord, RefineRecord, State, in_one_line, joined


def record(refined: State, **fields: object) -> RefineRecord:
    applied = refined in ("yes", "accepted_part")
    return RefineRecord.model_validate({"refined": refined, "applied": applied, **fields})


def test_one_tile_is_the_picture() -> None:
    only = record("yes", iterations=3, notes=("a",))
    assert joined([only]) is only


@pytest.mark.parametrize(
    ("tiles", "expected"),
    [
        (("yes", "empty_roi", "yes"), "yes"),
        (("empty_roi", "yes", "gate"), "accepted_part"),
        (("accepted_part", "empty_roi"), "accepted_part"),
        (("yes", "error"), "accepted_part"),
        (("yes", "time_cap"), "time_cap"),
        (("empty_roi", "gate", "error"), "error"),
        (("gate", "adversarial", "time_cap"), "time_cap"),
        (("gate", "adversarial"), "adversarial"),
        (("empty_roi", "gate"), "gate"),
        (("empty_roi", "empty_roi"), "empty_roi"),
    ],
)
def test_the_state_of_a_picture_in_tiles(tiles: tuple[State, ...], expected: State) -> None:
    found = joined([record(tile) for tile in tiles])
    assert found.refined == expected
    assert found.applied is any(tile in ("yes", "accepted_part") for tile in tiles)


@pytest.mark.parametrize(
    ("others", "expected", "reason"),
    [
        (("yes",), "yes", None),
        (("yes", "empty_roi"), "yes", None),
        (("yes", "gate"), "accepted_part", None),
        (("empty_roi",), "empty_roi", None),
        (("adversarial",), "adversarial", None),
        ((), "gate", "energy_below_hinge"),
    ],
)
def test_a_tile_without_any_energy_has_no_region(
    others: tuple[State, ...], expected: State, reason: str | None
) -> None:
    quiet = record("gate", gate_reason="energy_below_hinge")
    found = joined([quiet, *(record(tile) for tile in others), quiet])
    assert (found.refined, found.gate_reason) == (expected, reason)


def test_pixels_and_seconds_add_up_and_the_rest_is_of_one_tile() -> None:
    part = ComponentRecord(accepted=True, pixels=4)
    found = joined(
        [
            record("gate", gate_reason="insufficient", seconds=1, objective_after=0.9, notes=("a", "b")),
            record("yes", seconds=2, seconds_fill=1, roi_pixels=5, iterations=3, objective_after=0.5,
                   components=(part,), notes=("b",)),
            record("yes", seconds=4, seconds_fill=1, roi_pixels=7, iterations=4, objective_after=0.4,
                   components=(part,)),
            record("error", error="It broke."),
        ]
    )  # fmt: skip
    assert (found.seconds, found.seconds_fill, found.roi_pixels, found.iterations) == (7, 2, 12, 7)
    assert (found.objective_after, found.gate_reason, found.error) == (0.5, None, "")
    assert found.components == (part, part)
    assert found.notes == ("a", "b", "It broke.", "2 of 4 tiles were refined.")


def test_what_went_wrong_is_one_line() -> None:
    assert in_one_line(RuntimeError("a\nb")) == "RuntimeError: a."
    assert in_one_line(ValueError()) == "ValueError: no words with it."
