"""The pictures that a method compares with: in the run folder, and on the page near the model card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fettle.inspection import ComparedWith
from fettle.protocols import Json
from fettle.report import RunWriter, Thresholds, write_report
from fettle.report.compared import read_templates
from fettle.report.run_folder import read_run


def template(name: str, product: str = "", grey: int = 9) -> ComparedWith:
    return ComparedWith(name, product, np.full((24, 32, 3), grey, np.uint8))


def run_with(out: Path, *templates: ComparedWith) -> Path:
    with RunWriter(
        out, card={"name": "m"}, thresholds=Thresholds(), overlays=False, templates=templates
    ) as run:
        run.finish()
    return out


def page_of(out: Path) -> str:
    return write_report(out).read_text(encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_templates_are_written_pixel_by_pixel_and_run_json_names_them(tmp_path: Path) -> None:
    run_with(tmp_path, template("a 1.png", "nut", 9), template("b.tif", "bolt", 7))
    assert read_run(tmp_path)["templates"] == [
        {"file": "templates/01-a_1.png", "name": "a 1.png", "product": "nut"},
        {"file": "templates/02-b.png", "name": "b.tif", "product": "bolt"},
    ]
    for name, grey in (("01-a_1.png", 9), ("02-b.png", 7)):
        with Image.open(tmp_path / "templates" / name) as picture:
            assert picture.size == (32, 24) and (np.asarray(picture) == grey).all()


def test_without_templates_there_is_no_folder_and_no_heading(tmp_path: Path) -> None:
    run_with(tmp_path)
    assert not (tmp_path / "templates").exists() and read_run(tmp_path)["templates"] == []
    assert "Compared with" not in page_of(tmp_path)


@pytest.mark.parametrize("name", ["../../evil.png", "/etc/passwd", "", "..", "<b>\n\udcff.png", "x" * 999])
def test_templates_stay_inside_the_folder_whatever_their_names(tmp_path: Path, name: str) -> None:
    run_with(tmp_path / "out", template(name))
    (file,) = names(tmp_path / "out" / "templates")
    assert file.startswith("01-") and file.isascii() and "<" not in file and len(file) < 80
    assert names(tmp_path) == ["out"]
    assert f'src="templates/{file}"' in page_of(tmp_path / "out")


def test_a_new_run_removes_former_templates_and_nothing_else(tmp_path: Path) -> None:
    run_with(tmp_path, template("a.png"), template("b.png"))
    (tmp_path / "templates" / "09-mine.png").write_bytes(b"mine")
    run_with(tmp_path, template("c.png"))
    assert names(tmp_path / "templates") == ["01-c.png", "09-mine.png"]


def test_the_page_shows_name_and_product_before_the_model_card(tmp_path: Path) -> None:
    page = page_of(run_with(tmp_path, template("a.png", "nut")))
    shown = page[page.index("<h2>Compared with</h2>") : page.index("<h2>Model card</h2>")]
    assert 'src="templates/01-a.png" width="32" height="24"' in shown
    assert ">a.png<" in shown and ">nut<" in shown and "with this good one" in shown


def test_a_template_that_was_not_written_is_not_shown(tmp_path: Path) -> None:
    run_with(tmp_path, template("a.png"), template("b.png"))
    (tmp_path / "templates" / "01-a.png").unlink()
    page = page_of(tmp_path)
    assert "01-a.png" not in page and "02-b.png" in page


def test_what_a_model_says_is_never_an_element(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    page = page_of(run_with(tmp_path, template(evil, evil)))
    assert page.count("<script>") == 1 and page.count("&lt;script&gt;alert(1)") == 4


@pytest.mark.parametrize(
    "entries",
    [
        "templates/01-a.png",
        ["templates/01-a.png"],
        *(
            [{"file": file, "name": "a", "product": ""}]
            for file in (
                "templates/../../mine.png",
                "/templates/01-a.png",
                "templates/01-a.png\n",
                "templates/01-a.html",
                "https://x/templates/01-a.png",
                None,
            )
        ),
    ],
)
def test_no_file_elsewhere_is_shown_or_removed(tmp_path: Path, entries: Json) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    out = run_with(tmp_path / "out")
    run = {**json.loads((out / "run.json").read_text(encoding="utf-8")), "templates": entries}
    (out / "run.json").write_text(json.dumps(run), encoding="utf-8")
    assert read_templates(read_run(out)) == []
    assert "Compared with" not in page_of(out)
    run_with(out)
    assert (tmp_path / "mine.png").exists()


def test_a_run_before_templates_is_read(tmp_path: Path) -> None:
    run_with(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    del run["templates"]
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    assert "Compared with" not in page_of(tmp_path)
