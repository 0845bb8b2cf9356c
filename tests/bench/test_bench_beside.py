"""The tables of the measurement beside anomalib; the measurement itself needs anomalib's environment."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("beside_anomalib")


def printed(beside: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["beside_anomalib.py", "table"])
    beside.main()
    return capsys.readouterr().out


def test_parts_have_names_of_their_own_and_can_be_told_to_a_process(beside: ModuleType) -> None:
    parts = list(beside.parts())
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert json.loads(json.dumps(dict(part.given))) is not None


def test_every_record_is_of_a_part(beside: ModuleType) -> None:
    known = {part.name for part in beside.parts()}
    assert {path.stem for path in beside.RECORDS.glob("*.json")} <= known


def test_tables_of_the_records_there_are(
    beside: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(beside, monkeypatch, capsys)
    assert out.count("#### ") == 7
    for line in out.splitlines():
        if line.startswith("| PatchCore fit, 50 pictures |"):
            assert line.endswith("| yes |")
            return
    pytest.fail("the table has no line of the fit")


def test_what_has_no_record_is_not_run_and_ratios_are_of_what_was_measured(
    beside: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(beside, "RECORDS", tmp_path)
    for side, figures in {"anomalib": (90, 110), "fettle": (30, 50)}.items():
        for turn, figure in enumerate(figures, 1):
            record = {"found": {"whole": {"cpu_ms": figure}}, "process": {"wall_s": 1, "cpu_s": 1}}
            (tmp_path / f"infer-patchcore-{side}-{turn}.json").write_text(json.dumps(record))
    lines = printed(beside, monkeypatch, capsys).splitlines()
    assert "| one picture, PatchCore | 1.7 times | 2.5 | yes |" in lines
    assert "| one picture, PaDiM | 1.4 times | not run | not run |" in lines
