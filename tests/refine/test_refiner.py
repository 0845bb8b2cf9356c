"""A refiner by name: what each does with a map, and who is left as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fettle.errors import ConfigError, UsageError
from fettle.refine import refiner as module
from fettle.refine.blur import light_blur
from fettle.refine.facts import LighterScale, RefineFacts, stand_in_facts
from fettle.refine.grabcut import have_opencv
from fettle.refine.guided import guided_map
from fettle.refine.refiner import REFINERS, Refiner, make_refiner
from fettle.refine.settings import PRESETS
from refine_toys import SIDE, SQUARE, GreyMethod, all_valid, grey_facts, grey_with

FACTS = RefineFacts(
    roi_high=1.5,
    peak=2.0,
    hold=0.5,
    noise_floor=0.2,
    lighter={"blur": LighterScale(3.0, 0.5), "guided": LighterScale(7.0, -0.25)},
)
INSIDE = (slice(SQUARE[0], SQUARE[0] + SQUARE[2]), slice(SQUARE[1], SQUARE[1] + SQUARE[2]))
needs_opencv = pytest.mark.skipif(not have_opencv(), reason="GrabCut needs OpenCV")
NAMES = [pytest.param(name, marks=needs_opencv if name == "grabcut" else ()) for name in REFINERS]


def refiner(name: str, settings: Mapping[str, object] | None = None, **more: Any) -> Refiner:
    of_f2pad = {"time_cap_s": 1000, "snap": "off"} if name in ("f2pad", "difference") else {}
    own = {**of_f2pad, **(settings or {})}
    return make_refiner(name, FACTS, grey_facts().references, settings=own, **more)


def pair() -> tuple[Tensor, Tensor, Tensor]:
    """Two views with a bright square, what is valid of them, and base maps that no refiner would give."""
    views = torch.stack([grey_with(SQUARE), grey_with(SQUARE)])
    base = torch.rand(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return views, all_valid(views), base


@pytest.mark.parametrize("name", NAMES)
def test_who_is_not_chosen_stays_bit_for_bit(name: str) -> None:
    views, valid, base = pair()
    before = base.clone()
    first, second = refiner(name)(GreyMethod(), views, valid, base, [False, True])  # type: ignore[arg-type]
    assert torch.equal(first.anomaly_map, before[0])
    assert first.soft is None and first.speaks is None
    assert (first.record.refined, first.record.gate_reason) == ("gate", "verdict_ok")
    assert second.record.applied and not torch.equal(second.anomaly_map, before[1])
    assert torch.equal(base, before)
    json.dumps([first.record.to_json(), second.record.to_json()], allow_nan=False)
    assert second.record.seconds > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_view_ignores_its_batch_mates(name: str) -> None:
    views, valid, base = pair()
    views[0] = grey_with((8, 40, 12), value=0.2)
    both = refiner(name)(GreyMethod(), views, valid, base, [True, True])  # type: ignore[arg-type]
    (alone,) = refiner(name)(GreyMethod(), views[1:], valid[1:], base[1:], [True])  # type: ignore[arg-type]
    torch.testing.assert_close(both[1].anomaly_map, alone.anomaly_map, rtol=1e-5, atol=1e-6)
    assert both[1].record.refined == alone.record.refined == "yes"


@pytest.mark.parametrize("name", ["f2pad", "difference", pytest.param("grabcut", marks=needs_opencv)])
def test_masks_are_the_square_and_its_map_is_above_all_else(name: str) -> None:
    views, valid, base = pair()
    _, found = refiner(name)(GreyMethod(), views, valid, base, [False, True])  # type: ignore[arg-type]
    assert found.soft is not None and found.speaks is not None
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[INSIDE] = True
    assert torch.equal(found.soft > 0.5, expected)
    assert bool(found.speaks.all())
    corner = found.anomaly_map[:6, -6:]
    assert torch.equal(corner, base[1].clamp_max(FACTS.peak)[:6, -6:])
    assert float(found.anomaly_map[~expected].max()) <= FACTS.peak
    assert float(found.anomaly_map[expected].min()) > FACTS.peak / 2
    assert found.soft.shape == found.anomaly_map.shape == (SIDE, SIDE)


def test_difference_is_f2pad_without_an_iteration() -> None:
    views, valid, base = pair()
    made = refiner("difference")
    _, found = made(GreyMethod(), views, valid, base, [False, True])  # type: ignore[arg-type]
    _, full = refiner("f2pad", {"iters": 9})(GreyMethod(), views, valid, base, [False, True])  # type: ignore[arg-type]
    assert found.record.iterations == 0 < full.record.iterations <= 9
    assert made.describe()["settings"]["iters"] == 0  # type: ignore[index,call-overload]  # JSON


@pytest.mark.parametrize("name", ["blur", "guided"])
def test_lighter_maps_are_in_the_base_maps_unit(name: str) -> None:
    views, valid, base = pair()
    valid[:, :, :, 40:] = False
    method = GreyMethod()
    _, found = refiner(name)(method, views, valid, base, [False, True])  # type: ignore[arg-type]
    z = method.patch_energy(views[1:], valid[1:])
    if name == "blur":
        expected = 3.0 * light_blur(z, valid[1:])[0] + 0.5
    else:
        expected = 7.0 * guided_map(z, views[1:], valid[1:])[0] - 0.25
    torch.testing.assert_close(found.anomaly_map[:, :40], expected[:, :40])
    assert not found.anomaly_map[:, 40:].any()
    assert found.soft is None and found.speaks is None
    assert (found.record.refined, found.record.applied) == ("yes", True)


@needs_opencv
def test_grabcut_says_where_it_finds_nothing() -> None:
    views, valid, base = pair()
    views[0] = 0.5
    made = refiner("grabcut")
    first, second = made(GreyMethod(), views, valid, base, [True, True])  # type: ignore[arg-type]
    assert (first.record.refined, first.record.applied) == ("empty_roi", False)
    assert torch.equal(first.anomaly_map, base[0]) and first.soft is None
    assert second.record.roi_pixels >= SQUARE[2] ** 2


@needs_opencv
def test_grabcut_without_seeds_is_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    views, valid, base = pair()
    monkeypatch.setattr(module, "grabcut_of_map", lambda pixels, z, roi: np.zeros(roi.shape, bool))
    _, found = refiner("grabcut")(GreyMethod(), views, valid, base, [False, True])  # type: ignore[arg-type]
    assert (found.record.refined, found.record.gate_reason) == ("gate", "insufficient")
    assert torch.equal(found.anomaly_map, base[1])


def test_f2pad_gets_the_facts_and_settings() -> None:
    """Good pictures' energies that say nothing, and a region that is too large for the setting."""
    views, valid, base = pair()
    flat = make_refiner("f2pad", FACTS.model_copy(update={"flat": True}), None)
    (_, found) = flat(GreyMethod(), views, valid, base, [False, True])  # type: ignore[arg-type]
    assert found.record.gate_reason == "flat_energy"
    small = refiner("f2pad", {"max_roi_share": 0.01})
    (_, found) = small(GreyMethod(), views, valid, base, [False, True])  # type: ignore[arg-type]
    assert found.record.gate_reason == "roi_too_large"
    high = make_refiner("f2pad", FACTS.model_copy(update={"roi_high": 9.0}), None)
    (_, found) = high(GreyMethod(), views, valid, base, [False, True])  # type: ignore[arg-type]
    assert found.record.refined == "empty_roi"


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_a_product_get_its_facts(name: str) -> None:
    """Product b's region must reach higher than any does, and its less blurred maps are lower."""
    views, valid, base = pair()
    lower = {"blur": LighterScale(0.1, 0.0), "guided": LighterScale(0.1, 0.0)}
    of_b = FACTS.model_copy(update={"roi_high": 9.0, "lighter": lower})
    made = refiner(name, product_facts={"b": of_b})
    method = GreyMethod()
    alone = refiner(name)(method, views, valid, base, [True, True])  # type: ignore[arg-type]
    found = made(method, views, valid, base, [True, True], [0, 1], ["b", "a"])  # type: ignore[arg-type]
    assert torch.equal(found[1].anomaly_map, alone[1].anomaly_map)
    assert not torch.equal(found[0].anomaly_map, alone[0].anomaly_map)
    if name not in ("blur", "guided"):
        assert [one.record.refined for one in found] == ["empty_roi", alone[1].record.refined]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_all_products_together_are_told(name: str) -> None:
    """Not where the product's own were taken, nothing was done, or the model is of one product."""
    views, valid, base = pair()
    method = GreyMethod()
    made = refiner(name, product_facts={"b": FACTS})

    def notes(chosen: list[bool], products: list[str] | None) -> list[list[str]]:
        found = made(method, views, valid, base, chosen, [0, 1], products)  # type: ignore[arg-type]
        return [[n for n in one.record.notes if "all products together" in n] for one in found]

    unnamed = "Numbers of all products together were used: no product was named."
    other = "Numbers of all products together were used: 'a' has none of its own."
    assert notes([True, True], None) == [[unnamed], [unnamed]]
    assert notes([True, True], ["b", "a"]) == [[], [other]]
    assert notes([False, True], ["", ""]) == [[], [unnamed]]
    made = refiner(name)
    assert notes([True, True], ["a", ""]) == [[], []]


def test_a_refiner_says_what_it_works_with() -> None:
    described = refiner("f2pad", {"iters": 5}, everything=True).describe()
    json.dumps(described, allow_nan=False)
    assert {name: described[name] for name in ("name", "all", "facts_measured", "references")} == {
        "name": "f2pad",
        "all": True,
        "facts_measured": True,
        "references": 2,
    }
    assert described["settings"]["iters"] == 5  # type: ignore[index,call-overload]  # JSON
    bare = make_refiner("blur", stand_in_facts(None), None).describe()
    assert (bare["facts_measured"], bare["references"], bare["all"]) == (False, 0, False)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no refiner 'gided'.*guided"):
        make_refiner("gided", FACTS, None)


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no field 'iter'.*iters"):
        make_refiner("f2pad", FACTS, None, settings={"iter": 3})


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("blur", "kappa"),
        ("guided", "iters"),
        pytest.param("grabcut", "max_roi_share", marks=needs_opencv),
        ("difference", "iters"),
        ("difference", "eta"),
    ],
)
def test_a_field_that_a_refiner_has_no_use_for_is_refused(name: str, field: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' takes no '{field}'"):
        make_refiner(name, FACTS, None, settings={field: 1})


def test_presets_are_of_f2pad_and_of_its_difference() -> None:
    assert make_refiner("f2pad", FACTS, None).config == PRESETS["compact"]
    assert make_refiner("f2pad", FACTS, None, preset="default").config == PRESETS["default"]
    assert make_refiner("difference", FACTS, None, preset="default").config.refs == 32
    with pytest.raises(UsageError, match=r"no preset 'compakt'.*compact"):
        make_refiner("f2pad", FACTS, None, preset="compakt")
    with pytest.raises(UsageError, match="'blur' takes no preset"):
        make_refiner("blur", FACTS, None, preset="default")


def test_only_the_references_in_use_are_there_and_told() -> None:
    kept = grey_facts().references
    assert kept is not None
    one = make_refiner("f2pad", FACTS, kept, settings={"refs": 1})
    assert (
        one.references is not None and len(one.references.pixels) == 1 and one.describe()["references"] == 1
    )
    assert make_refiner("f2pad", FACTS, kept).references is kept
    none = make_refiner("f2pad", FACTS, kept, settings={"fill": "diffusion"})
    assert none.references is None and none.describe()["references"] == 0


def test_spectra_of_references_outlast_a_batch() -> None:
    views, valid, base = pair()
    made = refiner("f2pad", {"refs": 1})
    made(GreyMethod(), views, valid, base, [True, True])  # type: ignore[arg-type]
    assert made.references is not None and "spectra" in vars(made.references)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["raises", "nan"])
def test_a_picture_that_fails_keeps_its_map_and_others_go_on(name: str, broken: str) -> None:
    def fail(z: Tensor, pictures: Tensor) -> Tensor:
        marked = pictures[:, 0, 0, 0] > 0.9
        if broken == "raises" and bool(marked.any()):
            raise RuntimeError("the network broke\nat great length")
        return z.masked_fill(marked[:, None, None], float("nan"))

    views, valid, base = pair()
    views[0, :, 0, 0] = 1
    first, second = refiner(name)(GreyMethod(fail), views, valid, base, [True, True])  # type: ignore[arg-type]
    assert (first.record.refined, first.record.applied, first.soft) == ("error", False, None)
    said = {"raises": "RuntimeError: the network broke.", "nan": "The patch energy of this picture is NaN"}
    assert first.record.error.startswith(said[broken])
    assert torch.equal(first.anomaly_map, base[0])
    assert second.record.refined == "yes"


def test_grabcut_needs_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "have_opencv", lambda: False)
    with pytest.raises(UsageError, match=r"needs OpenCV.*fettle\[refine\]"):
        make_refiner("grabcut", FACTS, None)
    make_refiner("f2pad", FACTS, None)  # the rest does without
