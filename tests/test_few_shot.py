"""Few-shot fits: what is chosen, that all of it is learnt from, and what is then not promised."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from conftest import TINY_LEVELS, textured, write_good, write_product
from fettle.backbones import load_backbone
from fettle.datasets.folder import open_folder
from fettle.detector import Detector
from fettle.errors import CalibrationError, DataError, UsageError
from fettle.feature_cache import TrainingPictures
from fettle.gathering import gather_good
from fettle.images.decode import file_sha256, read_picture
from fettle.images.framing import Frame
from fettle.inspection import Inspection, Verdict
from fettle.methods.registry import find_method, make_config, method_names
from fettle.picture_order import PictureOrder
from fettle.protocols import Run, Step, no_progress
from fettle.training import TrainingConfig

TINY: dict[str, object] = {"backbone": "tiny", "weights": "random", "size": 64}
HEAD: dict[str, object] = {"window": 3, "width": 32, "heads": 2, "ffn": 64, "steps": 30}
SETTINGS: dict[str, dict[str, object]] = {
    "agpnet": {"width": 32, "heads": 2, "depth": 1, "steps": 30},
    "cflow": {"code": 16, "blocks": 2, "fibres": 128, "epochs": None, "steps": 30},
    "fpfnet": HEAD,
    "padim": {"channels": 12},
    "tfanet": {"width": 32, "heads": 2, "depth": 1, "rebuild_width": 32, "rebuild_heads": 2, "steps": 30},
    "uniad": HEAD,
}
FRAME = Frame(mode="stretch", height=64, width=64)
TRAINED = [name for name in method_names() if find_method(name).traits.trained]
DISTURBED = [name for name in TRAINED if name != "cflow"]  # it learns a density of features as they are
MEMORY = [name for name in method_names() if name not in TRAINED]


def fit(name: str, good: Path, **more: object) -> Detector:
    return Detector.fit(good, method=name, **{"settings": SETTINGS.get(name, {}), **TINY, **more})


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("few") / "good", 12)


def learnt(detector: Detector) -> set[str]:
    return set(detector.card["picture_keys"])


# --- the choice


def test_fewer_lie_inside_more_and_all_are_on_the_card(twelve: Path) -> None:
    keys = {file_sha256(path)[:16] for path in twelve.iterdir()}
    before: set[str] = set()
    for shots in (1, 2, 4, 8):
        detector = fit("patchcore", twelve, shots=shots)
        assert before < learnt(detector) < keys and len(learnt(detector)) == shots
        data = detector.card["data"]
        assert (data["shots"], data["pictures"]) == (shots, shots)
        before = learnt(detector)
    assert learnt(fit("patchcore", twelve, shots=1, seed=1)) != learnt(fit("patchcore", twelve, shots=1))


def test_names_and_copies_change_nothing(twelve: Path, tmp_path: Path) -> None:
    for place, path in enumerate(sorted(twelve.iterdir(), reverse=True)):
        shutil.copy(path, tmp_path / f"{place:03d}.png")
        shutil.copy(path, tmp_path / f"copy{place}.png")
    first, second = fit("patchcore", twelve, shots=3), fit("patchcore", tmp_path, shots=3)
    assert learnt(first) == learnt(second)
    assert torch.equal(first.method.state_dict()["bank"], second.method.state_dict()["bank"])


def test_a_fit_of_all_is_not_few_shot(twelve: Path) -> None:
    data = fit("patchcore", twelve).card["data"]
    assert (data["shots"], data["pictures"]) == (None, 12)


@pytest.mark.parametrize("name", method_names())
def test_few_shots_are_a_fit_on_a_folder_of_these_pictures(name: str, twelve: Path, tmp_path: Path) -> None:
    """Nothing is learnt from the other pictures, not even a frame."""
    few = fit(name, twelve, shots=2)
    for path in twelve.iterdir():
        if file_sha256(path)[:16] in learnt(few):
            shutil.copy(path, tmp_path / path.name)
    alone = fit(name, tmp_path, shots=2)
    for key, tensor in few.method.state_dict().items():
        assert torch.equal(tensor, alone.method.state_dict()[key]), key
    assert few.calibration == alone.calibration
    assert few.card["data"]["sha256"] == alone.card["data"]["sha256"]


def test_too_many_shots_are_refused_with_the_number_there_is(twelve: Path) -> None:
    with pytest.raises(DataError, match=r"13 shots are asked for, but there are only 12 distinct good"):
        fit("patchcore", twelve, shots=13)


def test_a_picture_that_cannot_be_read_gives_its_place_to_the_next(twelve: Path, tmp_path: Path) -> None:
    for i in range(3):
        broken = (twelve / f"{i:03d}.png").read_bytes()[:900]
        (tmp_path / f"{i}.png").write_bytes(broken)
    for path in sorted(twelve.iterdir())[:2]:
        shutil.copy(path, tmp_path / path.name)
    read = {file_sha256(path)[:16] for path in sorted(twelve.iterdir())[:2]}
    refused = 0
    for seed in range(6):
        detector = fit("patchcore", tmp_path, shots=2, seed=seed)
        assert learnt(detector) == read and detector.num_fit == 2
        refused += len(detector.card["data"]["refused"])
    assert refused > 0
    with pytest.raises(
        DataError, match=r"4 shots are asked for, but there are only 2 distinct .* --shots 2 or"
    ):
        fit("patchcore", tmp_path, shots=4)


def test_each_product_gives_its_shots(tmp_path: Path) -> None:
    for number, name in enumerate(("bolt", "nut")):
        write_product(tmp_path / name, number)
    for method in ("patchcore", "uniad"):
        detector = fit(method, tmp_path, shots=2, multi_class=True)
        assert detector.card["data"]["products"] == {"bolt": 2, "nut": 2}
        assert set(detector.product_calibrations) == {"bolt", "nut"}
        result = detector.evaluate(tmp_path)
        assert set(result["per_product"]) == {"bolt", "nut"}
        assert result["per_product"]["nut"]["image_auroc"] is not None
        assert result["num_seen_in_fit"] == 0
    with pytest.raises(DataError, match="only 24 distinct good pictures of product 'bolt'"):
        fit("patchcore", tmp_path, shots=25, multi_class=True)


# --- every method, from one picture on


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
@pytest.mark.parametrize("name", method_names())
def test_every_method_learns_from_all_and_everything_is_for_review(
    name: str, shots: int, twelve: Path, tmp_path: Path
) -> None:
    detector = fit(name, twelve, shots=shots)
    assert detector.num_fit == shots
    assert detector.calibration.promise_on is None and detector.calibration.num_scores <= shots
    detector.save(tmp_path / "model")
    paths = sorted(twelve.iterdir())[:3]
    for one, other in zip(
        detector.inspect(paths), Detector.load(tmp_path / "model").inspect(paths), strict=True
    ):
        assert isinstance(one, Inspection) and isinstance(other, Inspection)
        assert one.verdict is Verdict.REVIEW
        assert (one.score, one.verdict, one.regions) == (other.score, other.verdict, other.regions)


@pytest.mark.parametrize("name", method_names())
def test_one_good_picture_is_enough_to_rank_a_defect_above_it(name: str, twelve: Path) -> None:
    settings = {**SETTINGS.get(name, {}), **({"steps": 120} if name in TRAINED else {})}
    detector = fit(name, twelve, shots=1, settings=settings)
    good = torch.from_numpy(textured(500)).permute(2, 0, 1)[None].float() / 255
    bad = good.clone()
    bad[..., 20:36, 12:50] = 1 - bad[..., 20:36, 12:50]
    valid = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        assert detector.method(bad, valid).score > detector.method(good, valid).score


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_method_judges_none_and_says_so(name: str, twelve: Path) -> None:
    detector = fit(name, twelve, shots=4)
    assert (detector.calibration.mode, detector.calibration.num_scores) == ("none", 0)
    (sentence,) = detector.calibration.sentences()
    assert "none was left to judge. Run 'fettle calibrate MODEL MORE_GOOD_PICTURES'" in sentence
    assert detector.card["promise"] == sentence
    assert any("learnt from, since no other was kept" in warning for warning in detector.warnings())
    assert not any("learnt from all" in warning for warning in detector.warnings())


@pytest.mark.parametrize("name", TRAINED)
def test_energies_of_the_learnt_pictures_set_the_scale(name: str, twelve: Path) -> None:
    detector = fit(name, twelve, shots=4)
    paths = [path for path in twelve.iterdir() if file_sha256(path)[:16] in learnt(detector)]
    pictures = torch.stack([_pixels(path) for path in paths])
    with torch.no_grad():
        energies = detector.method.patch_energy(pictures, torch.ones(4, 1, 64, 64, dtype=torch.bool))
    ordered = energies.flatten().sort().values
    assert float(ordered[(len(ordered) - 1) // 2]) == pytest.approx(0, abs=1e-4)
    assert float(ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]) == pytest.approx(1, abs=1e-4)


def _pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(FRAME.place(read_picture(path)).views[0])


def test_the_rest_of_the_pictures_calibrates(twelve: Path, tmp_path: Path) -> None:
    """The model leaves out the four that it knows; the promise on the others is exact."""
    more = write_good(tmp_path / "more", 28, first_seed=900)
    for path in twelve.iterdir():
        shutil.copy(path, more / f"old{path.name}")
    fresh = fit("uniad", twelve, shots=4).recalibrated(more)
    assert (fresh.calibration.mode, fresh.calibration.num_scores) == ("holdout", 36)
    assert fresh.calibration.promise_on == "review" and fresh.calibration.exact


@pytest.mark.parametrize("name", MEMORY)
def test_methods_that_leave_one_out_go_on_with_it(name: str, twelve: Path) -> None:
    calibration = fit(name, twelve, shots=8).calibration
    assert (calibration.mode, calibration.num_scores) == ("leave_one_out", 8)


# --- what a few-shot fit changes


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(("preset", "steps"), [("compact", 300), ("paper", 1000)])
def test_steps_replace_epochs_in_every_preset(name: str, preset: str, steps: int) -> None:
    method = find_method(name)
    plain = make_config(method, preset, {})
    assert isinstance(plain, TrainingConfig)
    config = make_config(method, preset, method.Config.few_shot(preset))
    assert isinstance(config, TrainingConfig)
    assert (config.steps, config.epochs, config.batch) == (steps, None, 8)
    kept = set(type(config).model_fields) - {"steps", "epochs", "batch", "early_stop", "lr"}
    assert all(getattr(config, field) == getattr(plain, field) for field in kept)


def test_the_learning_rate_of_agpnets_paper_preset_goes_with_the_batch() -> None:
    method = find_method("agpnet")
    rates = [
        make_config(method, "paper", own).model_dump()["lr"] for own in ({}, method.Config.few_shot("paper"))
    ]
    assert rates == [4e-4, 1e-4]
    assert "lr" not in method.Config.few_shot("compact")


def test_steps_set_by_hand_win(twelve: Path) -> None:
    small = {key: value for key, value in HEAD.items() if key != "steps"}
    config = fit("uniad", twelve, shots=2, settings={**small, "epochs": 9, "batch": 3}).card["fit"]
    assert (config["steps"], config["views_seen"]) == (6, 18)
    plain = fit("uniad", twelve, shots=1, settings=small).card["fit"]
    assert (plain["steps"], plain["views_seen"]) == (300, 2400)


def test_a_fit_of_all_keeps_the_presets_steps(twelve: Path) -> None:
    assert fit("uniad", twelve, shots=2).method.config.batch == 8
    assert fit("uniad", twelve).method.config.batch == 4


def test_no_patch_is_thinned_out_below_ten_thousand(tmp_path: Path) -> None:
    """Six pictures of 320 x 320 px have 9,600 patches at stride 8; seven have 11,200."""
    good = write_good(tmp_path / "good", 7, height=320, width=320)
    sizes = {"size": 320, "settings": {"levels": ["stride8"]}}
    all_rows = fit("patchcore", good, shots=6, **sizes).card["fit"]
    assert (all_rows["bank_rows"], all_rows["bank_reductions"]) == (9600, 0)
    more = fit("patchcore", good, shots=7, **sizes).card["fit"]
    assert more["bank_rows"] == 10_000
    by_hand = fit("patchcore", good, shots=6, size=320, settings={"levels": ["stride8"], "bank_rows": 500})
    assert by_hand.card["fit"]["bank_rows"] == 500
    assert fit("patchcore", good, **sizes).card["fit"]["bank_rows"] == 4096


@pytest.mark.parametrize("name", DISTURBED)
def test_one_picture_fills_a_batch_with_fresh_noise_each(name: str, tmp_path: Path) -> None:
    """The same clean features eight times, disturbed in eight ways; the next step disturbs otherwise."""
    kind = find_method(name)
    noise = {"agpnet": {"levels": "feature"}, "fpfnet": {"pool": "gaussian"}}
    config = make_config(kind, "compact", {**SETTINGS[name], **noise.get(name, {})})
    levels = kind.choose_levels(TINY_LEVELS, config)
    method = kind(load_backbone("tiny", levels, weights="random"), config, levels)
    good = gather_good(open_folder(write_good(tmp_path / "good", 1)), None, no_progress).pictures
    pictures = TrainingPictures(method, good, FRAME, Run())
    method.prepare(pictures, Run())
    seen: list[torch.Tensor] = []
    for place, module in method.named_modules():
        first = place.endswith(("project_in", "aggregation.0"))  # what the network sees of the features
        if first and not place.startswith("momentum"):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    order = PictureOrder(pictures.products, "none", seed=0)
    method.train()
    for number in (8, 9):
        batch = pictures.batch(order.indices(number, 8))
        clean = next(iter(batch.features.values()))
        assert len(clean) == 8 and bool((clean == clean[0]).all())
        seen.clear()
        list(method.losses(batch, Step(number, 10)))
        rows = {row.numpy().tobytes() for row in seen[-1]}
        assert len(rows) == 8
        if number == 8:
            before = rows
    assert not before & rows


# --- what does not go together


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("patchcore", {"calibration": "holdout"}, r"'holdout' is not for a few-shot fit.*fettle calibrate"),
        ("uniad", {"calibration": "kfold"}, "'kfold' is not for a few-shot fit"),
        ("patchcore", {"calibration": "cross"}, "'cross' is not for a few-shot fit"),
        ("uniad", {"calibration": "leave_one_out"}, r"cannot leave pictures out\. Leave --calibration out"),
        (
            "uniad",
            {"settings": {**HEAD, "early_stop": 0.5}},
            r"early_stop keeps pictures .* Leave early_stop",
        ),
        ("uniad", {"strict": True}, "promises nothing. Leave --strict or --shots out"),
        ("patchcore", {"shots": 0}, "'shots' cannot be 0"),
    ],
)
def test_what_would_keep_pictures_out_is_refused(
    method: str, settings: dict[str, object], words: str, twelve: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        fit(method, twelve, **{"shots": 4, **settings})


def test_strict_fails_where_the_few_promise_nothing(twelve: Path) -> None:
    with pytest.raises(CalibrationError, match="8 good pictures cannot promise"):
        fit("patchcore", twelve, shots=8, strict=True)
