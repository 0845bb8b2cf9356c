"""Methods that compare with a template: it is in the run folder, and `calibrate --template` changes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import TINY, fettle, fit
from PIL import Image

from conftest import write_good
from fettle.detector import Detector
from fettle.images.decode import file_sha256
from templated_toys import register


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register(monkeypatch)
    good = write_good(tmp_path / "good", 24)
    assert fettle("fit", good, "-o", tmp_path / "model", *TINY, "--method", "comparing").code == 0
    return tmp_path / "model"


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return write_good(tmp_path / "fresh", 20, first_seed=2000)


def test_calibrate_takes_another_template(model: Path, fresh: Path, tmp_path: Path) -> None:
    template = fresh / "004.png"
    answer = fettle("calibrate", model, fresh, "-o", tmp_path / "model2", "--template", template, "--json")
    assert (answer.code, answer.json["num_calibration"]) == (0, 19)
    described = Detector.load(tmp_path / "model2").describe()
    assert described["template_changes"] == [
        {"name": "004.png", "sha256": file_sha256(template), "product": ""}
    ]
    assert "template_changes" not in Detector.load(model).describe()


def test_a_run_shows_the_template_and_notes_what_was_compared(
    model: Path, fresh: Path, tmp_path: Path
) -> None:
    (named,) = Detector.load(model).templates()
    assert fettle("inspect", model, fresh, "-o", fresh / "run", "--explain").code == 0
    kept = json.loads((fresh / "run" / "run.json").read_text())
    assert kept["templates"] == [{"file": f"templates/01-{named.name}", "name": named.name, "product": ""}]
    assert kept["explanation"]["pictures"] == ["template"]
    with Image.open(fresh / "run" / "templates" / f"01-{named.name}") as picture:
        assert picture.size == (64, 64)
    rows = [json.loads(line) for line in (fresh / "run" / "inspections.jsonl").open()]
    assert [row["notes"] for row in rows] == [[f"compared with {named.name}"]] * 20
    assert fettle("report", fresh / "run").code == 0
    assert "<h2>Compared with</h2>" in (fresh / "run" / "report.html").read_text()
    again = fettle("inspect", model, fresh, "-o", fresh / "run", "--json")
    assert again.json["pictures"] == 20  # its own drawings are left out


def test_a_method_without_a_template_is_refused(good_folder: Path, tmp_path: Path) -> None:
    assert fit(good_folder, tmp_path / "model").code == 0
    more = ("-o", tmp_path / "model2", "--template", good_folder / "000.png")
    answer = fettle("calibrate", tmp_path / "model", good_folder, *more)
    assert answer.code == 2
    assert "'patchcore' compares with no template. Leave the template out" in answer.sentence
    assert not (tmp_path / "model2").exists()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--template-of", "nut"), 2, "Give --template FILE too."),
        (("--template", "torn.png", "--template-of", "nut"), 1, "'torn.png'"),
    ],
)
def test_what_cannot_be_a_template_is_one_sentence(
    model: Path, fresh: Path, tmp_path: Path, more: tuple[str, ...], code: int, words: str
) -> None:
    answer = fettle("calibrate", model, fresh, "-o", tmp_path / "model2", *more)
    assert answer.code == code
    assert words in answer.sentence
    assert not (tmp_path / "model2").exists()
