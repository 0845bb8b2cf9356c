"""GrabCut from seeds and from a map alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fettle.errors import UsageError
from fettle.refine import grabcut as module
from fettle.refine.grabcut import grabcut, grabcut_of_map

pytest.importorskip("cv2")

Y, X = np.mgrid[:64, :80]


def disc(y: int, x: int, radius: int) -> NDArray[np.bool_]:
    return (Y - y) ** 2 + (X - x) ** 2 <= radius**2


def painted(*discs: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Dark red discs on green, both a little noisy."""
    colours = np.where(np.any(discs, axis=0)[..., None], (120, 30, 20), (40, 130, 60))
    return (colours + np.random.default_rng(0).integers(-8, 9, (64, 80, 3))).astype(np.uint8)


def test_the_seeds_grow_to_the_object() -> None:
    defect = disc(30, 40, 12)
    found = grabcut(painted(defect), ~disc(30, 40, 24), disc(28, 38, 5))
    assert found is not None
    np.testing.assert_array_equal(found, defect)


def test_the_same_seeds_give_the_same_mask() -> None:
    """On a picture where OpenCV's own random clustering decides between everything and nothing."""
    import cv2

    ground = gaussian_filter(np.random.default_rng(1).random((64, 80, 3)), (2, 2, 0))
    ground = (ground - ground.min()) / np.ptp(ground) * 120
    picture = (ground + (disc(30, 40, 12) | disc(20, 20, 12))[..., None] * (90, 40, 0)).astype(np.uint8)
    found = []
    for state in range(1, 4):
        cv2.setRNGSeed(state)
        found.append(grabcut(picture, ~disc(30, 40, 24), disc(28, 38, 8)))
    assert found[0] is not None
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_a_seed_in_the_sure_background_does_not_count() -> None:
    defect, other = disc(30, 20, 9), disc(30, 60, 9)
    picture = painted(defect)
    picture[other] = (20, 30, 150)
    found = grabcut(picture, ~disc(30, 20, 16), disc(30, 20, 6) | disc(30, 60, 6))
    assert found is not None
    np.testing.assert_array_equal(found, defect)


@pytest.mark.parametrize(
    ("background", "foreground"),
    [
        (np.zeros((64, 80), bool), np.zeros((64, 80), bool)),
        (np.zeros((64, 80), bool), np.ones((64, 80), bool)),
        (np.ones((64, 80), bool), np.ones((64, 80), bool)),
        (disc(30, 40, 20), disc(30, 40, 10)),
    ],
)
def test_seeds_of_one_kind_only_are_skipped(
    background: NDArray[np.bool_], foreground: NDArray[np.bool_]
) -> None:
    assert grabcut(painted(disc(30, 40, 12)), background, foreground) is None


def test_one_pixel_is_enough_of_a_seed() -> None:
    assert grabcut(painted(disc(30, 40, 12)), ~disc(30, 40, 24), disc(30, 40, 0)) is not None


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not module.have_opencv()
    with pytest.raises(UsageError, match=r"pip install 'fettle\[refine\]'"):
        grabcut(painted(disc(30, 40, 12)), ~disc(30, 40, 24), disc(30, 40, 5))


def test_each_part_of_a_map_is_seeded_by_its_own_peak() -> None:
    strong, weak = disc(20, 20, 9), disc(45, 60, 9)
    picture = painted(strong)
    picture[weak] = (20, 30, 150)
    z = np.zeros((64, 80), np.float32)
    z[disc(20, 20, 5)], z[disc(45, 60, 5)] = 40, 3
    found = grabcut_of_map(picture, z, disc(20, 20, 15) | disc(45, 60, 15))
    assert found is not None
    np.testing.assert_array_equal(found, strong | weak)


def test_a_map_without_a_region_is_skipped() -> None:
    assert (
        grabcut_of_map(painted(disc(20, 20, 9)), np.ones((64, 80), np.float32), np.zeros((64, 80), bool))
        is None
    )
