"""What holds for any input: order, batches, frames, thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from conftest import textured, write_good
from fettle.calibration import calibrate
from fettle.detector import Detector
from fettle.images.framing import FrameMode, choose_frame
from fettle.images.picture import Picture
from fettle.inspection import Inspection, Verdict
from fettle.layers.pixel_map import pixel_map

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ORDER = (Verdict.OK, Verdict.REVIEW, Verdict.REJECT)
sides = st.integers(8, 150)
modes: st.SearchStrategy[FrameMode] = st.sampled_from(["auto", "square", "pad", "crop", "native", "tile"])
numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@pytest.fixture(scope="module", params=["patchcore", "padim"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path]:
    good = write_good(tmp_path_factory.mktemp("good"), 12)
    fields: dict[str, object] = {"channels": 10} if request.param == "padim" else {"bank_rows": 100}
    detector = Detector.fit(
        good, method=request.param, backbone="tiny", weights="random", size=64, settings=fields
    )
    return detector, good


@given(
    order=st.lists(st.integers(0, 11), min_size=1, max_size=14),
    batch_size=st.integers(1, 9),
)
@few
def test_score_depends_on_the_picture_alone(
    model: tuple[Detector, Path], order: list[int], batch_size: int
) -> None:
    """Any order, any repetition, any batch size."""
    detector, good = model
    paths = sorted(good.iterdir())
    (alone,) = detector.inspect([paths[order[-1]]])
    answers = list(detector.inspect([paths[i] for i in order], batch_size=batch_size))
    assert [answer.path for answer in answers] == [str(paths[i]) for i in order]
    assert isinstance(alone, Inspection) and isinstance(answers[-1], Inspection)
    assert answers[-1].score == pytest.approx(alone.score, rel=1e-5, abs=1e-6)


def framed(mode: FrameMode, height: int, width: int, size: int = 64) -> tuple[NDArray[np.float32], ...]:
    frame = choose_frame(mode, size, [(height, width)], 32)
    picture = Picture(textured(0, height, width), Path("a.png"), "0" * 64)
    placed = frame.place(picture)
    constant = np.full((len(placed.views), frame.height, frame.width), 3.5, np.float32)
    own, valid = frame.restore(constant, placed, picture.size)
    return own, valid, placed.views, placed.valid


@given(mode=modes, height=sides, width=sides)
@few
def test_constant_map_comes_back_constant(mode: FrameMode, height: int, width: int) -> None:
    own, valid, views, inside = framed(mode, height, width)
    assert own.shape == valid.shape == (height, width)
    assert valid.any() and not own[~valid].any()
    np.testing.assert_allclose(own[valid], 3.5, rtol=1e-5)
    assert views.dtype == np.float32 and views.min() >= 0 and views.max() <= 1
    assert inside.shape == (len(views), 1, *views.shape[2:])
    assert mode == "crop" or valid.all()


@given(height=st.integers(16, 64), width=st.integers(16, 64), data=st.data())
@few
def test_native_frame_brings_every_pixel_back_to_its_place(
    height: int, width: int, data: st.DataObject
) -> None:
    frame = choose_frame("native", 64, [(height, width)], 32)
    picture = Picture(textured(1, height, width), Path("a.png"), "0" * 64)
    placed = frame.place(picture)
    own, _ = frame.restore(placed.views[:, 0], placed, picture.size)
    np.testing.assert_array_equal(own, picture.pixels[..., 0].astype(np.float32) / np.float32(255))


@given(
    scores=st.lists(numbers, min_size=1, max_size=300),
    first=st.sampled_from([0.005, 0.01, 0.02, 0.05, 0.1, 0.3]),
    second=st.sampled_from([0.005, 0.01, 0.02, 0.05, 0.1, 0.3]),
    score=numbers,
)
@settings(max_examples=150, deadline=None)
def test_lower_rate_never_gives_a_lower_threshold(
    scores: list[float], first: float, second: float, score: float
) -> None:
    low, high = (calibrate(scores, mode="holdout", target_frr=rate) for rate in sorted((first, second)))
    if low.t_reject is not None:
        assert high.t_reject is not None  # whoever can promise less can promise more
        assert low.t_reject >= high.t_reject
        assert ORDER.index(low.verdict(score)) <= ORDER.index(high.verdict(score))
    for one in (low, high):
        if one.t_reject is not None and one.t_review is not None:
            assert one.t_reject >= one.t_review


@given(scores=st.lists(numbers, min_size=99, max_size=200), one=numbers, other=numbers)
@settings(max_examples=100, deadline=None)
def test_higher_score_never_gets_a_milder_verdict(scores: list[float], one: float, other: float) -> None:
    calibration = calibrate(scores, mode="holdout")
    low, high = sorted((one, other))
    assert ORDER.index(calibration.verdict(low)) <= ORDER.index(calibration.verdict(high))
    rejected = sum(calibration.verdict(score) is Verdict.REJECT for score in scores)
    assert rejected <= 0.01 * len(scores)


@given(scores=st.lists(numbers, min_size=1, max_size=150), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_order_of_calibration_scores_does_not_matter(scores: list[float], seed: int) -> None:
    shuffled = list(np.random.default_rng(seed).permutation(scores))
    assert calibrate(shuffled, mode="holdout") == calibrate(scores, mode="holdout")


def maps(draw: st.DataObject, height: int, width: int) -> Tensor:
    seed = draw.draw(st.integers(0, 10_000))
    return torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed))


@given(
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    sigma=st.sampled_from([0.0, 1.0, 4.0]),
    data=st.data(),
)
@few
def test_pixel_map_stays_between_the_least_and_largest_valid_patch(
    height: int, width: int, sigma: float, data: st.DataObject
) -> None:
    patches = maps(data, height, width)
    valid = torch.zeros(2, 1, 8 * height, 8 * width, dtype=torch.bool)
    valid[..., : data.draw(st.integers(1, 8 * height)), : data.draw(st.integers(1, 8 * width))] = True
    result = pixel_map(patches, valid, sigma)
    inside = valid[:, 0]
    assert bool((result[~inside] == 0).all())
    tokens = torch.nn.functional.max_pool2d(valid.float(), 8)[:, 0] > 0
    for i in range(2):
        own = patches[i][tokens[i]]
        assert float(result[i][inside[i]].min()) >= float(own.min()) - 1e-5
        assert float(result[i][inside[i]].max()) <= float(own.max()) + 1e-5


@given(height=st.integers(2, 9), width=st.integers(2, 9), data=st.data())
@few
def test_patches_that_are_not_valid_do_not_reach_the_map(
    height: int, width: int, data: st.DataObject
) -> None:
    patches = maps(data, height, width)
    valid = torch.ones(2, 1, 8 * height, 8 * width, dtype=torch.bool)
    valid[..., 8 * data.draw(st.integers(1, width)) :] = False
    tokens = torch.nn.functional.max_pool2d(valid.float(), 8)[:, 0] > 0
    other = torch.where(tokens, patches, torch.full_like(patches, 1e6))
    torch.testing.assert_close(pixel_map(other, valid, 4.0), pixel_map(patches, valid, 4.0))
