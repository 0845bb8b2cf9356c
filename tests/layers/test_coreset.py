"""Greedy k-centre selection and its stream."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.layers.coreset import (
    CoresetStream,
    _half_norms,
    draw_projection,
    predict,
    project,
    projection_dims,
    select_approximate,
    select_greedy,
    sparse_projection,
)

SIX = torch.tensor([(0, 0), (10, 0), (0, 6), (10, 6), (5, 3), (9, 0)], dtype=torch.float32)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _features(num_rows: int, num_features: int, seed: int = 0) -> Tensor:
    """Rows like a network's: positive, clustered, with a large mean and correlated columns."""
    generator = _generator(seed)
    centres = torch.randn(40, num_features, generator=generator)
    spread = torch.randn(12, num_features, generator=generator)
    cluster = torch.randint(40, (num_rows,), generator=generator)
    within = torch.randn(num_rows, 12, generator=generator) @ spread
    return (centres[cluster] + 0.4 * within + 1.0).relu() + 3.0


def _reference(rows: Tensor, num_picks: int, start: int) -> tuple[list[int], list[float]]:
    """Greedy k-centre as it is defined, in float64, with the squared key of each pick."""
    rows = rows.double()
    picks, keys_at_pick = [start], [torch.inf]
    keys = (rows - rows[start]).square().sum(1)
    while len(picks) < num_picks:
        best = int(keys.argmax())
        picks.append(best)
        keys_at_pick.append(float(keys[best]))
        keys = torch.minimum(keys, (rows - rows[best]).square().sum(1))
    return picks, keys_at_pick


def _radius(rows: Tensor, bank: Tensor) -> float:
    return float(torch.cdist(rows.double(), bank.double()).amin(1).max())


@pytest.mark.parametrize(
    ("num_rows", "dims"),
    [(1000, 170), (20000, 244), (20480, 245), (51200, 267), (100000, 284), (204800, 301), (512000, 324)],
)
def test_projection_dims(num_rows: int, dims: int) -> None:
    assert projection_dims(num_rows) == dims


def test_sparse_projection_keeps_squared_lengths_on_average() -> None:
    projection = sparse_projection(400, 300, _generator())
    size = (400**0.5 / 300) ** 0.5
    assert projection.unique().tolist() == pytest.approx([-size, 0.0, size])
    assert float((projection != 0).float().mean()) == pytest.approx(1 / 20, rel=0.03)
    rows = torch.randn(200, 400, generator=_generator(1))
    ratio = (rows @ projection).square().sum(1) / rows.square().sum(1)
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.03)


def test_projection_repeats_with_its_seed_and_is_left_out_where_it_would_lengthen() -> None:
    first, second = (draw_projection(384, 51200, _generator(5)) for _ in range(2))
    assert first is not None and second is not None
    assert first.shape == (384, 267) and torch.equal(first, second)
    assert draw_projection(168, 51200, _generator(5)) is None


def test_projected_rows_have_no_mean() -> None:
    rows = _features(300, 20)
    for projection in (None, sparse_projection(20, 10, _generator())):
        assert float(project(rows, projection).mean(0).abs().max()) < 1e-5


def test_six_rows_by_hand() -> None:
    chosen = select_greedy(SIX, 5, start=0)
    assert chosen.indices.tolist() == [0, 3, 5, 2, 4]
    assert chosen.squared_keys.tolist() == [torch.inf, 136, 37, 36, 25]
    assert chosen.squared_radius == 1  # (10, 0) is left, one away from (9, 0)
    assert not chosen.exhausted


def test_start_is_the_row_nearest_the_mean_and_ties_go_to_the_lowest_index() -> None:
    chosen = select_greedy(SIX, 4)
    assert chosen.indices.tolist() == [4, 0, 1, 2]
    assert chosen.squared_keys.tolist() == [torch.inf, 34, 34, 34]


@pytest.mark.parametrize("num_candidates", [8, 64, 300])
@pytest.mark.parametrize("picks_a_round", [1, 3, 16])
def test_rounds_change_nothing_on_whole_numbers(num_candidates: int, picks_a_round: int) -> None:
    # Small whole numbers are exact in float32 and full of ties, so the order must be the definition's.
    rows = torch.randint(0, 6, (300, 5), generator=_generator(3)).float()
    start = 17
    picks, keys = _reference(rows, 60, start)
    chosen = select_greedy(
        rows, 60, start=start, num_candidates=num_candidates, picks_a_round=picks_a_round, block_bytes=512
    )
    assert chosen.indices.tolist() == picks
    assert chosen.squared_keys.tolist() == keys


def test_same_set_as_float64_and_same_order_but_for_near_ties() -> None:
    rows = project(_features(6000, 64), None)
    start = int(select_greedy(rows, 1).indices[0])
    picks, _ = _reference(rows, 500, start)
    chosen = select_greedy(rows, 500, num_candidates=256).indices.tolist()
    assert set(chosen) == set(picks)
    band = 4e-6 * float(rows.square().sum(1).max())
    exact = rows.double()
    keys = (exact - exact[start]).square().sum(1)
    for pick in chosen[1:]:
        assert float(keys[pick]) >= float(keys.max()) - band
        keys = torch.minimum(keys, (exact - exact[pick]).square().sum(1))


def test_radius_is_that_of_the_rows_left() -> None:
    rows = project(_features(3000, 32), None)
    chosen = select_greedy(rows, 100)
    assert chosen.squared_radius**0.5 == pytest.approx(_radius(rows, rows[chosen.indices]), rel=1e-4)


def test_copies_are_picked_once() -> None:
    distinct = _features(50, 24)
    rows = project(distinct.repeat(20, 1)[torch.randperm(1000, generator=_generator(2))], None)
    chosen = select_greedy(rows, 400)
    assert chosen.exhausted
    assert len(chosen.indices) == 50
    assert chosen.squared_radius == 0
    assert len(rows[chosen.indices].mul(1e3).round().unique(dim=0)) == 50


def test_one_far_row_does_not_hide_the_others() -> None:
    rows = _features(500, 8)
    rows[7] = 1e5
    chosen = select_greedy(rows, 200)
    assert len(chosen.indices) == 200 and 7 in chosen.indices.tolist()


def test_all_rows_may_be_picked() -> None:
    assert sorted(select_greedy(SIX, 6).indices.tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("rows", "num_picks", "start"),
    [(SIX, 0, None), (SIX, 7, None), (SIX, 2, 6), (SIX.double(), 2, None), (SIX[0], 1, None)],
)
def test_wrong_input_is_refused(rows: Tensor, num_picks: int, start: int | None) -> None:
    with pytest.raises(UsageError):
        select_greedy(rows, num_picks, start=start)


def test_progress_reaches_the_total() -> None:
    seen: list[tuple[str, int, int]] = []
    select_greedy(_features(900, 8), 300, progress=lambda what, done, total: seen.append((what, done, total)))
    assert seen[-1] == ("coreset", 300, 300)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_approximate_repairs_the_radius_of_its_sample() -> None:
    rows = _features(20000, 16)
    rows[:10] += torch.linspace(8, 20, 10)[:, None]  # rare good rows that a sample loses
    rows = project(rows, None)
    chosen = select_approximate(rows, 200, _generator())
    again = select_approximate(rows, 200, _generator())
    assert torch.equal(chosen.indices, again.indices)
    assert len(chosen.indices.unique()) == 220
    assert chosen.squared_radius**0.5 == pytest.approx(_radius(rows, rows[chosen.indices]), rel=1e-4)
    assert chosen.squared_radius**0.5 < 0.7 * _radius(rows, rows[chosen.indices[:200]])


def test_approximate_is_exact_on_few_rows() -> None:
    rows = project(_features(800, 16), None)
    assert torch.equal(select_approximate(rows, 200, _generator()).indices, select_greedy(rows, 200).indices)


def _stream(num_features: int, cap: int, room: int, projection: Tensor | None = None) -> CoresetStream:
    """A stream that holds `room` rows."""
    stream = CoresetStream(num_features, cap, projection=projection, memory_mib=64)
    assert 2 * cap <= room <= stream.room
    stream.room = room
    return stream


def _fill(stream: CoresetStream, pictures: Tensor) -> CoresetStream:
    for owner, rows in enumerate(pictures):
        stream.add(rows, owner)
    return stream


def test_stream_that_fits_is_one_exact_selection() -> None:
    pictures = _features(1200, 32).reshape(12, 100, 32)
    projection = sparse_projection(32, 16, _generator())
    found = _fill(_stream(32, 150, 1200, projection), pictures).finish()
    chosen = select_greedy(project(pictures.reshape(-1, 32), projection), 150)
    order = chosen.indices.sort().values
    assert torch.equal(found.arrivals, order)
    assert torch.equal(found.owners, order // 100)
    assert (found.reductions, found.num_seen) == (1, 1200)
    assert found.radius == chosen.squared_radius**0.5


def test_stream_below_its_cap_keeps_every_row() -> None:
    pictures = _features(120, 8).reshape(4, 30, 8)
    found = _fill(_stream(8, 150, 400), pictures).finish()
    assert torch.equal(found.arrivals, torch.arange(120))
    assert (found.reductions, found.radius) == (0, 0.0)


@pytest.mark.parametrize("room", [301, 450, 1000])
def test_certificate_covers_the_measured_radius(room: int) -> None:
    rows = _features(4000, 16)
    found = _fill(_stream(16, 150, room), rows.reshape(40, 100, 16)).finish()
    assert len(found.arrivals.unique()) == 150 and found.reductions > 1
    assert torch.equal(found.owners, found.arrivals // 100)
    assert found.owners.tolist() == sorted(found.owners.tolist())
    assert found.radius >= _radius(rows, rows[found.arrivals])


def test_more_room_gives_no_worse_a_bank_than_twice_the_exact_radius() -> None:
    rows = _features(4000, 16)
    exact, bounded = (
        _radius(rows, rows[_fill(_stream(16, 150, room), rows.reshape(40, 100, 16)).finish().arrivals])
        for room in (4000, 600)
    )
    assert bounded < 1.6 * exact


def test_the_way_rows_are_handed_over_does_not_matter() -> None:
    pictures = _features(2000, 16).reshape(20, 100, 16)
    whole = _fill(_stream(16, 150, 333), pictures).finish()
    parts = _stream(16, 150, 333)
    for owner, rows in enumerate(pictures):
        for part in rows.split(37):
            parts.add(part, owner)
    again = parts.finish()
    assert torch.equal(whole.arrivals, again.arrivals) and torch.equal(whole.owners, again.owners)


@pytest.mark.parametrize("expected", [0, 310, 5000])
def test_the_number_of_rows_expected_changes_no_answer(expected: int) -> None:
    pictures = _features(2000, 16).reshape(20, 100, 16)
    plain = _fill(CoresetStream(16, 150, memory_mib=64), pictures).finish()
    told = _fill(CoresetStream(16, 150, memory_mib=64, expected_rows=expected), pictures).finish()
    assert torch.equal(told.arrivals, plain.arrivals) and torch.equal(told.owners, plain.owners)
    assert (told.num_seen, told.reductions) == (2000, 1)


def test_the_last_growth_starts_from_half_the_room_at_most() -> None:
    stream = CoresetStream(16, 50, memory_mib=8)
    near = CoresetStream(16, 50, memory_mib=8, expected_rows=stream.room - 5)
    rows = _features(1000, 16)
    sizes = {id(one): {len(one._buffer)} for one in (stream, near)}
    for one in (stream, near):
        for owner in range(one.room // 1000 + 1):
            one.add(rows, owner)
            sizes[id(one)].add(len(one._buffer))
    for found in sizes.values():
        assert max(found) == stream.room and sorted(found)[-2] <= stream.room // 2


def test_rows_that_were_handed_over_may_be_changed() -> None:
    pictures = _features(2000, 16).reshape(20, 100, 16)
    expected = _fill(_stream(16, 150, 333), pictures).finish()
    stream = _stream(16, 150, 333)
    for owner, rows in enumerate(pictures.clone()):
        stream.add(rows, owner)
        rows.zero_()
    assert torch.equal(stream.finish().arrivals, expected.arrivals)


@pytest.mark.parametrize("block_bytes", [1, 333, 2**21])
def test_norms_taken_in_blocks_are_the_same_bits(block_bytes: int) -> None:
    rows = _features(500, 267)
    assert torch.equal(_half_norms(rows, block_bytes), rows.square().sum(1) / 2)


def test_stream_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(UsageError, match="memory_mib to at least") as refused:
        CoresetStream(1536, 20480, memory_mib=256)
    needed = int(str(refused.value).split("at least ")[1].split(",")[0])
    CoresetStream(1536, 20480, memory_mib=needed)
    with pytest.raises(UsageError):
        CoresetStream(1536, 20480, memory_mib=needed - 1)
    with pytest.raises(UsageError, match="at least 1"):
        CoresetStream(8, 0)
    stream = CoresetStream(8, 10)
    with pytest.raises(UsageError, match="no rows"):
        stream.finish()
    with pytest.raises(UsageError, match="do not fit"):
        stream.add(torch.zeros(3, 9), 0)
    with pytest.raises(UsageError, match="picture 4"):
        stream.add(torch.full((3, 8), torch.nan), 4)


def test_prediction_grows_with_the_work() -> None:
    few, many = predict(5_000, 64, 500), predict(200_000, 64, 5_000)
    assert 0 < few[0] < many[0] and 0 < few[1] < many[1]
    stream = CoresetStream(64, 500)
    assert stream.expect(400)[0] == 0
    assert stream.expect(10**7)[0] > stream.expect(10_000)[0] > 0
    assert stream.expect(10**9)[1] <= 256


_PEAK = """
import resource, sys, torch
from fettle.layers.coreset import CoresetStream, sparse_projection
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
def select(num_pictures):
    stream = CoresetStream(128, 512, projection=sparse_projection(128, 64, generator), memory_mib=16)
    for owner in range(num_pictures):
        stream.add(torch.randn(512, 128, generator=generator), owner)
    reductions = stream.finish().reductions
    return reductions, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, start = select(3)  # libraries come in
reductions, peak = select(int(sys.argv[1]))
print(start, peak, reductions)
"""


def test_peak_memory_does_not_grow_with_the_pictures() -> None:
    peaks = []
    for number in (350, 1400):
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(number)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        start, peak, reductions = (int(word) for word in done.stdout.split())
        assert reductions > 3
        peaks.append(peak)
        assert (peak - start) / 1024 < 1.5 * 16  # the bound, and what the allocator adds
    assert peaks[1] < 1.1 * peaks[0]
