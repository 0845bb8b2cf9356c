"""Schedules: progress of the training to strength."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fettle.perturb.schedules import Constant, Cosine, Linear, Schedule, Warmup
from fettle.protocols import Step

GOLDEN: tuple[tuple[Schedule, list[float]], ...] = (
    (Constant(), [1, 1, 1, 1, 1]),
    (Constant(value=0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
    (Linear(), [0, 0.25, 0.5, 0.75, 1]),
    (Linear(start=0.8, end=0.4), [0.8, 0.7, 0.6, 0.5, 0.4]),
    (Cosine(), [0, 0.146447, 0.5, 0.853553, 1]),
    (Cosine(start=1, end=0.5), [1, 0.926777, 0.75, 0.573223, 0.5]),
    (Warmup(share=0.5), [0, 0.5, 1, 1, 1]),
    (Warmup(share=0), [1, 1, 1, 1, 1]),
    (Warmup(share=1), [0, 0.25, 0.5, 0.75, 1]),
)


@pytest.mark.parametrize(("schedule", "strengths"), GOLDEN, ids=str)
def test_strengths_at_the_quarters(schedule: Schedule, strengths: list[float]) -> None:
    assert [schedule(quarter / 4) for quarter in range(5)] == pytest.approx(strengths, abs=1e-6)


@given(
    st.one_of(
        st.builds(Linear, start=st.floats(0, 1), end=st.floats(0, 1)),
        st.builds(Cosine, start=st.floats(0, 1), end=st.floats(0, 1)),
        st.builds(Warmup, share=st.floats(0, 1)),
    ),
    st.integers(1, 50),
    st.data(),
)
def test_strength_is_a_share_at_every_step(schedule: Schedule, total: int, data: st.DataObject) -> None:
    step = Step(number=data.draw(st.integers(0, total - 1)), total=total)
    assert 0 <= schedule(step.share) <= 1


def test_schedules_survive_json_and_refuse_unknown_fields() -> None:
    adapter: TypeAdapter[Schedule] = TypeAdapter(Schedule)
    for schedule, _ in GOLDEN:
        assert adapter.validate_json(adapter.dump_json(schedule)) == schedule
    with pytest.raises(ValidationError, match="ramp"):
        adapter.validate_python({"kind": "linear", "ramp": 0.5})
    with pytest.raises(ValidationError, match="constant"):
        adapter.validate_python({"kind": "step"})
