"""What nobody expects: Ctrl-C, an unknown exception, an answer that cannot be kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import fettle, fit

from conftest import write_good
from fettle.cli.console import Screen
from fettle.inspecting import Inspector
from fettle.inspection import Region
from fettle.report import page


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    assert fit(write_good(folder / "good", 24), folder / "model").code == 0
    return folder / "model"


@pytest.fixture
def stopped_at_the_third_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Screen, what: str, done: int, total: int) -> None:
        if (what, done) == ("inspecting", 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "progress", stop)


@pytest.mark.usefixtures("stopped_at_the_third_picture")
@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_ctrl_c_keeps_the_rows_so_far(
    model: Path, labelled_folder: Path, tmp_path: Path, command: str
) -> None:
    answer = fettle(command, model, labelled_folder, "-o", tmp_path / "run")
    assert (answer.code, answer.out) == (130, "")
    assert "stopped" in answer.err and "Traceback" not in answer.err
    assert len((tmp_path / "run" / "inspections.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["complete"] is False
    report = fettle("report", tmp_path / "run")
    assert "did not come to its end" in Path(report.out.strip()).read_text(encoding="utf-8")


def test_ctrl_c_in_a_fit_leaves_the_old_model(
    model: Path, good_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Screen, what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in model.iterdir()}
    monkeypatch.setattr(Screen, "progress", stop)
    assert fit(good_folder, model).code == 130
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_the_signal_itself_ends_with_130(tmp_path: Path) -> None:
    parts = ("data", "parts", "-o", str(tmp_path), "--products", "hex_nut", "--train", "2000")
    command = [sys.executable, "-m", "fettle", *parts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not list(tmp_path.glob("*/train/good/*.png")):
                assert process.poll() is None
            os.kill(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    assert "fettle: stopped" in err and "Traceback" not in err


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(out: Path) -> Path:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(page, "write_report", fail)


@pytest.mark.usefixtures("bug")
def test_an_unknown_exception_is_a_sentence_with_the_way_to_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FETTLE_DEBUG", raising=False)
    answer = fettle("report", "run")
    assert answer.code == 1
    assert answer.sentence == (
        "unexpected ZeroDivisionError: division by zero. "
        "Run it again with FETTLE_DEBUG=1 for the traceback, and report it."
    )


@pytest.mark.usefixtures("bug")
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FETTLE_DEBUG", "1")
    answer = fettle("report", "run")
    assert (answer.code, answer.out) == (1, "")
    assert "Traceback (most recent call last)" in answer.err and "in fail" in answer.err


def test_an_error_of_the_system_names_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(out: Path) -> Path:
        raise OSError(28, "No space left on device", "run/report.html")

    monkeypatch.setattr(page, "write_report", full)
    answer = fettle("report", "run")
    assert answer.code == 1
    assert answer.sentence.startswith("'run/report.html': No space left on device.")


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_an_answer_that_is_no_number_costs_one_picture(
    model: Path, labelled_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A region without a finite peak stands for every answer that a run folder cannot keep."""
    whole = Inspector.inspect

    def with_one_bad(self: Inspector, *args: object, **options: object) -> Iterator[object]:
        for number, answer in enumerate(whole(self, *args, **options)):
            if number == 1:
                region = Region(0, 0, 1, 1, area_px=1, length_px=1.0, peak=float("inf"))
                answer = replace(answer, inspection=replace(answer.inspection, regions=(region,)))
            yield answer

    monkeypatch.setattr(Inspector, "inspect", with_one_bad)
    paths = labelled_folder / "test" / "scratch" if command == "inspect" else labelled_folder
    answer = fettle(command, model, paths, "-o", tmp_path / "run", "--json")
    assert answer.code == 3
    assert answer.json["refused" if command == "inspect" else "num_refused"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "inspections.jsonl").open()]
    assert [number for number, row in enumerate(rows) if row["refusal"]] == [1]
    assert "is inf" in rows[1]["refusal"]
