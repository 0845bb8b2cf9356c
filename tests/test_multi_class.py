"""One model for many products: thresholds and metrics of each, one shared, no label in the network."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import textured, write_product
from fettle.datasets.products import open_products
from fettle.detector import Detector
from fettle.errors import DataError, UsageError
from fettle.inspection import Inspection
from fettle.refining import ForRefiners

TINY = {"backbone": "tiny", "weights": "random", "size": 64, "settings": {"bank_rows": 200}}
PRODUCTS = ("bolt", "nut", "plate")
KEYS = {"image_auroc", "pixel_auroc", "pixel_ap", "aupro", "frr_promised", "frr_measured", "escape_rate"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("products")
    for number, name in enumerate(PRODUCTS):
        write_product(folder / name, number)
    return folder


@pytest.fixture(scope="module")
def detector(root: Path) -> Detector:
    return Detector.fit(root, multi_class=True, **TINY)


def test_each_product_has_its_own_thresholds_and_all_share_one(detector: Detector) -> None:
    assert set(detector.product_calibrations) == set(PRODUCTS)
    assert all(own.num_scores == 24 for own in detector.product_calibrations.values())
    assert detector.calibration.num_scores == 72
    reviews = {own.t_review for own in detector.product_calibrations.values()}
    assert len(reviews) == 3


def test_the_product_chooses_the_threshold_and_nothing_else(detector: Detector, root: Path) -> None:
    paths = sorted((root / "nut" / "test").rglob("*.png"))
    own = list(detector.inspect(paths, product="nut"))
    shared = list(detector.inspect(paths))
    for one, other in zip(own, shared, strict=True):
        assert isinstance(one, Inspection) and isinstance(other, Inspection)
        assert one.score == other.score
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        assert one.verdict is detector.product_calibrations["nut"].verdict(one.score)
        assert other.verdict is detector.calibration.verdict(one.score)


def test_refiners_know_each_product_and_a_saved_model_keeps_it(detector: Detector, tmp_path: Path) -> None:
    detector.save(tmp_path / "model")
    for known in (detector.for_refiners, Detector.load(tmp_path / "model").for_refiners):
        assert known is not None and set(known.product_facts) == set(PRODUCTS)
        for name, own in known.product_facts.items():
            assert own.hold == detector.product_calibrations[name].pixel_threshold
        assert known.product_facts == detector.for_refiners.product_facts  # type: ignore[union-attr]  # not None


def test_a_refiner_takes_the_facts_of_the_named_product(detector: Detector, root: Path) -> None:
    assert detector.for_refiners is not None
    facts = detector.for_refiners.facts
    kept = ForRefiners(facts.model_copy(update={"flat": True}), None, {"nut": facts})
    own = Detector.of(replace(detector.parts(), for_refiners=kept), detector.device)
    refiner = own.refiner("f2pad", everything=True)
    paths = sorted((root / "nut" / "test").rglob("*.png"))[:2]
    for product in ("nut", "bolt", ""):
        for one in own.inspect(paths, product=product, refine=refiner):
            assert isinstance(one, Inspection) and one.refinement is not None
            assert (one.refinement["gate_reason"] == "flat_energy") is (product != "nut")


def test_an_unknown_product_is_refused_with_the_nearest(detector: Detector, root: Path) -> None:
    with pytest.raises(UsageError, match=r"no product 'nutt'.*'nut'"):
        list(detector.inspect(sorted((root / "nut" / "test" / "good").iterdir()), product="nutt"))


def test_evaluate_gives_each_product_the_mean_and_all_pooled(detector: Detector, root: Path) -> None:
    result = detector.evaluate(root)
    per_product = result["per_product"]
    assert set(per_product) == set(PRODUCTS)
    for key in ("image_auroc", "pixel_ap", "escape_rate"):
        mean = np.mean([per_product[name][key] for name in PRODUCTS])
        assert result["mean"][key] == pytest.approx(mean)
    assert result["mean"]["promise_on"] == "review"
    assert result["mean"]["frr_promised"] == pytest.approx(0.05)
    assert result["pooled"]["num_good"] == 12 and result["mean"]["num_defective"] == 12
    assert set(result["pooled"]["per_defect"]) == {f"{name}/scratch" for name in PRODUCTS}
    assert all(set(values) >= KEYS for values in (*per_product.values(), result["mean"], result["pooled"]))
    assert all(0.9 <= per_product[name]["image_auroc"] <= 1 for name in PRODUCTS)


def test_refused_pictures_and_ones_that_were_learnt_from_are_counted_by_product(
    detector: Detector, root: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "parts"
    shutil.copytree(root, pictures)
    learnt, seen = (sorted((pictures / "bolt" / part / "good").iterdir()) for part in ("train", "test"))
    shutil.copy(learnt[0], seen[0])
    sorted((pictures / "nut" / "test" / "scratch").iterdir())[0].write_bytes(b"broken")
    result = detector.evaluate(pictures)

    def counts(of: dict[str, Any]) -> tuple[int, int]:
        return of["num_refused"], of["num_seen_in_fit"]

    assert counts(result) == (1, 1)
    assert counts(result["per_product"]["bolt"]) == (0, 1)
    assert counts(result["per_product"]["nut"]) == (1, 0)


def test_one_product_gives_the_flat_keys_of_that_product(detector: Detector, root: Path) -> None:
    alone, among = detector.evaluate(root, product="bolt"), detector.evaluate(root)["per_product"]["bolt"]
    for key in KEYS:
        assert alone[key] == among[key]


def test_one_products_own_folder_will_do(detector: Detector, root: Path) -> None:
    alone, among = detector.evaluate(root / "bolt", product="bolt"), detector.evaluate(root, product="bolt")
    for key in KEYS:
        assert alone[key] == among[key]


def test_several_products_under_one_threshold_are_named(root: Path) -> None:
    dataset = open_products(root)
    assert any("--multi-class" in warning for warning in Detector.fit(dataset, **TINY).warnings())


def test_saved_models_keep_their_products(detector: Detector, root: Path, tmp_path: Path) -> None:
    detector.save(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model")
    assert loaded.product_calibrations == detector.product_calibrations
    for one, other in zip(
        [detector.evaluate(root)["pooled"], detector.evaluate(root)["mean"]],
        [loaded.evaluate(root)["pooled"], loaded.evaluate(root)["mean"]],
        strict=True,
    ):
        assert {k: v for k, v in one.items() if k != "seconds_per_image"} == {
            k: v for k, v in other.items() if k != "seconds_per_image"
        }


def test_labels_of_products_do_not_reach_the_network(root: Path, tmp_path: Path) -> None:
    """The same pictures under other names of products: the same map and score."""
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for name, other in zip(PRODUCTS, ("x", "z", "y"), strict=True):
        (renamed / other).symlink_to(root / name)
    first, second = (Detector.fit(r, multi_class=True, **TINY) for r in (root, renamed))
    assert first.calibration.scores == second.calibration.scores


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """22 good pictures of each product."""
    for number, name in enumerate(PRODUCTS):
        folder = tmp_path / "fresh" / name
        folder.mkdir(parents=True)
        for i in range(22):
            pixels = textured(5000 + 100 * number + i) // 2 + 40 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "fresh"


def test_fresh_pictures_set_every_product_anew(detector: Detector, fresh: Path) -> None:
    moved = detector.recalibrated(fresh)
    assert all(own.num_scores == 22 for own in moved.product_calibrations.values())
    assert moved.calibration.num_scores == 66
    assert not moved.card["calibration_notes"]


def test_without_fresh_pictures_of_all_the_shared_thresholds_stay(detector: Detector, fresh: Path) -> None:
    """They come from all products. What is said of one calibration is not said of the next."""
    whole = detector.recalibrated(fresh)
    for moved in (
        detector.recalibrated(fresh, product="nut"),
        detector.recalibrated(fresh / "nut", product="nut"),
    ):
        assert moved.product_calibrations["nut"] == whole.product_calibrations["nut"]
        assert moved.product_calibrations["plate"] == detector.product_calibrations["plate"]
        assert moved.calibration == detector.calibration
        assert moved.card["promise"] == " ".join(detector.calibration.sentences())
        assert any("No fresh picture of bolt, plate" in warning for warning in moved.warnings())
        assert moved.recalibrated(fresh).warnings() == detector.warnings()
    with pytest.raises(DataError, match="--product"):
        detector.recalibrated(fresh / "nut")


def test_a_model_of_one_product_is_not_calibrated_for_another(root: Path) -> None:
    alone = Detector.fit(root / "nut", **TINY)
    with pytest.raises(UsageError, match="knows no products"):
        alone.recalibrated(root / "nut", product="nut")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "padim", "settings": {}, "multi_class": True}, "cannot hold many products"),
        ({"products": ("nut",)}, "--multi-class"),
        ({"calibration": "cross", "multi_class": True}, "kfold"),
        ({"multi_class": True, "products": ("nit",)}, "'nut'"),
    ],
)
def test_what_does_not_go_together_is_refused(root: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Detector.fit(root, **{**TINY, **settings})


def test_a_product_that_cannot_be_divided_is_named(tmp_path: Path) -> None:
    for number, name in enumerate(("bolt", "nut")):
        write_product(tmp_path / name, number)
    good = tmp_path / "nut" / "train" / "good"
    for path in sorted(good.iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"Product 'nut' has 1 good picture.*--shots"):
        Detector.fit(tmp_path, multi_class=True, calibration="holdout", **TINY)
