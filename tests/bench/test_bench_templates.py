"""Diagnoses of the study "template": a token that copies itself is found; looking changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import textured, write_good
from fettle.bench.templates import FUSIONS, KEYS, controls, diagnose_template, share_of_cell
from fettle.datasets.open import open_dataset
from fettle.detector import Detector

CELL = (slice(2, 4), slice(4, 6))


def share(rebuild: object, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(1, 3, 8, 8, generator=generator)
    return share_of_cell(rebuild, fused, CELL, generator)  # type: ignore[arg-type]  # a function


def test_a_copy_depends_on_its_own_cell_alone() -> None:
    assert share(lambda fused: 2 * fused) == pytest.approx(1)


def test_a_mean_depends_on_all_cells_alike() -> None:
    def mean(fused: Tensor) -> Tensor:
        return fused.mean(dim=(2, 3), keepdim=True).expand_as(fused)

    assert share(mean) == pytest.approx(1 / 16)


def test_a_shifted_copy_does_not_depend_on_its_own_cell() -> None:
    assert share(lambda fused: fused.roll(2, dims=3)) == 0


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path]:
    root = tmp_path_factory.mktemp("labelled")
    for part in ("train", "test"):
        (root / part).mkdir()
        write_good(root / part / "good", 6, first_seed=100 * len(part))
    (root / "test" / "spot").mkdir()
    (root / "ground_truth" / "spot").mkdir(parents=True)
    for number in range(3):
        pixels = textured(600 + number)
        pixels[20:30, 20:30] = 255
        mask = (pixels == 255).all(axis=2).astype("uint8") * 255
        Image.fromarray(pixels).save(root / "test" / "spot" / f"{number}.png")
        Image.fromarray(mask).save(root / "ground_truth" / "spot" / f"{number}_mask.png")
    settings = {"patch": 1, "width": 16, "heads": 2, "depth": 1, "rebuild_width": 16, "rebuild_heads": 2}
    more = {"rebuild_depth": 1, "steps": 3, "taps": ["stride8", "stride16"]}
    detector = Detector.fit(
        root,
        **{"method": "tfanet", "backbone": "tiny", "weights": "random", "size": 64},
        settings={**settings, **more},
    )
    return detector, root


def test_what_is_found_has_all_its_parts(fitted: tuple[Detector, Path]) -> None:
    detector, root = fitted
    before = {name: tensor.clone() for name, tensor in detector.method.state_dict().items()}
    dataset = open_dataset(root)
    found = diagnose_template(detector, dataset, others=2)
    assert 0 <= found["own_token_share"] <= 1 and found["tokens"] == 64
    assert set(found["fusion"]) == set(FUSIONS)
    assert found["fusion"]["product"] == {key: detector.evaluate(dataset)[key] for key in KEYS}
    assert len(found["templates"]) == 2 and set(found["templates"][0]) == {"name", *KEYS}
    assert set(controls(detector, dataset)) == {"energy", "template"}
    after = detector.method.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
