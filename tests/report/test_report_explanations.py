"""The inner view of a method: how it is drawn, what the run folder keeps, what the page shows."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from fettle.errors import DataError, UsageError
from fettle.inspection import Explained, Inspection, Verdict
from fettle.report import RunWriter, Thresholds, write_report
from fettle.report.explanations import (
    EXPLAINED_SIDE,
    LABEL_HEIGHT,
    draw_explanation,
    explanation_caption,
    label_of,
)
from fettle.report.overlays import PANE_GAP, heat_ramp
from fettle.report.rows import read_rows
from fettle.report.run_folder import read_run

WORDS = "Masks guide training."


def explained(**maps: NDArray[np.float32]) -> Explained:
    shape = next(iter(maps.values())).shape
    view = np.full((*shape, 3), 100, np.uint8)
    return Explained(view, np.ones(shape, bool), maps, {"alpha": [0.0, 0.6], "beta": 0.1}, WORDS)


def flat(value: float) -> NDArray[np.float32]:
    return np.full((48, 48), value, np.float32)


def pane(drawn: NDArray[np.uint8], number: int, count: int) -> NDArray[np.uint8]:
    """One pane of a row, 0 the picture, without its label."""
    room = (drawn.shape[1] + PANE_GAP) // count
    return drawn[LABEL_HEIGHT:, number * room : (number + 1) * room - PANE_GAP]


def run_of(out: Path) -> RunWriter:
    return RunWriter(out, card={"name": "m"}, thresholds=Thresholds(0.4, 0.6, 0.5), overlays=False)


def add(run: RunWriter, path: str, shown: Explained | None) -> None:
    nothing = np.zeros((8, 8), np.float32)
    answer = Inspection(path, 0.7, Verdict.REJECT, (), nothing, nothing == 0)
    run.add(answer, np.zeros((8, 8, 3), np.uint8), explained=shown)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("height", "width"), [(48, 32), (240, 240), (480, 720), (37, 611)])
def test_a_bright_pixel_lies_on_the_same_place_of_its_picture(height: int, width: int) -> None:
    row, column = height // 3, 2 * width // 3
    spot = np.zeros((height, width), np.float32)
    spot[row, column] = 1
    view = np.zeros((height, width, 3), np.uint8)
    view[row, column] = 255
    shown = Explained(view, spot == spot, {"first": spot * 0, "spot": spot}, {}, "")
    drawn = draw_explanation(shown, None)
    scale = EXPLAINED_SIDE / max(height, width)
    for number in (0, 2):
        light = pane(drawn, number, 3).astype(int).sum(axis=2)
        found = np.argwhere(light == light.max()).mean(axis=0)
        assert found == pytest.approx([(row + 0.5) * scale - 0.5, (column + 0.5) * scale - 0.5], abs=1.0)
    assert (pane(drawn, 1, 3)[: round(height * scale), : round(width * scale)] == heat_ramp()[0]).all()


def test_one_value_has_one_colour_in_every_map() -> None:
    drawn = draw_explanation(explained(prior=flat(0.5), mask=flat(0.5), error=flat(1.5)), 3.0)
    for number in (1, 2, 3):
        assert (pane(drawn, number, 4) == heat_ramp()[128]).all()


def test_error_is_in_units_of_the_pixel_threshold_and_cut_off_there() -> None:
    for value, place in ((0.0, 0), (2.0, 255), (7.0, 255), (np.nan, 0), (np.inf, 255)):
        drawn = draw_explanation(explained(error=flat(value)), 2.0)
        assert (pane(drawn, 1, 2) == heat_ramp()[place]).all()


@pytest.mark.parametrize("threshold", [None, 0.0, -1.0])
def test_without_a_threshold_error_is_in_units_of_its_own_maximum(threshold: float | None) -> None:
    error = flat(2.0)
    error[:24] = 4.0
    shown = pane(draw_explanation(explained(error=error), threshold), 1, 2)
    assert (shown[:110] == heat_ramp()[255]).all() and (shown[130:] == heat_ramp()[128]).all()
    assert label_of("error", threshold) == "error / its maximum"
    assert "Without a pixel threshold" in explanation_caption(["error"], threshold)


def test_a_shrunk_mask_keeps_its_share_of_the_picture() -> None:
    checks = (np.indices((960, 960)).sum(axis=0) % 2).astype(np.float32)
    assert (pane(draw_explanation(explained(mask=checks), None), 1, 2) == heat_ramp()[128]).all()


def test_what_is_not_valid_is_dimmed_in_the_picture() -> None:
    shown = explained(mask=flat(0.0))
    shown.valid[:24] = False
    picture = pane(draw_explanation(shown, None), 0, 2)
    assert (picture[:118] == 45).all() and (picture[122:] == 100).all()


def test_each_pane_has_its_label_and_a_narrow_one_room_for_it() -> None:
    narrow = np.zeros((240, 10), np.float32)
    one, other = (draw_explanation(explained(**{name: narrow}), None) for name in ("a", "a_long_name"))
    assert other.shape[1] > one.shape[1] > 2 * 10
    labels = draw_explanation(explained(prior=flat(0), mask=flat(0)), None)[:LABEL_HEIGHT]
    for number in range(3):
        left = number * (EXPLAINED_SIDE + PANE_GAP)
        assert (labels[:, left : left + EXPLAINED_SIDE] > 200).any()
    assert label_of("mask_image", 1.0) == "mask image"


def test_rows_name_their_explanations_and_run_json_keeps_the_words_once(tmp_path: Path) -> None:
    with run_of(tmp_path) as run:
        add(run, "lot/a.png", explained(prior=flat(0.5), error=flat(0.2)))
        assert read_run(tmp_path)["explanation"]["words"] == WORDS  # type: ignore[index,call-overload]
        add(run, "lot/b.png", explained(prior=flat(0.1), error=flat(0.1)))
        add(run, "lot/c.png", None)
    assert names(tmp_path / "explanations") == ["000001_a.jpg", "000002_b.jpg"]
    expected = ["explanations/000001_a.jpg", "explanations/000002_b.jpg", None]
    assert [row.explanation for row in read_rows(tmp_path)] == expected
    assert pq.read_table(tmp_path / "inspections.parquet")["explanation"].to_pylist() == expected
    with (tmp_path / "inspections.csv").open(encoding="utf-8", newline="") as file:
        assert [row["explanation"] or None for row in csv.DictReader(file)] == expected
    assert read_run(tmp_path)["explanation"] == {
        "pictures": [],
        "maps": ["prior", "error"],
        "numbers": {"alpha": [0.0, 0.6], "beta": 0.1},
        "words": WORDS,
    }
    with Image.open(tmp_path / "explanations/000001_a.jpg") as drawn:
        assert drawn.size == (3 * EXPLAINED_SIDE + 2 * PANE_GAP, LABEL_HEIGHT + EXPLAINED_SIDE)


def with_pictures(shown: Explained, **pictures: NDArray[np.uint8]) -> Explained:
    return replace(shown, pictures=pictures)


def test_pictures_stand_in_their_colours_between_the_picture_and_the_maps() -> None:
    red, blue = (np.full((48, 48, 3), colour, np.uint8) for colour in ((200, 10, 10), (10, 10, 200)))
    drawn = draw_explanation(with_pictures(explained(mask=flat(0)), first=red, second=blue), None)
    colours = [(100, 100, 100), (200, 10, 10), (10, 10, 200), tuple(heat_ramp()[0])]
    for number, colour in enumerate(colours):
        assert (pane(drawn, number, 4) == colour).all()


def test_a_picture_may_be_named_as_a_map_is() -> None:
    shown = with_pictures(explained(picture=flat(1)), picture=np.full((48, 48, 3), 7, np.uint8))
    drawn = draw_explanation(shown, None)
    for number, colour in enumerate([(100, 100, 100), (7, 7, 7), tuple(heat_ramp()[255])]):
        assert (pane(drawn, number, 3) == colour).all()


def test_run_json_and_the_page_name_the_pictures(tmp_path: Path) -> None:
    shown = with_pictures(explained(taken=flat(1)), own_template=np.zeros((48, 48, 3), np.uint8))
    with run_of(tmp_path) as run:
        add(run, "a.png", shown)
    assert read_run(tmp_path)["explanation"]["pictures"] == ["own_template"]  # type: ignore[index,call-overload]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "network saw it, then in full colour: own template; then: taken. Dark is 0" in page
    assert "and its own_template, taken: a.png" in page


def test_a_new_run_removes_former_explanations_and_nothing_else(tmp_path: Path) -> None:
    with run_of(tmp_path) as run:
        add(run, "a.png", explained(mask=flat(1)))
    (tmp_path / "explanations" / "000009_mine.jpg").write_bytes(b"mine")
    with run_of(tmp_path) as run:
        add(run, "b.png", None)
    assert names(tmp_path / "explanations") == ["000009_mine.jpg"]
    assert read_run(tmp_path)["explanation"] is None


def test_without_explanations_there_is_no_folder_for_them(tmp_path: Path) -> None:
    with run_of(tmp_path) as run:
        add(run, "a.png", None)
    assert not (tmp_path / "explanations").exists()
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'class="card"' in page
    assert 'class="card wide"' not in page and "as the network saw it" not in page


@pytest.mark.parametrize(
    "name",
    [
        "explanations/../../000001_a.jpg",
        "/explanations/000001_a.jpg",
        "explanations/000001_a.jpg\n",
        "explanations/000001_a.html",
        'explanations/000001_"onload=.jpg',
        "https://x/explanations/000001_a.jpg",
    ],
)
def test_a_row_never_names_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    with run_of(tmp_path) as run:
        add(run, "a.png", explained(mask=flat(1)))
    path = tmp_path / "inspections.jsonl"
    row = {**json.loads(path.read_text(encoding="utf-8")), "explanation": name}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="Line 1"):
        list(read_rows(tmp_path))


def test_a_row_of_a_run_before_explanations_is_read(tmp_path: Path) -> None:
    with run_of(tmp_path) as run:
        add(run, "a.png", None)
    path = tmp_path / "inspections.jsonl"
    row = json.loads(path.read_text(encoding="utf-8"))
    del row["explanation"]
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert next(read_rows(tmp_path)).explanation is None


def test_numbers_that_json_cannot_hold_are_refused_with_the_first_picture(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    shown = explained(mask=flat(1))
    bad = Explained(shown.view, shown.valid, shown.maps, {"alpha": float("nan")}, "")
    with pytest.raises(UsageError, match="explanation"):
        add(run, "a.png", bad)


def test_the_page_shows_the_row_with_its_numbers_and_its_sentence(tmp_path: Path) -> None:
    with run_of(tmp_path) as run:
        add(run, "lot/a.png", explained(prior=flat(0.5), mask_image=flat(1), error=flat(0.2)))
        add(run, "lot/b.png", None)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<figure") == 2 and page.count('class="card wide"') == 1
    card = page[page.index('class="card wide"') :].split("</figure>")[0]
    assert card.index("panels/000001_a.jpg") < card.index("explanations/000001_a.jpg") < card.index(WORDS)
    assert "alpha <b>0, 0.6</b>" in card and "beta <b>0.1</b>" in card
    assert "then: prior, mask image, error." in page
    assert "divided by the pixel threshold 0.5." in page


def test_the_page_shows_no_row_that_was_not_written(tmp_path: Path) -> None:
    with run_of(tmp_path) as run:
        add(run, "a.png", explained(mask=flat(1)))
    (tmp_path / "explanations/000001_a.jpg").unlink()
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "explanations/" not in page and "panels/000001_a.jpg" in page


def test_what_a_method_says_is_never_an_element(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    shown = with_pictures(explained(**{evil: flat(1)}), **{evil: np.zeros((48, 48, 3), np.uint8)})
    with run_of(tmp_path) as run:
        add(run, "a.png", replace(shown, numbers={evil: evil}, words=evil))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;alert(1)") >= 6
