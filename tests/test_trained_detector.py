"""Trained methods through the whole fit: three-way split, many products, stop and go on, caches."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from conftest import write_good, write_product
from fettle.detector import Detector
from fettle.errors import DataError
from fettle.inspection import Inspection

HEAD: dict[str, object] = {
    **{"window": 3, "width": 32, "heads": 2, "ffn": 64},
    **{"steps": 40, "warmup": 0.0, "lr": 2e-3},
}
TINY: dict[str, object] = {"backbone": "tiny", "weights": "random", "size": 64}


def fit(
    good: Path, method: str = "fpfnet", head: dict[str, object] | None = None, **more: object
) -> Detector:
    return Detector.fit(good, method=method, settings={**HEAD, **(head or {})}, **{**TINY, **more})


def state(detector: Detector) -> dict[str, torch.Tensor]:
    return {k: v for k, v in detector.method.state_dict().items() if not k.startswith("backbone.")}


def assert_same(one: Detector, other: Detector) -> None:
    for name, tensor in state(one).items():
        assert torch.equal(tensor, state(other)[name]), name
    assert one.calibration == other.calibration


def test_no_picture_serves_two_purposes(tmp_path: Path) -> None:
    """Of 100 pictures 20 calibrate, a tenth of the rest watch for the early stop, 72 are learnt from."""
    detector = fit(write_good(tmp_path / "good", 100), head={"early_stop": 1.0, "steps": 10})
    assert detector.calibration.num_scores == 20
    assert detector.num_fit == 72
    assert detector.card["fit"]["held_out_normalised_loss"] is not None
    assert detector.calibration.exact


def test_many_products_hold_pictures_out_of_each(tmp_path: Path) -> None:
    for number, name in enumerate(("bolt", "nut")):
        write_product(tmp_path / name, number)
    detector = fit(tmp_path, "uniad", multi_class=True)
    assert {name: own.num_scores for name, own in detector.product_calibrations.items()} == {
        "bolt": 12,
        "nut": 12,
    }
    result = detector.evaluate(tmp_path)
    assert set(result["per_product"]) == {"bolt", "nut"}


def test_a_stopped_fit_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 30)

    def stop(what: str, done: int, total: int) -> None:
        if what == "training" and done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(good, training_dir=tmp_path / "state", progress=stop)
    said: list[str] = []
    resumed = fit(good, training_dir=tmp_path / "state", say=said.append)
    assert any("25" in sentence and "of 40" in sentence for sentence in said)
    assert_same(resumed, fit(good))


def test_without_a_cache_the_model_is_the_same(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 30)
    assert_same(fit(good, cache_dir=tmp_path / "cache"), fit(good, cache_mib=0))
    assert (
        len(list((tmp_path / "cache").rglob("*.safetensors"))) == 15
    )  # what is held out is never learnt from


def test_folds_keep_their_states_apart(tmp_path: Path) -> None:
    fit(write_good(tmp_path / "good", 30), calibration="kfold", training_dir=tmp_path / "state")
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        *(f"fold{number}" for number in range(5)),
        "final",
    }


def test_one_picture_is_learnt_from_and_nothing_is_judged(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 1)
    detector = fit(good)
    assert (detector.num_fit, detector.calibration.mode, detector.calibration.num_scores) == (1, "none", 0)
    assert detector.card["fit"]["normalised_loss"] is None
    with pytest.raises(DataError, match=r"'holdout' needs at least 2 good pictures, not 1\."):
        fit(good, calibration="holdout")


def test_weights_stored_in_half_the_space_answer_the_same(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 8)
    settings = {"width": 32, "heads": 2, "depth": 1, "steps": 3, "stored": "fp16"}
    tiny: dict[str, object] = {"backbone": "tiny", "weights": "random", "size": 64}
    whole = Detector.fit(good, method="agpnet", settings={**settings, "stored": "fp32"}, **tiny)
    half = Detector.fit(good, method="agpnet", settings=settings, **tiny)
    sizes = []
    for name, detector in (("whole", whole), ("half", half)):
        detector.save(tmp_path / name)
        sizes.append(next((tmp_path / name).glob("method-*.safetensors")).stat().st_size)
    assert sizes[1] < 0.8 * sizes[0]  # the momentum copy is no trained weight
    loaded = Detector.load(tmp_path / "half")
    for one, other in zip(half.inspect(good.iterdir()), loaded.inspect(good.iterdir()), strict=True):
        assert isinstance(one, Inspection) and isinstance(other, Inspection)
        assert one.score == other.score
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    trained = [p for p in cast(nn.Module, loaded.method).parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
