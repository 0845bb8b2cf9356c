"""What holds of every registered method. A new method is tested by being registered."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from conftest import textured, tiny_entry, write_good
from fettle.backbones import load_backbone, registry
from fettle.datasets.folder import open_folder
from fettle.detector import Detector
from fettle.errors import FettleError
from fettle.export.graph import VERDICTS
from fettle.export.run import export_model
from fettle.export.writers import openvino_files, openvino_model
from fettle.feature_stream import GoodFeatures, GoodPicture
from fettle.gathering import gather_good
from fettle.images.decode import read_picture
from fettle.images.framing import Frame
from fettle.inspection import Inspection, Refusal, Verdict
from fettle.judging import Fitter, judge
from fettle.methods.registry import find_method, make_config, method_names
from fettle.model_folder import read_model
from fettle.protocols import Crops, LeavesOut, Method, Run, Unbounded, no_progress
from fettle.refine.energy import patch_energies
from fettle.runtimes import Runtime, open_graph

# A head for a grid of 4 x 4 tokens, whose score is the largest of its map.
SMALL_HEAD: dict[str, object] = {
    **{"window": 3, "score_pool": 1, "width": 32, "heads": 2, "ffn": 64},
    **{"steps": 60, "warmup": 0.0, "lr": 2e-3},
}
SETTINGS: dict[str, dict[str, object]] = {
    "agpnet": {
        **{"width": 32, "heads": 2, "depth": 1, "batch": 8, "steps": 60, "warmup": 0.0, "lr": 3e-3},
        **{"smooth_sigma": 0.0},
    },
    "cflow": {
        **{"code": 16, "blocks": 2, "fibres": 128, "batch": 8, "steps": 60, "warmup": 0.0, "lr": 3e-3},
        **{"epochs": None, "sigma": 0.0},
    },
    "fpfnet": SMALL_HEAD,
    "padim": {"channels": 12},
    "patchcore": {"bank_rows": 300},
    "tfanet": {
        **{"taps": ["stride8", "stride16"], "patch": 1, "width": 32, "heads": 2, "depth": 2},
        **{"rebuild_width": 32, "rebuild_heads": 2, "rebuild_depth": 1, "batch": 8, "steps": 60},
        **{"warmup": 0.0, "lr": 3e-3, "smooth_sigma": 0.0, "score": "max"},
    },
    "uniad": SMALL_HEAD,
}
# Settings with which leaving out is exact: nothing is thinned, and no scale is pooled over all pictures.
WHOLE: dict[str, dict[str, object]] = {
    "padim": {"channels": 12, "shrinkage": 0},
    "patchcore": {"bank_rows": 4000},
}
FILE_NAMES = "bank.labels"  # a method may keep what pictures were called, to show it
LEAVING_OUT = [name for name in method_names() if find_method(name).traits.leave_one_out]
each_method = pytest.mark.parametrize("name", method_names())


def fit(name: str, good: Path, **more: object) -> Detector:
    settings: dict[str, object] = {"settings": SETTINGS.get(name, {}), "backbone": "tiny", "size": 64, **more}
    return Detector.fit(good, method=name, weights="random", **settings)


def unfitted(name: str, settings: dict[str, object] | None = None) -> Method:
    method_class = find_method(name)
    config = make_config(method_class, "compact", SETTINGS.get(name, {}) if settings is None else settings)
    levels = method_class.choose_levels(tiny_entry().levels, config)
    method = method_class(load_backbone("tiny", levels, weights="random"), config, levels)
    cast(nn.Module, method).eval()
    return method


def as_input(*pictures: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) in 0..1, all of them valid."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return batch.contiguous(), torch.ones(len(batch), 1, *batch.shape[-2:], dtype=torch.bool)


def scratched(seed: int, height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    pixels = textured(seed, height, width)
    pixels[20:28, 12:50] = 255 - pixels[20:28, 12:50]
    return cast("NDArray[np.uint8]", pixels)


def eight_pictures() -> tuple[Tensor, Tensor]:
    """Good and scratched ones, none of them learnt from."""
    return as_input(*(textured(300 + i) if i % 2 else scratched(300 + i) for i in range(8)))


def answers(method: Method, pictures: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        maps = method(pictures, valid)
        return maps.anomaly_map, maps.score, method.patch_energy(pictures, valid)


def assert_same_learnt(one: Method, other: Method, but: str = "") -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert name == but or torch.equal(tensor, second[name]), name


@dataclass(frozen=True)
class Fitted:
    name: str
    detector: Detector
    good: Path

    @property
    def method(self) -> Method:
        return self.detector.method


@pytest.fixture(scope="module", params=method_names())
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    good = write_good(tmp_path_factory.mktemp("good"), 24)
    return Fitted(request.param, fit(request.param, good), good)


# --- the same answer everywhere


def test_save_and_load_give_the_same_bits(fitted: Fitted, tmp_path: Path) -> None:
    fitted.detector.save(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model")
    assert_same_learnt(fitted.method, loaded.method)
    for before, after in zip(
        answers(fitted.method, *eight_pictures()), answers(loaded.method, *eight_pictures()), strict=True
    ):
        assert torch.equal(before, after)
    paths = sorted(fitted.good.iterdir())[:5]
    for one, other in zip(fitted.detector.inspect(paths), loaded.inspect(paths), strict=True):
        assert isinstance(one, Inspection) and isinstance(other, Inspection)
        assert (one.score, one.verdict, one.regions) == (other.score, other.verdict, other.regions)
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)


def test_state_dict_holds_all_that_was_learnt(fitted: Fitted) -> None:
    """A fresh method with the same buffers answers the same: nothing learnt lies elsewhere."""
    fresh = unfitted(fitted.name)
    places = dict(cast(nn.Module, fresh).named_modules())
    for name, tensor in fitted.method.state_dict().items():
        place, _, last = name.rpartition(".")
        target = getattr(places[place], last)
        if isinstance(target, nn.Parameter):
            target.data = tensor.clone()
        else:
            setattr(places[place], last, tensor.clone())
    for before, after in zip(
        answers(fitted.method, *eight_pictures()), answers(fresh, *eight_pictures()), strict=True
    ):
        assert torch.equal(before, after)


def test_batch_of_one_equals_batch_of_eight(fitted: Fitted) -> None:
    pictures, valid = eight_pictures()
    together = answers(fitted.method, pictures, valid)
    for i in range(8):
        alone = answers(fitted.method, pictures[i : i + 1], valid[i : i + 1])
        for one, of_eight in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], of_eight[i], rtol=1e-5, atol=1e-6)


def test_order_of_pictures_does_not_matter(fitted: Fitted) -> None:
    pictures, valid = eight_pictures()
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    for straight, shuffled in zip(
        answers(fitted.method, pictures, valid), answers(fitted.method, pictures[order], valid), strict=True
    ):
        torch.testing.assert_close(shuffled, straight[order], rtol=1e-5, atol=1e-6)


def test_energy_ignores_batch_mates(fitted: Fitted) -> None:
    """Also an extreme one: a white picture beside it changes nothing."""
    own, white = textured(400), np.full((64, 64, 3), 255, np.uint8)
    with torch.no_grad():
        alone = fitted.method.patch_energy(*as_input(own))[0]
        beside = fitted.method.patch_energy(*as_input(white, own, scratched(401)))[1]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)


def test_defect_scores_above_every_good_picture(fitted: Fitted) -> None:
    _, score, _ = answers(fitted.method, *eight_pictures())
    assert float(score[0::2].min()) > float(score[1::2].max())


@each_method
def test_listing_order_of_good_pictures_changes_nothing(name: str, tmp_path: Path) -> None:
    good = write_good(tmp_path / "one", 12)
    other = tmp_path / "other"
    other.mkdir()
    for place, path in enumerate(sorted(good.iterdir(), reverse=True)):
        shutil.copy(path, other / f"{place:03d}.png")
    first, second = fit(name, good), fit(name, other)
    assert_same_learnt(first.method, second.method, but=FILE_NAMES)
    assert first.calibration == second.calibration


@each_method
@pytest.mark.parametrize("seed", [0, 7])
def test_same_seed_repeats_bit_for_bit(name: str, seed: int, tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 8)
    first, second = fit(name, good, seed=seed), fit(name, good, seed=seed)
    assert_same_learnt(first.method, second.method)
    assert first.calibration == second.calibration


# --- patch energy


def double(method: Method) -> Method:
    doubled = copy.deepcopy(method)
    cast(nn.Module, doubled).double()
    return doubled


def test_a_part_that_is_the_whole_has_the_wholes_energy(fitted: Fitted) -> None:
    method = fitted.method
    if not isinstance(method, Crops | Unbounded):
        pytest.skip("it takes no parts of frames")
    pictures, valid = eight_pictures()
    with torch.no_grad():
        whole = patch_energies(method, pictures, valid)
        part = patch_energies(method, pictures, valid, [(0, 0)] * 8)
    assert part.shape == whole.shape and float(whole.abs().max()) > 1
    torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


def energies_of(method: Method, valid: Tensor) -> Iterator[tuple[Callable[[Tensor], Tensor], slice]]:
    """Each energy that a refiner may follow the slope of, and the pixels along a side that it looks at."""
    yield lambda views: method.patch_energy(views, valid), slice(0, 64)
    part, corner = slice(16, 48), [(16, 16)]
    if isinstance(method, Unbounded):
        unbounded = method.unbounded_energy
        yield lambda views: unbounded(views, valid), slice(0, 64)
        yield lambda views: unbounded(views[..., part, part], valid[..., part, part], corner), part
    elif isinstance(method, Crops):
        cropped = method.crop_energy
        yield lambda views: cropped(views[..., part, part], valid[..., part, part], corner), part


def test_gradients_agree_with_finite_differences(fitted: Fitted) -> None:
    method = double(fitted.method)
    pictures, valid = as_input(scratched(500))
    pictures = pictures.double()
    for energy, side in energies_of(method, valid):
        rng = np.random.default_rng(0)
        weights = torch.from_numpy(rng.uniform(0.5, 1.5, tuple(energy(pictures).shape)))
        leaf = pictures.clone().requires_grad_(True)
        (energy(leaf) * weights).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        assert leaf.grad is not None
        smooth = 0
        for _ in range(16):
            place = (0, int(rng.integers(3)), *(int(rng.integers(side.start, side.stop)) for _ in range(2)))
            moved = pictures.repeat(3, 1, 1, 1)
            moved[1, *place[1:]] += 1e-4
            moved[2, *place[1:]] -= 1e-4
            with torch.no_grad():
                here, up, down = (float((energy(one[None]) * weights).sum()) for one in moved)
            if abs((up - here) - (here - down)) > 1e-2 * abs(up - down):
                continue  # a kink: the nearest remembered patch changes within the step
            smooth += 1
            assert float(leaf.grad[place]) == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-9)
        assert smooth >= 12


def test_gradient_is_finite_at_what_was_learnt(fitted: Fitted) -> None:
    pictures, valid = as_input(textured(0))  # the first good picture
    pictures.requires_grad_(True)
    energy = fitted.method.patch_energy(pictures, valid)
    energy.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert bool(torch.isfinite(energy).all())
    assert pictures.grad is not None and bool(torch.isfinite(pictures.grad).all())


@each_method
def test_energies_settle_to_zero_and_one(name: str, tmp_path: Path) -> None:
    """Of held-out good pictures the median is 0 and the 99 % quantile is 1."""
    pictures = good_pictures(write_good(tmp_path / "good", 20))
    judged = fitter(name).fit(pictures, "holdout", holdout=8)
    assert judged.energies is not None
    judged.method.settle(judged.energies)
    held_out = [picture for picture in pictures if picture.key in judged.keys]
    assert len(held_out) == len(judged.keys) == 8
    views = judge(judged.method, held_out, FRAME, device="cpu", progress=no_progress, refused=_fail)
    z = torch.cat([view.energy.flatten() for view in views])
    assert float(z.median()) == pytest.approx(0, abs=0.02)
    assert float(z.quantile(0.99)) == pytest.approx(1, abs=0.05)


# --- NaN


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone named "poisoned", whose features are NaN."""
    entry = replace(tiny_entry(), name="poisoned", mean=(float("nan"),) * 3)
    monkeypatch.setitem(registry._known, "poisoned", lambda: entry)


@each_method
def test_fit_refuses_features_that_are_nan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    with pytest.raises(FettleError, match="NaN"):
        fit(name, write_good(tmp_path / "good", 6), backbone="poisoned")


def test_picture_of_nan_never_gets_a_finite_score(fitted: Fitted) -> None:
    pictures, valid = eight_pictures()
    pictures[2, :, 30, 30] = float("nan")
    _, score, energy = answers(fitted.method, pictures, valid)
    assert not bool(torch.isfinite(score[2]))
    assert not bool(torch.isfinite(energy[2]).all())
    others = [0, 1, 3, 4, 5, 6, 7]
    assert bool(torch.isfinite(score[others]).all()) and bool(torch.isfinite(energy[others]).all())


def test_inspection_refuses_a_score_that_is_nan(fitted: Fitted) -> None:
    poisoned = copy.deepcopy(fitted.detector)
    cast(nn.Module, poisoned.method.backbone).get_buffer("mean").fill_(torch.nan)
    (answer,) = poisoned.inspect([fitted.good / "000.png"])
    assert isinstance(answer, Refusal)
    assert "no finite score" in answer.reason


# --- region of interest and padding


def test_what_is_not_valid_never_scores(fitted: Fitted) -> None:
    pictures, valid = as_input(scratched(600))
    valid[..., 40:] = False
    maps = fitted.method(pictures, valid)
    inside = valid[:, 0]
    assert bool((maps.anomaly_map[~inside] == 0).all())
    assert maps.score[0].item() == maps.anomaly_map[inside].max().item()


@each_method
def test_pixels_far_outside_the_region_of_interest_change_nothing(name: str, tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 8, height=128, width=128)
    detector = fit(name, good, size=128, roi=(0.0, 0.0, 0.25, 1.0))
    plain = textured(700, 128, 128)
    ruined = plain.copy()
    ruined[:, 112:] = 0
    Image.fromarray(plain).save(tmp_path / "plain.png")
    Image.fromarray(ruined).save(tmp_path / "ruined.png")
    one, other = detector.inspect([tmp_path / "plain.png", tmp_path / "ruined.png"])
    assert isinstance(one, Inspection) and isinstance(other, Inspection)
    assert other.score == pytest.approx(one.score, rel=1e-6)
    np.testing.assert_allclose(other.anomaly_map, one.anomaly_map, rtol=1e-5, atol=1e-6)
    assert not one.valid[:, 32:].any() and one.valid[:, :32].all()
    assert not one.anomaly_map[:, 32:].any()
    assert one.score == pytest.approx(float(one.anomaly_map.max()), rel=1e-6)


@each_method
def test_padding_never_scores(name: str, tmp_path: Path) -> None:
    """Wide pictures in a square frame: the map's rows are the picture's, and the score is in them."""
    good = write_good(tmp_path / "good", 8, height=32, width=64)
    detector = fit(name, good, frame="pad")
    assert (detector.frame.height, detector.frame.width) == (64, 64)
    placed = detector.frame.place(read_picture(good / "000.png"))
    views, valid = torch.from_numpy(placed.views), torch.from_numpy(placed.valid)
    assert valid.float().mean() == 0.5
    with torch.no_grad():
        maps = detector.method(views, valid)
    assert bool((maps.anomaly_map[~valid[:, 0]] == 0).all())
    (answer,) = detector.inspect([good / "000.png"])
    assert isinstance(answer, Inspection) and answer.anomaly_map.shape == (32, 64)
    assert answer.score == pytest.approx(float(answer.anomaly_map.max()), rel=1e-6)


# --- leaving out

FRAME = Frame(mode="stretch", height=64, width=64)


def _fail(refusal: object) -> None:
    raise AssertionError(refusal)


def good_pictures(folder: Path) -> list[GoodPicture]:
    return gather_good(open_folder(folder), None, no_progress).pictures


def fitter(name: str, settings: dict[str, object] | None = None) -> Fitter:
    return Fitter(lambda: unfitted(name, settings), FRAME, Run())


def stream(method: Method, pictures: Sequence[GoodPicture]) -> GoodFeatures:
    return GoodFeatures(method, pictures, FRAME, device="cpu", progress=no_progress, what="learning")


def with_groups(pictures: Sequence[GoodPicture], groups: Callable[[int], str]) -> list[GoodPicture]:
    return [replace(picture, group=groups(i)) for i, picture in enumerate(pictures)]


def left_out_scores(name: str, pictures: Sequence[GoodPicture]) -> dict[str, float]:
    method = unfitted(name, WHOLE.get(name))
    assert isinstance(method, LeavesOut)
    features = stream(method, pictures)
    method.prepare(features, Run())
    return {view.key: float(view.maps.score[0]) for view in method.left_out(features, Run())}


@pytest.mark.parametrize("name", LEAVING_OUT)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_left_out_equals_refitting_without_the_group(name: str, size: int, tmp_path: Path) -> None:
    pictures = with_groups(good_pictures(write_good(tmp_path / "good", 12)), lambda i: f"part {i // size}")
    scores = left_out_scores(name, pictures)
    assert set(scores) == {picture.key for picture in pictures}
    for group in ("part 0", "part 2"):
        own = [picture for picture in pictures if picture.group == group]
        rest = [picture for picture in pictures if picture.group != group]
        refitted = unfitted(name, WHOLE.get(name))
        refitted.prepare(stream(refitted, rest), Run())
        views = judge(refitted, own, FRAME, device="cpu", progress=no_progress, refused=_fail)
        for view in views:
            # 1e-3: a model may be stored in half precision, what is left out is not.
            assert scores[view.key] == pytest.approx(float(view.maps.score[0]), rel=1e-3)


@pytest.mark.parametrize("name", LEAVING_OUT)
def test_picture_is_left_out_with_all_of_its_group(name: str, tmp_path: Path) -> None:
    """Two pictures of one odd part: apart they excuse each other, as one group they can't."""
    good = write_good(tmp_path / "good", 12)
    for i in range(2):
        pixels = scratched(800)
        pixels[0, 0] = i  # another file, the same part
        Image.fromarray(pixels).save(good / f"odd{i}.png")
    pictures = good_pictures(good)
    odd = {picture.key for picture in pictures if picture.path.name.startswith("odd")}
    apart = left_out_scores(name, with_groups(pictures, lambda i: str(i)))
    together = left_out_scores(
        name, with_groups(pictures, lambda i: "odd" if pictures[i].key in odd else str(i))
    )
    for key in odd:
        assert together[key] > 2 * apart[key]
    others = [score for key, score in together.items() if key not in odd]
    assert min(together[key] for key in odd) > max(others)


@pytest.mark.parametrize("name", LEAVING_OUT)
def test_every_good_picture_is_judged_once(name: str, tmp_path: Path) -> None:
    detector = fit(name, write_good(tmp_path / "good", 10))
    assert detector.calibration.mode == "leave_one_out"
    assert detector.calibration.num_pictures == detector.num_fit == 10


# --- few pictures


@each_method
def test_copies_of_a_good_picture_count_once(name: str, tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 10)
    plain = fit(name, good)
    for i in range(5):
        shutil.copy(good / "003.png", good / f"copy{i}.png")
    copied = fit(name, good)
    assert copied.calibration == plain.calibration
    assert_same_learnt(copied.method, plain.method)
    assert copied.card["data"]["duplicates_left_out"] == 5  # type: ignore[index,call-overload]  # JSON


@each_method
def test_one_good_picture_fits_and_promises_nothing(name: str, tmp_path: Path) -> None:
    detector = fit(name, write_good(tmp_path / "good", 1))
    assert detector.num_fit == 1
    assert detector.calibration.promise_on is None and detector.calibration.frr_promised is None
    assert detector.calibration.needed == 99
    words = " ".join(detector.calibration.sentences())
    assert "every verdict is review" in words and "needs 99" in words
    Image.fromarray(scratched(900)).save(tmp_path / "bad.png")
    answers = list(detector.inspect([tmp_path / "good" / "000.png", tmp_path / "bad.png"]))
    assert [answer.verdict for answer in answers if isinstance(answer, Inspection)] == [Verdict.REVIEW] * 2


# --- export


@pytest.fixture(scope="module")
def exported(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The method as an ONNX folder; its parity has passed."""
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("exported") / "model"
    assert "onnx" in fitted.method.traits.exports
    facts = export_model(fitted.detector, out, "onnx")
    assert facts.parity.passed and facts.parity.max_score_diff is not None
    assert facts.parity.max_score_diff <= 1e-4 and facts.parity.verdict_flips == 0
    return out


def half_invalid() -> tuple[Tensor, Tensor]:
    """The eight pictures, with a part that is not valid in every other one."""
    pictures, valid = eight_pictures()
    valid[::2, ..., 40:] = False
    return pictures, valid


def assert_graph_answers_alike(fitted: Fitted, graph: Runtime) -> None:
    pictures, valid = half_invalid()
    with torch.inference_mode():
        maps = fitted.method(pictures, valid)
    verdicts = [VERDICTS.index(fitted.detector.calibration.verdict(float(score))) for score in maps.score]
    for size in (1, 2, 8):
        for first in range(0, 8, size):
            part = slice(first, first + size)
            found = graph(pictures[part].numpy(), valid[part].numpy())
            np.testing.assert_allclose(found["score"], maps.score[part], rtol=1e-4)
            np.testing.assert_allclose(
                found["anomaly_map"], maps.anomaly_map[part], rtol=1e-3, atol=1e-4 * float(maps.score.max())
            )
            assert found["verdict"].tolist() == verdicts[part]
            assert not found["anomaly_map"][~valid[part, 0].numpy()].any()


def test_onnx_graph_answers_as_the_method(fitted: Fitted, exported: Path) -> None:
    graph = open_graph("onnx", read_model(exported).graph, ("anomaly_map", "score", "verdict"))
    assert_graph_answers_alike(fitted, graph)


def test_openvino_graph_answers_as_the_method(fitted: Fitted, exported: Path) -> None:
    pytest.importorskip("openvino")
    onnx = pytest.importorskip("onnx")
    model = openvino_model(onnx.load_from_string(read_model(exported).graph["graph"]))
    graph = open_graph("openvino", openvino_files(model, half=False), ("anomaly_map", "score", "verdict"))
    assert_graph_answers_alike(fitted, graph)


def test_graph_never_calls_a_picture_of_nan_ok(fitted: Fitted, exported: Path) -> None:
    graph = open_graph("onnx", read_model(exported).graph, ("anomaly_map", "score", "verdict"))
    pictures, valid = eight_pictures()
    pictures[2, :, 30, 30] = float("nan")
    found = graph(pictures.numpy(), valid.numpy())
    assert not np.isfinite(found["score"][2]) and VERDICTS[found["verdict"][2]] != "ok"
    assert np.isfinite(found["score"][[0, 1, 3, 4, 5, 6, 7]]).all()


def test_exported_folder_is_inspected_as_the_model_is(fitted: Fitted, exported: Path) -> None:
    paths = sorted(fitted.good.iterdir())[:5]
    loaded = Detector.load(exported)
    for one, other in zip(fitted.detector.inspect(paths), loaded.inspect(paths), strict=True):
        assert isinstance(one, Inspection) and isinstance(other, Inspection)
        assert other.score == pytest.approx(one.score, rel=1e-4)
        assert (other.verdict, other.valid.shape) == (one.verdict, one.valid.shape)
