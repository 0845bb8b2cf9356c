"""The run folder: what is written, what survives, what is left alone."""

from __future__ import annotations

import csv
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from fettle.errors import DataError, FettleError, PictureError, UsageError
from fettle.inspection import Inspection, Refusal, Region, Verdict
from fettle.report import RunWriter, Thresholds
from fettle.report import run_folder as run_folder_module
from fettle.report.rows import read_rows
from fettle.report.run_folder import read_run

THRESHOLDS = Thresholds(review=0.4, reject=0.6, pixel=0.5)
REGION = Region(1, 2, 3, 4, area_px=12, length_px=4.5, peak=0.9, area_mm2=0.3, length_mm=0.7)
GREY = np.full((16, 24, 3), 128, np.uint8)


def inspection(path: str = "lot/1.png", score: float = 0.7, verdict: Verdict = Verdict.REJECT) -> Inspection:
    anomaly_map = np.zeros((16, 24), np.float32)
    anomaly_map[4:8, 5:9] = 0.9
    valid = np.ones((16, 24), bool)
    seconds = {"decode": 0.25, "compute": 0.5}
    return Inspection(path, score, verdict, (REGION,), anomaly_map, valid, seconds, "screw", "ab" * 32)


def writer(out: Path, overlays: bool = False) -> RunWriter:
    return RunWriter(out, card={"name": "m"}, thresholds=THRESHOLDS, overlays=overlays)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_three_files_hold_the_same_rows(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        run.add(inspection("lot/1.png"), GREY, truth="scratch")
        run.refuse(Refusal("lot/2.png", "It is empty."))
        summary = run.finish({"image_auroc": None})
    assert (summary.pictures, summary.reject, summary.refused, summary.ok) == (2, 1, 1, 0)
    rows = list(read_rows(tmp_path))
    table = pq.read_table(tmp_path / "inspections.parquet").to_pylist()
    with (tmp_path / "inspections.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row.path for row in rows] == [row["path"] for row in table] == [row["path"] for row in cells]
    assert rows[0].regions == (REGION,)
    assert table[0]["regions"] == json.loads(cells[0]["regions"]) == [vars(REGION)]
    assert (table[0]["score"], table[0]["seconds_compute"], table[0]["truth"]) == (0.7, 0.5, "scratch")
    assert (float(cells[0]["score"]), cells[0]["verdict"], cells[1]["verdict"]) == (0.7, "reject", "")
    assert rows[1].refusal == table[1]["refusal"] == cells[1]["refusal"] == "It is empty."
    assert table[1]["score"] is None


def test_rows_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    run = writer(tmp_path)
    run.add(inspection(), GREY)
    assert [row.score for row in read_rows(tmp_path)] == [0.7]
    assert read_run(tmp_path)["complete"] is False
    run.finish()
    assert read_run(tmp_path)["complete"] is True


def test_ctrl_c_leaves_every_row_in_every_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writer(tmp_path) as run:
        run.add(inspection("a.png"), GREY)
        run.add(inspection("b.png"), GREY)
        raise KeyboardInterrupt
    assert read_run(tmp_path)["complete"] is False
    assert [row.path for row in read_rows(tmp_path)] == ["a.png", "b.png"]
    assert pq.read_table(tmp_path / "inspections.parquet")["path"].to_pylist() == ["a.png", "b.png"]
    assert names(tmp_path / "panels") == ["000001_a.jpg", "000002_b.jpg"]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        run.add(inspection("a.png"), GREY)
    with (tmp_path / "inspections.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"number": 2, "pa')
    assert [row.path for row in read_rows(tmp_path)] == ["a.png"]


@pytest.mark.parametrize("field", ["panel", "overlay", "explanation"])
def test_a_row_that_points_out_of_the_folder_is_refused(tmp_path: Path, field: str) -> None:
    with writer(tmp_path) as run:
        run.add(inspection(), GREY)
    path = tmp_path / "inspections.jsonl"
    row = json.loads(path.read_text(encoding="utf-8"))
    row[field] = "panels/../../000001_a.jpg"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"Line 1 of .*000001_a\.jpg"):
        list(read_rows(tmp_path))


def test_a_new_run_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    with writer(tmp_path, overlays=True) as run:
        for name in ("a.png", "b.png", "c.png"):
            run.add(inspection(name), GREY)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "panels" / "000009_mine.jpg").write_bytes(b"mine")
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    with writer(tmp_path) as run:
        run.add(inspection("d.png"), GREY)
    assert [row.path for row in read_rows(tmp_path)] == ["d.png"]
    assert names(tmp_path / "panels") == ["000001_d.jpg", "000009_mine.jpg"]
    assert names(tmp_path / "overlays") == []
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["run.json", "inspections.csv"])
def test_a_file_of_somebody_else_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=name):
        writer(tmp_path)
    assert names(tmp_path) == [name]


def test_out_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(UsageError, match="is a file"):
        writer(tmp_path / "x")


@pytest.mark.parametrize(
    "path", ["../../evil.png", "/etc/passwd", "a/..", "C:\\x\\y.png", "ünï cödé/<b>.png"]
)
def test_panels_stay_inside_the_folder(tmp_path: Path, path: str) -> None:
    with writer(tmp_path / "out", overlays=True) as run:
        run.add(inspection(path), GREY)
    assert names(tmp_path) == ["out"]
    [panel], [overlay] = names(tmp_path / "out/panels"), names(tmp_path / "out/overlays")
    assert panel.startswith("000001_") and panel.isascii() and "<" not in panel
    assert Path(panel).stem == Path(overlay).stem


def test_two_pictures_of_one_name_have_two_panels(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        run.add(inspection("a/1.png"), GREY)
        run.add(inspection("b/1.png"), GREY)
    assert len(names(tmp_path / "panels")) == 2


def test_overlays_have_the_pictures_own_size_and_are_optional(tmp_path: Path) -> None:
    for overlays in (False, True):
        with writer(tmp_path / str(overlays), overlays) as run:
            run.add(inspection(), GREY)
    assert not (tmp_path / "False/overlays").exists()
    with Image.open(tmp_path / "True/overlays/000001_1.png") as overlay:
        assert overlay.size == (24, 16)


def test_a_failed_panel_is_told_at_the_end_and_costs_no_row(tmp_path: Path) -> None:
    run = writer(tmp_path)
    (tmp_path / "panels").rmdir()
    run.add(inspection("a.png"), GREY)
    run.add(inspection("b.png"), GREY)
    with pytest.raises(
        FettleError, match=r"2 pictures of the report could not .* 'a.png' \(FileNotFoundError"
    ):
        run.finish()
    assert len(pq.read_table(tmp_path / "inspections.parquet")) == 2
    assert read_run(tmp_path)["complete"] is False


def test_a_failed_panel_does_not_hide_what_ended_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, writer(tmp_path) as run:
        (tmp_path / "panels").rmdir()
        run.add(inspection(), GREY)
        raise KeyboardInterrupt
    assert "could not be drawn" in caught.value.__notes__[0]


def test_few_pictures_wait_for_their_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, blocked = threading.Event(), threading.Event()

    def slow_panel(*shown: object) -> NDArray[np.uint8]:
        blocked.set()
        assert go_on.wait(20)
        return GREY

    monkeypatch.setattr(run_folder_module, "draw_panel", slow_panel)
    run = writer(tmp_path)
    feeder = threading.Thread(target=lambda: [run.add(inspection(f"{i}.png"), GREY) for i in range(12)])
    feeder.start()
    assert blocked.wait(20)
    feeder.join(0.3)
    assert feeder.is_alive()
    assert len(list(read_rows(tmp_path))) <= 7  # 2 drawn, 4 waiting, 1 whose row is written
    go_on.set()
    feeder.join(20)
    assert run.finish().pictures == 12
    assert len(names(tmp_path / "panels")) == 12


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(tmp_path: Path, score: float) -> None:
    with writer(tmp_path) as run:
        with pytest.raises(PictureError, match=r"The score of 'lot/1\.png'"):
            run.add(inspection(score=score), GREY)
        assert run.finish().pictures == 0


def test_a_peak_that_is_no_number_is_refused(tmp_path: Path) -> None:
    endless = replace(inspection(), regions=(replace(REGION, peak=float("inf")),))
    with writer(tmp_path) as run:
        with pytest.raises(PictureError, match="The peak of region 1"):
            run.add(endless, GREY)
        assert run.finish().pictures == 0


def test_picture_map_and_mask_must_have_one_size(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        with pytest.raises(
            PictureError, match=r"The picture of 'lot/1.png' is 16 x 24 px, its map 24 x 16 px"
        ):
            run.add(inspection(), GREY.transpose(1, 0, 2))
        with pytest.raises(PictureError, match="The mask"):
            run.add(inspection(), GREY, mask=np.ones((4, 4), bool))


def test_metrics_that_json_cannot_hold_are_refused_after_the_rows(tmp_path: Path) -> None:
    run = writer(tmp_path)
    run.add(inspection(), GREY)
    with pytest.raises(UsageError, match="Use None"):
        run.finish({"image_auroc": float("nan")})
    assert len(pq.read_table(tmp_path / "inspections.parquet")) == 1


def test_a_path_that_is_no_unicode_reaches_every_file(tmp_path: Path) -> None:
    path = b"lot/\xff.png".decode("utf-8", "surrogateescape")
    with writer(tmp_path) as run:
        run.add(inspection(path), GREY)
    assert next(read_rows(tmp_path)).path == path
    assert pq.read_table(tmp_path / "inspections.parquet")["path"].to_pylist() == ["lot/\\udcff.png"]
    assert "lot/\\udcff.png" in (tmp_path / "inspections.csv").read_text(encoding="utf-8")


def test_no_cell_of_the_csv_is_a_formula(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        run.add(inspection('=HYPERLINK("x").png'), GREY)
    with (tmp_path / "inspections.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["path"] == '\'=HYPERLINK("x").png'
    assert pq.read_table(tmp_path / "inspections.parquet")["path"].to_pylist() == ['=HYPERLINK("x").png']


def test_an_empty_run_still_has_its_columns(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        assert run.finish().pictures == 0
    assert "verdict" in pq.read_table(tmp_path / "inspections.parquet").column_names
    assert (tmp_path / "inspections.csv").read_text(encoding="utf-8").startswith("number,path,")


def test_finishing_twice_changes_nothing(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        run.add(inspection(), GREY)
        first = run.finish({"image_auroc": 0.5})
    assert run.finish() == first
    assert read_run(tmp_path)["metrics"] == {"image_auroc": 0.5}


def test_a_damaged_run_json_is_named(tmp_path: Path) -> None:
    with writer(tmp_path):
        pass
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"run\.json"):
        read_run(tmp_path)
