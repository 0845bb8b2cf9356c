"""Exported folders: what is written, what is refused, and that they are models as any other."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from conftest import textured, write_good
from fettle.detector import Detector
from fettle.errors import CalibrationError, DataError, ModelFolderError, UsageError
from fettle.export import run as export_run
from fettle.export.graph import VERDICTS, CrossVerdict, ScoreVerdict
from fettle.export.parity import Tolerances, good_views, measure_parity
from fettle.export.run import export_model
from fettle.exported import ExportFacts
from fettle.inspection import Inspection, Verdict
from fettle.model_folder import MANIFEST, PARITY, read_model
from fettle.protocols import no_progress, no_words
from fettle.runtimes import Outputs, open_graph, openvino_core, signal_stack

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_runtime.py"


def fit(good: Path, **settings: object) -> Detector:
    usual: dict[str, object] = {"backbone": "tiny", "weights": "random", "size": 64, "target_frr": 0.05}
    return Detector.fit(good, **{**usual, "settings": {"bank_rows": 200}, **settings})


def scratched(folder: Path, number: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for i in range(number):
        pixels = textured(500 + i)
        pixels[20:32, 12:50] = 255 - pixels[20:32, 12:50]
        Image.fromarray(pixels).save(folder / f"bad{i}.png")
        paths.append(folder / f"bad{i}.png")
    return paths


def framed(path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A picture of 64 px as a graph takes it."""
    pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(pixels), np.ones((1, 1, 64, 64), bool)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good"), 24)


@pytest.fixture(scope="module")
def detector(good: Path) -> Detector:
    return fit(good)


@pytest.fixture(scope="module")
def onnx_folder(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "model"
    export_model(detector, out, "onnx")
    return out


def assert_same_answers(one: Detector, other: Detector, paths: Sequence[Path], rel: float = 1e-4) -> None:
    for expected, found in zip(one.inspect(paths), other.inspect(paths), strict=True):
        assert isinstance(expected, Inspection) and isinstance(found, Inspection)
        assert found.score == pytest.approx(expected.score, rel=rel)
        assert found.verdict == expected.verdict
        assert len(found.regions) == len(expected.regions)


# --- the folder


def test_folder_carries_the_models_manifest(detector: Detector, onnx_folder: Path) -> None:
    loaded = Detector.load(onnx_folder)
    assert loaded.calibration == detector.calibration
    assert loaded.frame == detector.frame
    assert loaded.card["picture_keys"] == detector.card["picture_keys"]
    described, exported = detector.describe(), loaded.describe()
    assert exported.pop("export")
    assert exported == described


def test_parity_is_written_for_people_and_in_the_manifest(onnx_folder: Path) -> None:
    facts = ExportFacts.model_validate(read_model(onnx_folder).content["export"])
    told = json.loads((onnx_folder / PARITY).read_text())
    assert told == {"format": "onnx", "precision": "fp32", **facts.parity.model_dump(mode="json")}
    assert told["passed"] is True and told["verdict_flips"] == 0 and told["max_score_diff"] <= 1e-4
    assert told["batches"] == [1, 2, 8] and told["computes_in"] == "fp32"
    assert told["runtime"] == "ONNX Runtime" and told["latency_ratio"] > 0


def test_graph_holds_no_path_of_this_machine(onnx_folder: Path) -> None:
    assert str(Path(torch.__file__).parent).encode() not in read_model(onnx_folder).graph["graph"]
    assert str(Path(__file__).parents[2]).encode() not in read_model(onnx_folder).graph["graph"]


def test_defects_are_rejected_alike(detector: Detector, onnx_folder: Path, tmp_path: Path) -> None:
    paths = scratched(tmp_path / "bad", 3)
    assert_same_answers(detector, Detector.load(onnx_folder), paths)
    answers = list(Detector.load(onnx_folder).inspect(paths))
    assert {answer.verdict for answer in answers if isinstance(answer, Inspection)} == {Verdict.REJECT}


def test_evaluation_takes_the_folder(onnx_folder: Path, labelled_folder: Path) -> None:
    result = Detector.load(onnx_folder).evaluate(labelled_folder)
    assert result["image_auroc"] == 1.0


def test_saving_a_model_over_an_exported_one_leaves_nothing_of_it(detector: Detector, tmp_path: Path) -> None:
    export_model(detector, tmp_path / "model", "onnx")
    detector.save(tmp_path / "model")
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    assert not (tmp_path / "model" / PARITY).exists()


# --- formats and precisions


@pytest.mark.parametrize(
    ("format_", "precision"), [("onnx", "fp16"), ("openvino", "fp32"), ("openvino", "fp16")]
)
def test_other_formats_answer_alike(
    detector: Detector, onnx_folder: Path, good: Path, tmp_path: Path, format_: str, precision: str
) -> None:
    if format_ == "openvino":
        pytest.importorskip("openvino")
    facts = export_model(detector, tmp_path / "model", format_, precision=precision)
    assert facts.parity.passed and facts.parity.computes_in == "fp32"
    rel = 1e-4 if precision == "fp32" else 1e-2
    loaded = Detector.load(tmp_path / "model")
    assert_same_answers(detector, loaded, [*sorted(good.iterdir())[:3], *scratched(tmp_path / "bad", 2)], rel)
    if precision == "fp16":
        size = sum(len(data) for data in read_model(tmp_path / "model").graph.values())
        assert size < 0.8 * len(read_model(onnx_folder).graph["graph"]) or format_ == "openvino"


def test_pt2_is_loaded_only_where_it_is_trusted(detector: Detector, good: Path, tmp_path: Path) -> None:
    facts = export_model(detector, tmp_path / "model", "pt2")
    assert facts.parity.passed and facts.parity.runtime == "PyTorch"
    with pytest.raises(UsageError, match="may execute"):
        Detector.load(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model", trusted=True)
    assert_same_answers(detector, loaded, sorted(good.iterdir())[:3])


_INTERRUPTED = """
import gc, os, signal, sys
import numpy as np
import openvino
from openvino import opset13
from fettle.runtimes import open_graph

signal.signal(signal.SIGINT, signal.default_int_handler)
given = opset13.parameter([1, 3], np.float32)
openvino.save_model(openvino.Model([opset13.relu(given)], [given], "graph"), sys.argv[1] + "/graph.xml")
paths = {"graph": sys.argv[1] + "/graph.xml", "weights": sys.argv[1] + "/graph.bin"}
files = {part: open(path, "rb").read() for part, path in paths.items()}
first, second = (open_graph("openvino", files, []) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_after_graphs_have_gone_is_an_interrupt(tmp_path: Path) -> None:
    """It was a crash where each graph had an OpenVINO core of its own."""
    pytest.importorskip("openvino")
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.slow
def test_int8_stays_within_its_tolerance(detector: Detector, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    unseen = write_good(tmp_path / "unseen", 20, first_seed=100)
    openvino_core().get_property("CPU", "FULL_DEVICE_NAME")  # its plugin is there from now on
    stack = signal_stack()
    facts = export_model(
        detector, tmp_path / "model", "openvino", precision="int8", pictures=unseen, calibrate=True
    )
    assert bytes(signal_stack() or b"") == bytes(stack or b"")
    assert facts.parity.max_score_diff is not None and facts.parity.max_score_diff <= 0.05
    assert "convolutions compute in 8 bit" in facts.notes[0] and "Thresholds are set" in facts.notes[1]


@pytest.mark.parametrize("format_", ["onnx", "openvino"])
def test_thresholds_are_set_in_the_precision_that_is_shipped(
    good: Path, tmp_path: Path, format_: str
) -> None:
    """The graph's thresholds are those of its own scores, also where the model had folds."""
    pytest.importorskip("openvino")
    detector = fit(good, calibration="cross")
    unseen = write_good(tmp_path / "unseen", 24, first_seed=100)
    facts = export_model(
        detector, tmp_path / "model", format_, precision="fp16", pictures=unseen, calibrate=True
    )
    assert facts.parity.passed and "Thresholds are set on 24 good pictures" in facts.notes[-1]
    shipped = Detector.load(tmp_path / "model")
    scores = sorted(
        one.score for one in shipped.inspect(sorted(unseen.iterdir())) if isinstance(one, Inspection)
    )
    assert np.allclose(sorted(shipped.calibration.scores), scores, rtol=1e-6)
    own = detector.recalibrated(unseen)
    assert not np.allclose(sorted(own.calibration.scores), scores, rtol=1e-6)
    review = shipped.calibration.t_review
    assert review is not None and min(scores) < review
    paths = [*sorted(unseen.iterdir()), *scratched(tmp_path / "bad", 4)]
    answers = [answer for answer in shipped.inspect(paths) if isinstance(answer, Inspection)]
    assert {answer.verdict for answer in answers} >= {Verdict.OK, Verdict.REJECT}
    graph = open_graph(shipped.card["export"]["format"], read_model(tmp_path / "model").graph, facts.outputs)  # type: ignore[index,call-overload,arg-type]
    for path, answer in zip(paths, answers, strict=True):
        assert VERDICTS[graph(*framed(path))["verdict"][0]] == answer.verdict.value


def test_thresholds_need_fresh_pictures_and_another_precision(
    detector: Detector, good: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert "fettle calibrate" in refused(detector, out, "onnx", pictures=good, calibrate=True)
    assert "--pictures" in refused(detector, out, "onnx", precision="fp16", calibrate=True)
    with pytest.raises(DataError, match="has learnt from all"):
        export_model(detector, out, "onnx", precision="fp16", pictures=good, calibrate=True)
    few = write_good(tmp_path / "few", 3, first_seed=100)
    with pytest.raises(CalibrationError):
        export_model(detector, out, "onnx", precision="fp16", pictures=few, calibrate=True)
    assert not out.exists()


def test_cross_calibration_goes_into_the_graph(good: Path, tmp_path: Path) -> None:
    detector = fit(good, calibration="cross")
    facts = export_model(detector, tmp_path / "model", "onnx")
    assert "fold_scores" in facts.outputs and facts.parity.verdict_flips == 0
    paths = [*sorted(good.iterdir())[:4], *scratched(tmp_path / "bad", 2)]
    assert_same_answers(detector, Detector.load(tmp_path / "model"), paths)
    graph = open_graph("onnx", read_model(tmp_path / "model").graph, facts.outputs)
    answers = [answer for answer in detector.inspect(paths) if isinstance(answer, Inspection)]
    assert {answer.verdict for answer in answers} >= {Verdict.OK, Verdict.REJECT}
    for path, answer in zip(paths, answers, strict=True):
        assert VERDICTS[graph(*framed(path))["verdict"][0]] == answer.verdict.value


def test_rounding_does_not_tell_a_good_picture_from_its_own_score(detector: Detector) -> None:
    """A threshold is such a score, and so is what a cross calibration counts."""
    calibration = detector.calibration
    bound = calibration.t_review
    assert bound is not None
    scores = torch.tensor([bound, bound * (1 + 1e-6), bound * (1 + 1e-4)])
    assert (ScoreVerdict(calibration)(scores) > 0).tolist() == [False, False, True]
    many = tuple(float(i) for i in range(1, 101))
    cross = calibration.model_copy(
        update={"scores": many, "folds": (0,) * 100, "promise_on": "review", "alpha_review": 0.05}
    )
    scores = 96 * torch.tensor([[1.0], [1 + 1e-6], [1 + 1e-4]])  # five are at least as odd: p is 6 in 101
    assert (CrossVerdict(cross)(scores) > 0).tolist() == [False, False, True]


OTHER_SETTINGS: list[tuple[str, dict[str, object]]] = [
    ("patchcore", {"bank_rows": 200, "neighbours": 3}),
    ("patchcore", {"bank_rows": 200, "score": "patch_max", "reweight": 3}),
    ("patchcore", {"bank_rows": 200, "search": "faiss"}),
    ("padim", {"channels": 12, "reduction": "draw"}),
    ("padim", {"channels": 12, "grid_stride": 8}),
    ("cflow", {"code": 16, "blocks": 2, "epochs": None, "steps": 5, "score_form": "prob"}),
    ("tfanet", {"steps": 5, "patch": 3, "score": "top1%", "template": "learned"}),  # cells of no whole pixels
]


@pytest.mark.parametrize(("method", "settings"), OTHER_SETTINGS)
def test_other_settings_are_exported(
    good: Path, tmp_path: Path, method: str, settings: dict[str, object]
) -> None:
    detector = fit(good, method=method, settings=settings)
    assert export_model(detector, tmp_path / "model", "onnx").parity.passed


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet18"])
def test_real_architectures_are_exported(good: Path, tmp_path: Path, backbone: str) -> None:
    """A ViT whose positions are resampled for the frame, and a network whose batch norms are folded."""
    detector = fit(good, backbone=backbone)
    facts = export_model(detector, tmp_path / "model", "onnx")
    assert facts.parity.passed


def test_large_banks_are_searched_in_blocks(detector: Detector, good: Path, tmp_path: Path) -> None:
    """Of a bank beyond one block the nearest row is still found, wherever it lies."""
    large = fit(good, settings={"bank_rows": 0})
    bank = large.method.state_dict()["bank"]
    filler = bank[:1].expand(5000, -1) + 100.0
    large.method.bank = torch.cat([bank[:100], filler, bank[100:]])  # type: ignore[attr-defined]
    unseen = write_good(tmp_path / "unseen", 4, first_seed=100)
    assert export_model(large, tmp_path / "model", "onnx", pictures=unseen).parity.passed


def test_pictures_that_a_memory_holds_whole_are_compared_too(good: Path, tmp_path: Path) -> None:
    """They score 0, or what rounding makes of it."""
    detector = fit(good, shots=2)
    assert export_model(detector, tmp_path / "model", "onnx").parity.passed


# --- parity


class Shifted:
    """A runtime whose scores are a little off."""

    name, version, computes_in = "shifted", "1", "fp32"

    def __init__(self, folder: Path, factor: float) -> None:
        self._graph = open_graph("onnx", read_model(folder).graph, ("anomaly_map", "score", "verdict"))
        self._factor = np.float32(factor)

    def __call__(self, pictures: NDArray[np.float32], valid: NDArray[np.bool_]) -> Outputs:
        found = self._graph(pictures, valid)
        return {**found, "score": found["score"] * self._factor}


def test_parity_measures_how_far_scores_are(detector: Detector, onnx_folder: Path) -> None:
    views = good_views(detector, None, no_words)
    tolerances = Tolerances(score=1e-3, map=1e-3, flips=0)
    parity = measure_parity(detector, Shifted(onnx_folder, 1.01), views, tolerances, no_progress)
    assert parity.max_score_diff is not None and not parity.passed
    assert 0.008 < parity.max_score_diff < 0.0101  # a score below a good picture's usual one counts as that
    broken = measure_parity(detector, Shifted(onnx_folder, float("nan")), views, tolerances, no_progress)
    assert broken.max_score_diff is None and not broken.passed


def test_a_model_that_failed_is_written_and_not_loaded(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export_run.TOLERANCES, "fp32", Tolerances(score=-1.0, map=1.0, flips=0.0))
    facts = export_model(detector, tmp_path / "model", "onnx")
    assert not facts.parity.passed
    assert json.loads((tmp_path / "model" / PARITY).read_text())["passed"] is False
    with pytest.raises(ModelFolderError, match="did not pass its parity check"):
        Detector.load(tmp_path / "model")


def test_pictures_of_a_folder_are_compared(detector: Detector, tmp_path: Path) -> None:
    unseen = write_good(tmp_path / "unseen", 3, first_seed=100)
    (unseen / "broken.png").write_bytes(b"no picture")
    said: list[str] = []
    views = good_views(detector, unseen, said.append)
    assert views.number == 3 and [number for _, _, number in views] == [3]
    assert len(said) == 1 and "broken.png" in said[0]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="no picture that can be read"):
        good_views(detector, tmp_path / "none", no_words)


# --- what is refused


def refused(detector: Detector, out: Path, *arguments: Any, **more: Any) -> str:
    with pytest.raises(UsageError) as caught:
        export_model(detector, out, *arguments, **more)
    assert not out.exists()
    return str(caught.value)


def test_what_is_not_offered_is_refused_with_what_is(detector: Detector, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert "Did you mean 'onnx'" in refused(detector, out, "onx")
    assert "Did you mean 'fp16'" in refused(detector, out, "onnx", precision="f16")
    assert "not offered in int8. It comes in fp32, fp16." in refused(detector, out, "onnx", precision="int8")
    assert "It comes in fp32." in refused(detector, out, "pt2", precision="fp16")
    assert "--pictures" in refused(detector, out, "openvino", precision="int8")


def test_a_method_whose_traits_name_no_format_is_refused(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = type(detector.method)
    monkeypatch.setattr(method, "traits", replace(method.traits, exports=()))
    assert "It can to no format." in refused(detector, tmp_path / "model", "onnx")


def test_a_model_without_kept_pictures_needs_some(good: Path, tmp_path: Path) -> None:
    detector = fit(good, refine_refs=0)
    assert "--pictures" in refused(detector, tmp_path / "model", "onnx")
    assert export_model(detector, tmp_path / "model", "onnx", pictures=good).parity.pictures == 24


def test_a_missing_package_is_named_with_the_remedy(
    detector: Detector, onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest, **more)

    for name in [known for known in sys.modules if known.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    assert "pip install 'fettle[export]'" in refused(detector, tmp_path / "model", "onnx")
    with pytest.raises(UsageError, match=r"fettle\[export\]"):
        Detector.load(onnx_folder)


def test_what_needs_the_model_itself_is_refused(onnx_folder: Path, good: Path, tmp_path: Path) -> None:
    loaded = Detector.load(onnx_folder)
    for name in ("f2pad", "difference", "grabcut", "guided", "blur"):
        with pytest.raises(UsageError, match="gives no gradients or patch energies"):
            list(loaded.inspect(sorted(good.iterdir())[:1], refine=name))
    with pytest.raises(UsageError, match="no inner view"):
        loaded.explainer()
    with pytest.raises(UsageError, match="keeps its thresholds"):
        loaded.recalibrated(good)
    with pytest.raises(UsageError, match="copy its folder"):
        loaded.save(tmp_path / "again")
    with pytest.raises(UsageError, match="gives no patch energies"):
        loaded.method.patch_energy(torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool))
    assert "is not exported again" in refused(loaded, tmp_path / "again", "onnx")
    assert loaded.templates() == []


def test_an_altered_graph_is_refused(detector: Detector, tmp_path: Path) -> None:
    export_model(detector, tmp_path / "model", "onnx")
    (graph,) = (tmp_path / "model").glob("graph-*.onnx")
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with pytest.raises(ModelFolderError, match="was altered"):
        Detector.load(tmp_path / "model")


def test_an_altered_parity_in_the_manifest_is_refused(detector: Detector, tmp_path: Path) -> None:
    export_model(detector, tmp_path / "model", "onnx")
    manifest = tmp_path / "model" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"verdict_flips": 0', '"verdict_flips": 1'))
    with pytest.raises(ModelFolderError, match="was altered"):
        Detector.load(tmp_path / "model")


# --- the example


@pytest.mark.parametrize("frame", ["auto", "pad"])
def test_example_gives_the_scores_of_inspect(frame: str, tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 8, height=48, width=72)
    detector = fit(good, frame=frame)
    export_model(detector, tmp_path / "model", "onnx")
    paths = sorted(good.iterdir())[:2]
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    Image.fromarray(np.full((48, 72), 40_000, np.uint16)).save(tmp_path / "deep.png")
    asked = [tmp_path / "damaged.png", tmp_path / "deep.png", *paths]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "model"), *map(str, asked)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [str(p) for p in asked[:2]]
    for line, answer in zip(done.stdout.splitlines(), detector.inspect(paths), strict=True):
        assert isinstance(answer, Inspection)
        path, score, verdict = line.split()
        assert (path, verdict) == (answer.path, answer.verdict.value)
        assert float(score) == pytest.approx(answer.score, rel=1e-4)


def test_example_imports_neither_torch_nor_fettle() -> None:
    words = EXAMPLE.read_text(encoding="utf-8")
    assert "import torch" not in words and "import fettle" not in words and "from fettle" not in words
