"""Identity index and mask correlation against toys whose answer is known, and on a trained method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import textured
from fettle.bench.copying import correlations, diagnose, identity_index, pearson, raw_energy, token_share
from fettle.bench.pasted import paste_defects
from fettle.bench.views import Views
from fettle.datasets.open import open_dataset
from fettle.detector import Detector
from fettle.errors import UsageError
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.pixel_map import pixel_map
from fettle.protocols import Explanation, Method

PIXELS = np.stack([textured(seed) for seed in range(10)])
GOOD = Views(PIXELS, np.ones(PIXELS.shape[:3], bool))


class ToyBackbone:
    """Its cue grows from left to right."""

    cues = ("energy",)

    def features_and_cue(
        self, pictures: Tensor, levels: Sequence[str], cue: str
    ) -> tuple[dict[str, Tensor], Tensor]:
        return {}, torch.linspace(0, 1, 8).expand(len(pictures), 1, 8, 8)


class Toy:
    """Error on tokens of 8 px; it knows the good pictures, and rebuilds a defect with `gain` times the error
    that it makes on each untouched token."""

    name = "toy"
    backbone = ToyBackbone()
    levels = ("one",)

    def __init__(self, gain: float, energies: Tensor | None = None) -> None:
        self.gain = gain
        self.energies = energies
        self.good = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255
        self.scale = EnergyScale()
        self.scale.settle(torch.linspace(3, 5, 101))
        self.done = 0

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        good = self.good[self.done : self.done + len(pictures)]
        self.done += len(pictures)
        changed = (good != pictures).any(dim=1)
        raw = torch.where(token_share(changed, pictures[:, 0, ::8, ::8]) > 0.5, 0.25 * self.gain, 0.25)
        return cast(Tensor, self.scale(raw))


class MaskedToy(Toy):
    """Its error is `slope` times its mask, which grows from left to right."""

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        return cast(Tensor, self.scale(1 + self.gain * self._mask(pictures)))

    def _mask(self, pictures: Tensor) -> Tensor:
        return torch.linspace(0, 1, 8).expand(len(pictures), 8, 8)

    def explain(self, pictures: Tensor, valid: Tensor) -> Explanation:
        return Explanation({"mask": pixel_map(self._mask(pictures), valid, 0)}, {}, "")


def detector(method: Toy) -> Detector:
    return cast(Detector, SimpleNamespace(method=method, device="cpu"))


def test_raw_energy_undoes_the_scale() -> None:
    pictures, valid = torch.zeros(2, 3, 64, 64), torch.ones(2, 1, 64, 64, dtype=torch.bool)
    energy = raw_energy(cast(Method, MaskedToy(2.0)), pictures, valid)
    torch.testing.assert_close(energy, 1 + 2 * torch.linspace(0, 1, 8).expand(2, 8, 8))
    with pytest.raises(UsageError, match="scale of method 'odd'"):
        raw_energy(cast(Method, SimpleNamespace(name="odd")), pictures, valid)


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_identity_index_is_the_ratio_of_errors(gain: float) -> None:
    found = identity_index(detector(Toy(gain)), GOOD, seed=4)
    assert found.value == pytest.approx(gain, rel=1e-4)
    assert (found.defect, found.untouched) == pytest.approx((0.25 * gain, 0.25), rel=1e-4)


def test_tokens_that_are_half_pasted_count_as_neither() -> None:
    masks = torch.from_numpy(np.stack([one.mask for one in paste_defects(list(PIXELS), 4, None)]))
    share = masks.float().unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(3, 4))
    expected = int((share > 0.5).sum())
    valid = list(GOOD.valid)
    assert [one.mask.sum() for one in paste_defects(list(PIXELS), 4, valid)] == masks.sum(dim=(1, 2)).tolist()
    assert identity_index(detector(Toy(2.0)), GOOD, seed=4).num_defect == expected > 0
    assert int(((share > 0) & (share <= 0.5)).sum()) > 0


def test_what_is_not_valid_counts_in_neither_diagnosis() -> None:
    valid = np.ones(PIXELS.shape[:3], bool)
    valid[:, :, 32:] = False
    found = identity_index(detector(Toy(3.0)), Views(PIXELS, valid), seed=4)
    assert found.value == pytest.approx(3.0, rel=1e-4)

    class Broken(MaskedToy):
        def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
            energy = super().patch_energy(pictures, valid).clone()
            energy[:, :, 4:] = 0
            return energy

    assert correlations(detector(Broken(1.0)), Views(PIXELS, valid))["mask_correlation"] == pytest.approx(
        1, abs=2e-3
    )


def test_mask_correlation_has_the_sign_of_the_slope() -> None:
    assert correlations(detector(MaskedToy(2.0)), GOOD)["mask_correlation"] == pytest.approx(1, abs=2e-3)
    assert correlations(detector(MaskedToy(-0.5)), GOOD)["mask_correlation"] == pytest.approx(-1, abs=2e-3)
    assert correlations(detector(MaskedToy(2.0)), GOOD)["prior_correlation"] == pytest.approx(1, abs=2e-3)
    assert correlations(detector(MaskedToy(0.0)), GOOD)["mask_correlation"] is None
    assert correlations(detector(Toy(1.0)), GOOD) == {"mask_correlation": None, "prior_correlation": None}


def test_pearson_by_hand() -> None:
    assert pearson(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 3, 2])) == pytest.approx(0.5)


def test_diagnose_a_trained_method(labelled_folder: Path) -> None:
    settings = {"width": 32, "heads": 2, "depth": 1, "steps": 3, "batch": 8, "smooth_sigma": 0.0}
    fitted = Detector.fit(
        labelled_folder, method="agpnet", backbone="tiny", weights="random", size=128, settings=settings
    )
    found = diagnose(fitted, open_dataset(labelled_folder), seed=1)
    assert found == diagnose(fitted, open_dataset(labelled_folder), seed=1)
    assert found["num_pictures"] == 6  # good ones of the test part, no scratched one
    for name in ("mask_correlation", "prior_correlation"):
        assert -1 <= cast(float, found[name]) <= 1
    untouched = cast(float, found["untouched_error"])
    assert found["identity_index"] == pytest.approx(cast(float, found["defect_error"]) / untouched)
    assert diagnose(fitted, open_dataset(labelled_folder), most=2)["num_pictures"] == 2
