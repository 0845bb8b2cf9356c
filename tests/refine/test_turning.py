"""Turned places: parts in another pose are filled closely, and nothing turns without a reason."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fettle.refine import turning
from fettle.refine.fill import Fill, fill_roi
from fettle.refine.references import References
from fettle.refine.search import Window, best_window
from fettle.refine.turning import Place, Surroundings, closer_place

SIDE = 128


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(*pictures: Tensor) -> References:
    return References.from_views(torch.stack(pictures), torch.ones(len(pictures), 1, SIDE, SIDE) > 0)


def part(turn: float = 0, right: float = 0, down: float = 0) -> Tensor:
    """(3, H, W): a bar with a bright hole and a dark one, turned (degrees) and shifted (px); smooth edges."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 63.5 - down, torch.arange(SIDE) - 63.5 - right, indexing="ij")
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    along, across = cos * x + sin * y, cos * y - sin * x
    bar = torch.sigmoid(34 - along.abs()) * torch.sigmoid(16 - across.abs())
    bright = torch.sigmoid(6 - torch.hypot(along - 22, across))
    dark = torch.sigmoid(9 - torch.hypot(along + 16, across - 4))
    grey = 0.3 + 0.3 * bar + 0.3 * bright - 0.4 * dark
    return torch.stack([grey, 0.9 * grey, 0.8 * grey])


def disc(y: float, x: float, radius: float = 14) -> Tensor:
    rows, columns = torch.arange(SIDE).float()[:, None], torch.arange(SIDE).float()[None]
    return torch.hypot(rows - y, columns - x) <= radius


def error(fill: Fill, good: Tensor, roi: Tensor) -> float:
    return float((fill.pixels - good)[:, roi].square().mean().sqrt())


# --- where it turns


@pytest.mark.parametrize("turn", [5.5, -20, 131, 180])
def test_a_part_in_another_pose_is_filled_closely(turn: float) -> None:
    good = part(turn, right=1.4, down=-0.6)
    roi = disc(63.5, 63.5)
    damaged = torch.where(roi, 0.0, good)
    straight, turned = (fill_roi(damaged, roi, kept(part()), turn=on) for on in (False, True))
    assert error(turned, good, roi) < 0.2 * error(straight, good, roi)
    assert turned.turn == pytest.approx(-turn, abs=0.5) or abs(turned.turn) == pytest.approx(180, abs=0.5)
    assert straight.turn == 0


def test_a_shift_of_less_than_a_pixel_is_found() -> None:
    good, roi = part(right=2.5, down=-0.4), disc(60, 70)
    damaged = torch.where(roi, 0.0, good)
    straight, moved = (fill_roi(damaged, roi, kept(part()), turn=on) for on in (False, True))
    assert error(moved, good, roi) < 0.2 * error(straight, good, roi)
    assert moved.place is not None
    assert moved.place[0] == 0
    assert moved.place[1] in (-2, -3)


def around(picture: Tensor, roi: Tensor, ring: int = 12) -> Surroundings:
    used = torch.nn.functional.max_pool2d(roi[None].float(), 2 * ring + 1, 1, ring)[0] > 0
    return Surroundings(picture, used & ~roi, used)


def closest(surroundings: Surroundings, references: References, **given: int) -> Place | None:
    window = best_window(surroundings.own, surroundings.ring, references)
    assert window is not None
    return closer_place(surroundings, references, window, **{"scale": 4, **given})


def test_the_motion_is_that_of_the_part() -> None:
    """The box is the whole picture, so that the part's own turn and shift must come out."""
    place = closest(around(part(), disc(63.5, 63.5)), kept(part(7.3, right=0.3, down=0.8)))
    # A window of 128 px has room at one place, and turned ones have none: it moves from there.
    assert place is not None
    assert place.turn == pytest.approx(7.3, abs=0.1)
    assert place.motion[:2, 2].tolist() == pytest.approx([63.5 + 0.3, 63.5 + 0.8], abs=0.05)


def test_the_light_has_no_part_in_the_motion() -> None:
    lit = around(part(right=0.4) + 0.2, disc(63.5, 63.5))
    place = closer_place(lit, kept(part()), Window(0, 0, 0), scale=4)
    assert place is not None
    assert place.motion[:2, 2].tolist() == pytest.approx([63.5 - 0.4, 63.5], abs=0.05)


# --- where it does not


def noise(seed: int) -> Tensor:
    return torch.rand(3, SIDE, SIDE, generator=seeded(seed))


def test_a_texture_of_chance_is_filled_no_worse() -> None:
    """Between pixels the sampled grain is smoother, and so by chance a little nearer."""
    good, roi = part() + 0.4 * noise(1), disc(63.5, 63.5)
    references = kept(*(part() + 0.4 * noise(seed) for seed in (2, 3)))
    straight, turned = (fill_roi(good, roi, references, turn=on) for on in (False, True))
    assert abs(turned.turn) < 2
    assert error(turned, good, roi) < 1.02 * error(straight, good, roi)


def test_a_copy_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(turning, "_turned_places")  # nothing is looked for
    good, roi = part(13, right=3.3), disc(63.5, 70)
    references = kept(part(4), part(13, right=3.3), part(170))
    straight, turned = (
        fill_roi(torch.where(roi, 0.0, good), roi, references, turn=on) for on in (False, True)
    )
    assert torch.equal(straight.pixels, turned.pixels)


def test_round_surroundings_do_not_turn_what_is_inside() -> None:
    """The ring shows circles alone, and every turn fits it as well as none."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 63.5, torch.arange(SIDE) - 63.5, indexing="ij")
    radius = torch.hypot(y, x)
    mark = 0.3 * torch.sigmoid(3 - y.abs()) * torch.sigmoid(10 - (x - 2).abs())
    good = (0.4 + 0.2 * torch.sin(radius / 2) * (radius > 14) + mark).expand(3, -1, -1)
    roi = disc(63.5, 63.5, 16)
    own, *others = ((good + 0.05 * noise(seed)).clamp(0, 1) for seed in range(5))
    fill = fill_roi(torch.where(roi, 0.0, own), roi, kept(*others))
    assert abs(fill.turn) < 0.5
    assert error(fill, own, roi) < 0.03


# --- what it may use


def test_what_is_left_out_is_not_turned_to() -> None:
    good, roi = part(60), disc(63.5, 63.5)
    references = kept(part(), part(60.5, right=0.4), part(24))
    assert fill_roi(good, roi, references).reference == 1
    assert fill_roi(good, roi, references, leave_out=1).reference in (0, 2)
    assert fill_roi(good, roi, references, leave_out={0, 1}).reference == 2


def test_what_is_left_out_is_not_turned_to_where_little_has_room() -> None:
    """A square box of 124 px can be turned by quarter turns only: four places, and more are asked for."""
    good, used = part(0.8, right=0.4), torch.zeros(SIDE, SIDE, dtype=torch.bool)
    used[2:126, 2:126] = True
    surroundings = Surroundings(
        good[:, 2:126, 2:126], (used & ~disc(63.5, 63.5))[2:126, 2:126], used[2:126, 2:126]
    )
    references = kept(part(), good)
    place = closer_place(surroundings, references, Window(0, 2, 2), scale=4, left_out=[1])
    assert place is not None
    assert place.reference == 0


@pytest.mark.parametrize("padded", [0, 3])
def test_a_place_over_the_edge_is_not_taken(padded: int) -> None:
    """It fits best 1.4 px above the first valid row."""
    picture, roi = part(down=-34), disc(22, 63, 10)
    reference = part(down=-35.4 + padded)[None]
    valid = torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool)
    valid[..., :padded, :] = False
    surroundings = around(picture, roi)
    references = References.from_views(reference, valid)
    assert best_window(picture, surroundings.ring, kept(part(down=-34))) == (0, 0, 0)
    place = closer_place(surroundings, references, Window(0, 0, 0), scale=4)
    inside = closer_place(surroundings, kept(part(down=-32.6)), Window(0, 0, 0), scale=4)
    assert inside is not None
    if place is not None:
        y, x = surroundings.used.nonzero().T - 63.5
        rows = (place.motion @ torch.stack([x, y, torch.ones_like(x)]))[1]
        assert float(rows.min()) >= padded - 0.5


def test_the_defect_has_no_part_in_the_turn() -> None:
    good, roi = part(33, down=2.2), disc(60, 66)
    first, second = (
        fill_roi(torch.where(roi, inside, good), roi, kept(part())) for inside in (0.0, noise(5))
    )
    assert first.turn == second.turn != 0
    assert torch.equal(first.pixels[:, roi], second.pixels[:, roi])


def test_a_little_light_does_not_change_the_turn() -> None:
    good, roi = part(33, down=2.2), disc(60, 66)
    light = torch.tensor([0.02, 0.04, -0.03])[:, None, None]
    lit, plain = fill_roi(good + light, roi, kept(part())), fill_roi(good, roi, kept(part()))
    assert lit.turn == pytest.approx(plain.turn, abs=0.01)
    assert error(lit, good + light, roi) < 1.5 * error(plain, good, roi)


@pytest.mark.parametrize("ring", [1, 3, 6, 12, 40, 128])
def test_any_ring_and_any_region_is_filled(ring: int) -> None:
    """Also where but a few pixels are left to match by, which fill no cell of a small picture."""
    everywhere, middle = disc(0, 0, 999), disc(50.5, 50.5, 1)  # 2 x 2 px
    for roi, valid in [
        (disc(0, 0, 9), everywhere),
        (disc(63, 127, 1), everywhere),
        (disc(63.5, 63.5, 50), everywhere),
        (disc(50, 50, 0), disc(50, 51, 0)),
        (disc(50, 50, 0), middle),
        (disc(50.5, 50.5, 4) & ~middle, middle),
        (disc(45, 50, 3), disc(45, 54, 0) | disc(49, 50, 0) | disc(41, 50, 0)),
    ]:
        fill = fill_roi(noise(1), roi, kept(part(), noise(2)), ring=ring, valid=valid | roi)
        assert fill.kind == "exemplar"
        assert bool(fill.pixels.isfinite().all())
