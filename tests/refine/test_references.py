"""Reference pictures: what is kept, which are chosen, and how far fills of good regions are off."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fettle.errors import ModelFolderError, UsageError
from fettle.refine import references as module
from fettle.refine.fill import Fill
from fettle.refine.references import References, choose_references, noise_floor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=seeded(seed))


def everywhere(pictures: Tensor) -> Tensor:
    return torch.ones(len(pictures), 1, *pictures.shape[2:], dtype=torch.bool)


def kept(pictures: Tensor) -> References:
    return References.from_views(pictures, everywhere(pictures))


# --- what is kept


def test_references_come_back_from_a_file() -> None:
    references = kept(noise(3))
    again = References.of(load(save(references.state())))
    assert torch.equal(again.pixels, references.pixels)
    assert torch.equal(again.valid, references.valid)


def test_pixels_are_kept_to_the_nearest_of_256() -> None:
    pictures = noise(2)
    assert float((kept(pictures).pixels.float() / 255 - pictures).abs().max()) <= 0.5 / 255 + 1e-6


def test_spectra_are_computed_once() -> None:
    references = kept(noise(2))
    assert references.spectra[0] is references.spectra[0]


def test_smaller_pictures_are_means_of_whole_cells() -> None:
    pictures, valid = noise(2, side=14), torch.ones(2, 1, 14, 14, dtype=torch.bool)
    valid[1, 0, 5, 8] = False
    references = References.from_views(pictures, valid)
    small = references.smaller(4)
    assert small is references.smaller(4)
    assert references.smaller(1) is references
    assert small.size == (3, 3)
    cell = references.pixels[0, 1, 4:8, 8:12].float().mean()
    assert float(small.pixels[0, 1, 1, 2]) == pytest.approx(float(cell), abs=0.51)
    assert (~small.valid).nonzero().tolist() == [[1, 0, 1, 2]]
    assert (references.all_valid, references.smaller(4).all_valid) == (False, False)
    assert kept(pictures).all_valid


PIXELS, VALID = torch.zeros(2, 3, 8, 6, dtype=torch.uint8), torch.ones(2, 1, 8, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    "state",
    [
        {"pixels": PIXELS},
        {"pixels": PIXELS, "valid": VALID, "more": VALID},
        {"pixels": PIXELS.float(), "valid": VALID},
        {"pixels": PIXELS, "valid": VALID.to(torch.uint8)},
        {"pixels": PIXELS[0], "valid": VALID},
        {"pixels": PIXELS[:0], "valid": VALID[:0]},
        {"pixels": PIXELS[:, :2], "valid": VALID},
        {"pixels": PIXELS[:, :, :0], "valid": VALID[:, :, :0]},
        {"pixels": PIXELS[:1].expand(257, 3, 8, 6), "valid": VALID[:1].expand(257, 1, 8, 6)},
        {"pixels": PIXELS, "valid": VALID[:, :, :4]},
        {"pixels": PIXELS, "valid": VALID[:1]},
    ],
)
def test_a_damaged_state_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ModelFolderError, match="reference pictures are damaged"):
        References.of(state)


def test_an_undamaged_state_is_not_refused() -> None:
    assert References.of({"pixels": PIXELS, "valid": VALID}).size == (8, 6)


# --- which are chosen


def like(*levels: float) -> Tensor:
    """Pictures of one grey each, with a little noise of their own."""
    return torch.tensor(levels)[:, None, None, None] + 0.01 * noise(len(levels))


def test_each_kind_of_picture_is_chosen_once() -> None:
    pictures = like(0.1, 0.5, 0.1, 0.9, 0.5, 0.9, 0.5)
    chosen = choose_references(list(pictures), 3)
    assert sorted(round(float(pictures[i].mean()), 1) for i in chosen) == [0.1, 0.5, 0.9]
    assert chosen[0] in (1, 4, 6)  # nearest to the mean
    assert choose_references(list(pictures), 2) == chosen[:2]


def test_batches_are_counted_by_picture() -> None:
    pictures = noise(9)
    batches = iter([pictures[:4], pictures[4:5], pictures[5:]])
    assert choose_references(batches, 5) == choose_references(list(pictures), 5)


def test_no_picture_is_chosen_twice() -> None:
    assert len(choose_references(list(noise(1).expand(5, 3, 32, 32)), 3)) == 1
    assert sorted(choose_references(list(noise(4)), 32)) == [0, 1, 2, 3]
    assert choose_references([], 3) == []
    assert choose_references(list(noise(4)), 0) == []


# --- the noise floor


def floor(pictures: Tensor, references: References | None, seed: int = 0, **given: object) -> float:
    return noise_floor(pictures, everywhere(pictures), references, generator=seeded(seed), **given)  # type: ignore[arg-type]


def test_a_perfect_reference_leaves_rounding_only() -> None:
    good = noise(1, side=64)
    assert floor(good, kept(good)) < 2 * math.sqrt(3) / 255


def test_a_picture_is_not_filled_from_itself() -> None:
    good = noise(4, side=64)
    assert floor(good, kept(good), own=range(4)) > 0.5
    assert floor(good, kept(good)) < 0.02


def test_the_floor_of_white_noise_is_that_of_its_differences() -> None:
    """Two independent pictures of deviation s differ by s sqrt(2) times a chi of three degrees."""
    s = 0.02
    surface = 0.5 + 0.3 * torch.sin(torch.arange(128) / 9).expand(3, 128, 128)
    good = surface + s * torch.randn(6, 3, 128, 128, generator=seeded(1))
    reference = surface + s * torch.randn(1, 3, 128, 128, generator=seeded(2))
    chi_quantile = 3.583  # square root of the 99.5 % quantile of chi-square with 3 degrees, 12.838
    assert floor(good, kept(reference)) == pytest.approx(math.sqrt(2) * s * chi_quantile, rel=0.2)


def test_a_disc_is_of_a_tenth_of_the_side_and_wholly_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []

    def recorded(picture: Tensor, roi: Tensor, *given: object, **named: object) -> Fill:
        filled.append(roi)
        return Fill(picture, "diffusion")

    monkeypatch.setattr(module, "fill_roi", recorded)
    valid = torch.zeros(20, 1, 128, 160, dtype=torch.bool)
    valid[:, :, 30:90, 40:120] = True
    noise_floor(torch.zeros(20, 3, 128, 160), valid, None, generator=seeded())
    assert len({tuple(disc.nonzero()[0].tolist()) for disc in filled}) > 10
    for disc in filled:
        assert int(disc.sum()) == pytest.approx(math.pi * 12**2, rel=0.03)  # 24 px at a side of 256
        assert not bool((disc & ~valid[0, 0]).any())


def test_discs_are_seeded() -> None:
    good, references = noise(3, side=64), kept(noise(2, side=64, seed=9))
    assert floor(good, references, seed=4) == floor(good, references, seed=4)
    assert floor(good, references, seed=4) != floor(good, references, seed=5)


def test_a_disc_lies_where_the_picture_is_valid() -> None:
    good, references = noise(3, side=64), kept(noise(2, side=64, seed=9))
    valid = everywhere(good)
    valid[:, :, :, 40:] = False
    blank = torch.where(valid, good, 0.0)
    found = [noise_floor(pictures, valid, references, generator=seeded(2)) for pictures in (good, blank)]
    assert found[0] == found[1]


def test_no_room_for_a_disc_is_said() -> None:
    good = noise(2)
    with pytest.raises(UsageError, match="room for a disc"):
        noise_floor(good, ~everywhere(good), None, generator=seeded())
