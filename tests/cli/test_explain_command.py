"""--explain: pictures of the method's inner view in the run folder and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import TINY, fettle, fit

from conftest import write_good

AGPNET = (
    *("--method", "agpnet", "--set", "width=8", "--set", "heads=2", "--set", "depth=1"),
    *("--set", "batch=8", "--set", "steps=4", "--set", "warmup=0"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explaining")
    good = write_good(folder / "good", 24)
    assert fettle("fit", good, "-o", folder / "model", *TINY, *AGPNET).code == 0
    return folder / "model"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "inspections.jsonl").open()]


def test_inspect_draws_a_row_for_each_picture_and_the_page_shows_it(model: Path, tmp_path: Path) -> None:
    pictures = write_good(tmp_path / "new", 3, first_seed=50)
    assert fettle("inspect", model, pictures, "-o", tmp_path / "run", "--explain").code == 0
    named = [row["explanation"] for row in rows(tmp_path / "run")]
    assert named == [f"explanations/00000{i}_00{i - 1}.jpg" for i in (1, 2, 3)]
    assert all((tmp_path / "run" / name).is_file() for name in named)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["explanation"]
    assert kept["maps"] == ["prior", "learned", "mask", "mask_image", "error"]
    assert fettle("report", tmp_path / "run").code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'src="{name}"' in page for name in named)
    assert "they are not part of the verdict" in page


def test_a_run_without_explanations_clears_the_former_ones(model: Path, tmp_path: Path) -> None:
    pictures = write_good(tmp_path / "new", 2, first_seed=50)
    for more, num_drawn in ((("--explain",), 2), ((), 0)):
        answer = fettle("inspect", model, pictures, "-o", pictures / "run", "--json", *more)
        assert (answer.code, answer.json["pictures"]) == (0, 2)  # its own drawings are left out
        assert len(list((pictures / "run" / "explanations").iterdir())) == num_drawn
    assert [row["explanation"] for row in rows(pictures / "run")] == [None, None]


def test_evaluate_draws_too_and_needs_a_folder_for_it(
    model: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    answer = fettle("evaluate", model, labelled_folder, "--explain", "-o", tmp_path / "run")
    assert answer.code == 0
    assert len(list((tmp_path / "run" / "explanations").iterdir())) == 12
    nowhere = fettle("evaluate", model, labelled_folder, "--explain")
    assert nowhere.code == 2
    assert "Name one with -o" in nowhere.sentence


def test_a_method_that_cannot_explain_is_refused_and_the_former_run_stays(
    labelled_folder: Path, tmp_path: Path
) -> None:
    good, run = labelled_folder / "train" / "good", tmp_path / "run"
    assert fit(good, tmp_path / "model").code == 0
    assert fettle("inspect", tmp_path / "model", good, "-o", run).code == 0
    before = (run / "inspections.jsonl").read_bytes()
    for command, what in (("inspect", good), ("evaluate", labelled_folder)):
        answer = fettle(command, tmp_path / "model", what, "-o", run, "--explain")
        assert answer.code == 2
        assert "'patchcore' cannot explain" in answer.sentence and "agpnet" in answer.sentence
    assert (run / "inspections.jsonl").read_bytes() == before
