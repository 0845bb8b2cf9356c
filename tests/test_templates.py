"""Templates: on the card with their own score, told where they are unusual, and put in each other's place."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import textured, write_good, write_product
from fettle.backbones import load_backbone
from fettle.detector import Detector
from fettle.errors import ConfigError, DataError, PictureError, UsageError
from fettle.feature_stream import framed_picture
from fettle.images.decode import file_sha256
from fettle.images.framing import Frame
from fettle.inspection import Inspection
from fettle.layers.energy_scale import EnergyScale
from fettle.templates import judge_templates, shown_templates, with_template
from templated_toys import FIT, Comparing, ComparingConfig, register

SQUARE = Frame(mode="stretch", height=32, width=32)
TINY: dict[str, object] = {"backbone": "tiny", "weights": "random", "size": 64}


def toy(**levels: float) -> Comparing:
    """Each product's template is one grey level, and so is its own score: the mean picture is black."""
    method = Comparing(load_backbone("tiny", ("stride8",), weights="random"), ComparingConfig(), ("stride8",))
    method.mean = torch.zeros(3, 32, 32)
    method.pixels = torch.stack([torch.full((3, 32, 32), level) for level in levels.values()])
    method.valid = torch.ones(len(levels), 1, 32, 32, dtype=torch.bool)
    method._say([[f"{product}.png", "ab" * 32, product] for product in levels])
    return method


def warned(method: Comparing, scores: dict[str, list[float]]) -> list[str]:
    """The warnings, with good pictures' scores by product."""
    flat = [score for own in scores.values() for score in own]
    products = [product for product, own in scores.items() for _ in own]
    return judge_templates(method, flat, products, "cpu").warnings


# --- judged by themselves


def test_a_template_is_told_with_its_own_score() -> None:
    facts = judge_templates(toy(nut=0.25), [], [], "cpu")
    assert facts.card == [
        {"name": "nut.png", "sha256": "ab" * 32, "product": "nut", "score": pytest.approx(0.25)}
    ]


@pytest.mark.parametrize(("level", "is_unusual"), [(0.94, False), (0.96, True)])
def test_a_template_above_nineteen_of_twenty_good_pictures_is_unusual(level: float, is_unusual: bool) -> None:
    scores = [i / 100 for i in range(101)]
    assert bool(warned(toy(nut=level), {"nut": scores})) is is_unusual


def test_the_warning_names_the_file_and_both_ways_out() -> None:
    (warning,) = warned(toy(nut=0.9), {"nut": [0.1] * 8})
    assert warning.startswith("Unusual template: 'nut.png' itself scores 0.9, more than 95% of the 8 good")
    assert "--set template=medoid" in warning and "fettle calibrate --template FILE" in warning


def test_below_eight_good_pictures_none_is_called_unusual() -> None:
    assert warned(toy(nut=0.9), {"nut": [0.1] * 7}) == []


def test_good_pictures_of_another_product_say_nothing_of_it() -> None:
    method = toy(bolt=0.5, nut=0.9)
    (warning,) = warned(method, {"bolt": [0.1] * 8, "nut": [0.95] * 8})
    assert "'bolt.png'" in warning


def test_a_template_of_no_product_is_held_against_all() -> None:
    method = toy(nut=0.9)
    method._say([["nut.png", "ab" * 32, ""]])
    assert len(warned(method, {"bolt": [0.1] * 4, "nut": [0.2] * 4})) == 1


def test_a_method_without_templates_has_no_facts(good_folder: Path) -> None:
    detector = Detector.fit(good_folder, **TINY)
    assert judge_templates(detector.method, [0.0] * 9, [""] * 9, "cpu") == ([], [])
    assert detector.templates() == [] and "templates" not in detector.card


def test_templates_are_shown_as_pixels() -> None:
    (shown,) = shown_templates(toy(nut=0.2))
    assert (shown.name, shown.product) == ("nut.png", "nut")
    assert shown.pixels.dtype == np.uint8 and shown.pixels.shape == (32, 32, 3)
    assert (shown.pixels == 51).all()


# --- put in each other's place


def picture(path: Path, grey: int = 102) -> Path:
    Image.fromarray(np.full((32, 32, 3), grey, np.uint8)).save(path)
    return path


def test_a_copy_gets_the_template_and_the_method_stays_as_it_is(tmp_path: Path) -> None:
    method = toy(nut=0.2)
    changed, sha256 = with_template(method, picture(tmp_path / "new.png"), "", SQUARE, "cpu")
    assert [(own.name, own.sha256) for own in changed.templates()] == [("new.png", sha256)]  # type: ignore[attr-defined]
    assert changed.templates()[0].pixels.unique().tolist() == [pytest.approx(0.4)]  # type: ignore[attr-defined]
    assert sha256 == file_sha256(tmp_path / "new.png")
    assert method.templates()[0].name == "nut.png" and method.pixels.unique().tolist() == [pytest.approx(0.2)]


def test_the_copy_shares_the_backbone(tmp_path: Path) -> None:
    method = toy(nut=0.2)
    changed, _ = with_template(method, picture(tmp_path / "new.png"), "", SQUARE, "cpu")
    assert changed.backbone is method.backbone


def test_the_energy_scale_of_the_copy_alone_is_raw_again(tmp_path: Path) -> None:
    method = toy(nut=0.2)
    method.settle(torch.linspace(3, 5, 101))
    changed, _ = with_template(method, picture(tmp_path / "new.png"), "", SQUARE, "cpu")
    raw = EnergyScale().state_dict()
    assert changed.scale.state_dict() == raw != method.scale.state_dict()  # type: ignore[attr-defined]


def test_a_named_product_alone_gets_the_template(tmp_path: Path) -> None:
    method = toy(bolt=0.1, nut=0.2)
    changed, _ = with_template(method, picture(tmp_path / "new.png"), "nut", SQUARE, "cpu")
    assert [own.name for own in changed.templates()] == ["bolt.png", "new.png"]  # type: ignore[attr-defined]


def test_a_method_without_templates_is_refused_with_a_remedy(good_folder: Path) -> None:
    detector = Detector.fit(good_folder, **TINY)
    with pytest.raises(UsageError, match=r"'patchcore' compares with no template\. Leave the template out"):
        detector.recalibrated(good_folder, template="not read.png")


# --- through a fit and a calibration


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Detector]:
    register(monkeypatch)

    def fit(good: Path, **more: Any) -> Detector:
        return Detector.fit(good, **{**FIT, "seed": 0, **more})

    return fit


def odd(path: Path) -> Path:
    """A picture that is unlike the good ones."""
    Image.fromarray(255 - textured(7)).save(path)
    return path


def good_with_odd_first(folder: Path) -> Path:
    """40 good pictures; the one that the toy takes for its template is unlike the others."""
    odd(write_good(folder, 40) / "000.png")
    return folder


def test_the_card_of_a_fit_has_the_templates(fit: Callable[..., Detector], good_folder: Path) -> None:
    detector = fit(good_folder)
    (kept,) = detector.card["templates"]  # type: ignore[union-attr]
    (answer,) = detector.inspect([good_folder / kept["name"]])
    assert isinstance(answer, Inspection)
    assert kept == {
        "name": answer.path.rsplit("/")[-1],
        "sha256": answer.sha256,
        "product": "",
        "score": pytest.approx(answer.score, rel=1e-5),
    }
    assert detector.describe()["templates"] == [kept]
    assert not any("itself scores" in warning for warning in detector.warnings())


def test_a_fit_warns_of_an_unusual_template(fit: Callable[..., Detector], tmp_path: Path) -> None:
    detector = fit(good_with_odd_first(tmp_path / "good"), calibration="kfold")
    assert any(
        warning.startswith("Unusual template: '000.png' itself scores") for warning in detector.warnings()
    )


def bolts_and_nuts(root: Path, first: int) -> Path:
    for number, name in enumerate(("bolt", "nut"), first):
        write_product(root / name, number)
    return root


def test_a_product_has_its_own_template_on_the_card(fit: Callable[..., Detector], tmp_path: Path) -> None:
    detector = fit(bolts_and_nuts(tmp_path, 0), multi_class=True, calibration="kfold")
    assert [(own["name"], own["product"]) for own in detector.card["templates"]] == [  # type: ignore[union-attr,call-overload,index]
        ("0.png", "bolt"),
        ("1000.png", "nut"),
    ]


def test_a_new_template_needs_fresh_pictures_of_every_product(
    fit: Callable[..., Detector], tmp_path: Path
) -> None:
    detector = fit(bolts_and_nuts(tmp_path / "good", 0), multi_class=True)
    fresh = bolts_and_nuts(tmp_path / "fresh", 3)
    template = {"template": fresh / "bolt" / "test" / "good" / "3100.png", "template_product": "bolt"}
    moved = detector.recalibrated(fresh, **template)  # type: ignore[arg-type]
    assert {name: own.num_pictures for name, own in moved.product_calibrations.items()} == {
        "bolt": 24,
        "nut": 24,
    }
    shutil.rmtree(fresh / "nut")
    with pytest.raises(DataError, match=r"template changes, and there is no fresh picture of nut\."):
        detector.recalibrated(fresh, **template)  # type: ignore[arg-type]


def test_a_new_template_sets_thresholds_and_energy_scale_anew(
    fit: Callable[..., Detector], tmp_path: Path
) -> None:
    detector = fit(write_good(tmp_path / "good", 24))
    fresh = write_good(tmp_path / "fresh", 30, first_seed=2000)
    plain, moved = (detector.recalibrated(fresh, template=own) for own in (None, odd(tmp_path / "odd.png")))
    scores = sorted(a.score for a in moved.inspect(sorted(fresh.iterdir())) if isinstance(a, Inspection))
    assert moved.calibration.scores == pytest.approx(scores, rel=1e-5)
    assert min(moved.calibration.scores) > max(plain.calibration.scores)
    views = [framed_picture(path, moved.frame, "cpu") for path in sorted(fresh.iterdir())]
    energies = torch.cat([moved.method.patch_energy(own.pixels, own.valid).flatten() for own in views])
    assert float(energies.median()) == pytest.approx(0, abs=1e-3)
    assert float(energies.quantile(0.99)) == pytest.approx(1, abs=0.1)


def test_the_old_detector_stays_as_it_is(fit: Callable[..., Detector], tmp_path: Path) -> None:
    detector = fit(write_good(tmp_path / "good", 24))
    state = {name: tensor.clone() for name, tensor in detector.method.state_dict().items()}
    card, calibration = copy.deepcopy(detector.card), detector.calibration
    detector.recalibrated(
        write_good(tmp_path / "fresh", 20, first_seed=2000), template=odd(tmp_path / "o.png")
    )
    assert all(torch.equal(state[name], own) for name, own in detector.method.state_dict().items())
    assert (detector.card, detector.calibration) == (card, calibration)


def test_the_card_tells_that_the_template_changed(fit: Callable[..., Detector], tmp_path: Path) -> None:
    detector = fit(good_with_odd_first(tmp_path / "good"), calibration="kfold")
    fresh = write_good(tmp_path / "fresh", 20, first_seed=2000)
    moved = detector.recalibrated(
        fresh, template=shutil.copy(tmp_path / "good" / "005.png", tmp_path / "n.png")
    )
    sha256 = file_sha256(tmp_path / "n.png")
    assert moved.card["template_changes"] == [{"name": "n.png", "sha256": sha256, "product": ""}]
    assert [(own["name"], own["sha256"]) for own in moved.card["templates"]] == [("n.png", sha256)]  # type: ignore[union-attr,call-overload,index]
    assert not any(warning.startswith("Unusual template") for warning in moved.warnings())
    moved.save(tmp_path / "model")
    described = Detector.load(tmp_path / "model").describe()
    assert described["template_changes"] == moved.card["template_changes"]
    assert [own.name for own in Detector.load(tmp_path / "model").templates()] == ["n.png"]


def test_an_unusual_new_template_is_told(fit: Callable[..., Detector], tmp_path: Path) -> None:
    detector = fit(write_good(tmp_path / "good", 24))
    fresh = write_good(tmp_path / "fresh", 20, first_seed=2000)
    moved = detector.recalibrated(fresh, template=odd(tmp_path / "odd.png"))
    assert any("'odd.png' itself scores" in warning for warning in moved.warnings())


def test_the_new_template_sets_no_threshold_itself(fit: Callable[..., Detector], tmp_path: Path) -> None:
    detector = fit(write_good(tmp_path / "good", 24))
    fresh = write_good(tmp_path / "fresh", 20, first_seed=2000)
    moved = detector.recalibrated(fresh, template=fresh / "003.png")
    assert moved.calibration.num_pictures == 19
    assert moved.recalibrated(fresh).calibration.num_pictures == 19


def test_a_calibration_without_a_template_keeps_the_method(
    fit: Callable[..., Detector], good_folder: Path, tmp_path: Path
) -> None:
    detector = fit(good_folder)
    moved = detector.recalibrated(write_good(tmp_path / "fresh", 20, first_seed=2000))
    assert moved.method is detector.method
    assert moved.card["templates"] == detector.card["templates"]
    assert "Unusual template: said by the toy." in moved.warnings()


def test_a_new_template_drops_the_models_of_folds(fit: Callable[..., Detector], tmp_path: Path) -> None:
    crossed = fit(write_good(tmp_path / "good", 24), calibration="cross")
    assert crossed.fold_methods
    fresh = write_good(tmp_path / "fresh", 20, first_seed=2000)
    assert crossed.recalibrated(fresh, template=fresh / "003.png").fold_methods == ()


def test_what_cannot_be_a_template_is_refused_before_the_work(
    fit: Callable[..., Detector], good_folder: Path, tmp_path: Path
) -> None:
    detector = fit(good_folder)
    with pytest.raises(PictureError, match=r"nowhere\.png"):
        detector.recalibrated(tmp_path / "not read", template=tmp_path / "nowhere.png")
    with pytest.raises(ConfigError, match="0 templates of 'nut'"):
        detector.recalibrated(tmp_path / "not read", template=good_folder / "000.png", template_product="nut")
    with pytest.raises(UsageError, match="Give --template FILE too"):
        detector.recalibrated(tmp_path / "not read", template_product="nut")
