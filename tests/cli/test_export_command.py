"""`fettle export`, and its folder in the place of a model for the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Answer, fettle, fit

from conftest import write_good
from fettle.export import run as export_run
from fettle.export.parity import Tolerances

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good"), 24)


@pytest.fixture(scope="module")
def model(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    assert fit(good, out).code == 0
    return out


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    answer = fettle("export", model, "-o", out, "--format", "onnx", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["parity"]["passed"] is True and answer.json["model"] == str(out)
    assert "Tracing" in answer.err and "Traceback" not in answer.err
    return out


def test_words_say_what_was_proven(model: Path, tmp_path: Path, good: Path) -> None:
    answer = fettle("export", model, "-o", tmp_path / "out", "--format", "onnx", "--pictures", good)
    assert answer.code == 0
    assert "ONNX Runtime" in answer.out and "computing in fp32" in answer.out
    assert f"Parity passed on 24 pictures in '{good.name}': scores differ by at most" in answer.out


def test_inspect_takes_an_exported_folder(model: Path, exported: Path, good: Path, tmp_path: Path) -> None:
    scores = []
    for number, folder in enumerate((model, exported)):
        out = tmp_path / str(number)
        assert fettle("inspect", folder, good, "-o", out).code == 0
        rows = [json.loads(line) for line in (out / "inspections.jsonl").read_text().splitlines()]
        scores.append([(row["score"], row["verdict"]) for row in rows])
        assert fettle("report", out).code == 0
    for (one, verdict), (other, other_verdict) in zip(*scores, strict=True):
        assert other == pytest.approx(one, rel=1e-4) and other_verdict == verdict


def test_evaluate_takes_an_exported_folder(exported: Path, labelled_folder: Path) -> None:
    answer = fettle("evaluate", exported, labelled_folder, "--json")
    assert answer.code == 0 and answer.json["image_auroc"] == 1.0


def refused(answer: Answer) -> str:
    assert answer.code == 2
    return answer.sentence


def test_what_a_graph_cannot_do_is_refused_in_one_sentence(
    exported: Path, good: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "f2pad" in refused(fettle("inspect", exported, good, "-o", out, "--refine", "f2pad"))
    assert "inner view" in refused(fettle("inspect", exported, good, "-o", out, "--explain"))
    assert "thresholds" in refused(fettle("calibrate", exported, good, "-o", out))
    assert not out.exists()


def test_a_fitted_model_is_not_replaced_by_its_export(model: Path) -> None:
    before = sorted(path.name for path in model.iterdir())
    sentence = refused(fettle("export", model, "-o", model, "--format", "pt2"))
    assert "holds a fitted model" in sentence and "-o" in sentence
    assert sorted(path.name for path in model.iterdir()) == before


def test_a_failed_parity_is_exit_code_1(
    model: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export_run.TOLERANCES, "fp32", Tolerances(score=-1.0, map=1.0, flips=0.0))
    answer = fettle("export", model, "-o", tmp_path / "out", "--format", "onnx")
    assert answer.code == 1 and "Parity FAILED" in answer.out
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"] is False
    answer = fettle("inspect", tmp_path / "out", good, "-o", tmp_path / "run")
    assert answer.code == 1 and "did not pass its parity check" in answer.sentence


def test_methods_say_what_they_export_to() -> None:
    rows = fettle("methods", "--json").json
    assert {row["name"]: row["exports"] for row in rows}["patchcore"] == ["onnx", "openvino", "pt2"]
    assert "onnx, openvino, pt2" in fettle("methods").out
