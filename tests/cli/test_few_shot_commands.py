"""The commands on a model that has learnt from a few pictures."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import TINY, fettle, fit

HEAD = ("--set", "window=3", "--set", "width=32", "--set", "heads=2", "--set", "ffn=64", "--set", "steps=20")


def test_from_four_pictures_to_a_report_and_a_calibration(labelled_folder: Path, tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    fitted = fettle(
        "fit", labelled_folder, "-o", model, "--method", "uniad", "--shots", 4, *TINY, *HEAD, "--json"
    )
    assert fitted.code == 0
    found = {key: fitted.json[key] for key in ("shots", "num_fit", "num_calibration", "promise_on")}
    assert found == {"shots": 4, "num_fit": 4, "num_calibration": 0, "promise_on": None}
    assert "Note: The scale of patch energies comes from the pictures that were learnt from" in fitted.err

    metrics = fettle("evaluate", model, labelled_folder, "-o", run, "--json").json
    assert metrics["image_auroc"] is not None and metrics["pixel_auroc"] is not None
    assert metrics["frr_promised"] is None and metrics["num_seen_in_fit"] == 0
    assert metrics["review_rate_good"] == 1
    rows = [json.loads(line) for line in (run / "inspections.jsonl").read_text().splitlines()]
    assert {row["verdict"] for row in rows} == {"review"}
    assert fettle("report", run).code == 0
    assert "fettle calibrate MODEL MORE_GOOD_PICTURES" in (run / "report.html").read_text()

    again = fettle("calibrate", model, labelled_folder / "train" / "good", "-o", tmp_path / "m2", "--json")
    assert (again.json["num_calibration"], again.json["promise_on"]) == (20, "review")
    assert "4 calibration pictures were learnt from and were left out." in again.err


def test_what_a_person_reads(good_folder: Path, tmp_path: Path) -> None:
    arguments = ("fit", good_folder, "-o", tmp_path / "model", "--method", "uniad", *TINY, *HEAD)
    said = fettle(*arguments, "--shots", 2)
    assert "2 learnt from, 0 calibrated on" in said.out
    assert "none was left to judge. Run 'fettle calibrate" in said.out
    assert "--shots 24 or fewer" in fettle(*arguments, "--shots", 25).sentence
    assert fettle(*arguments, "--shots", 0).code == 2


def test_without_shots_the_json_says_none(good_folder: Path, tmp_path: Path) -> None:
    assert fit(good_folder, tmp_path / "model", "--json").json["shots"] is None
