"""The commands on a model of many products."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import fettle

from conftest import write_good, write_product


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("bolt", "nut", "plate")):
        write_product(tmp_path / "products" / name, number)
    return tmp_path / "products"


def test_commands_of_a_model_of_many_products(root: Path, tmp_path: Path) -> None:
    tiny = ("--backbone", "tiny", "--weights", "random", "--size", "64", "--set", "bank_rows=200")
    fitted = fettle(
        "fit", root, "--multi-class", "--products", "bolt,nut", "-o", tmp_path / "m", *tiny, "--json"
    )
    assert fitted.code == 0 and set(fitted.json["products"]) == {"bolt", "nut"}
    assert fitted.json["num_fit"] == 48

    out = tmp_path / "run"
    found = fettle("evaluate", tmp_path / "m", root, "-o", out, "--json")
    assert found.code == 0 and set(found.json) >= {"per_product", "mean", "pooled"}
    assert set(found.json["per_product"]) == {"bolt", "nut"}
    assert json.loads((out / "products.json").read_text())["metrics"] == found.json
    assert len((out / "nut" / "inspections.jsonl").read_text().splitlines()) == 8

    page = fettle("report", out)
    assert page.out.strip() == str(out / "report.html")
    text = (out / "report.html").read_text()
    assert "nut/report.html" in text and (out / "bolt" / "report.html").is_file()
    assert "mean" in text and "pooled, one shared threshold" in text
    promises = {
        name: json.loads((out / name / "run.json").read_text())["card"]["promise"] for name in ("bolt", "nut")
    }
    assert all("(24 good pictures)" in promise for promise in promises.values())

    assert fettle("evaluate", tmp_path / "m", root, "--product", "nut", "-o", tmp_path / "both").code == 0
    assert fettle("evaluate", tmp_path / "m", root, "-o", tmp_path / "both").code == 0
    assert not (tmp_path / "both" / "run.json").exists()
    assert not list((tmp_path / "both" / "panels").iterdir())
    assert fettle("inspect", tmp_path / "m", root / "bolt" / "test", "-o", tmp_path / "both").code == 0
    assert fettle("report", tmp_path / "both").code == 0  # of the run that was written last
    assert "pooled, one shared threshold" not in (tmp_path / "both" / "report.html").read_text()

    table = fettle("evaluate", tmp_path / "m", root)
    assert [line.split()[0] for line in table.out.splitlines()[1:5]] == ["bolt", "nut", "mean", "pooled"]

    fresh = write_good(tmp_path / "fresh", 22, first_seed=7000)
    moved = fettle("calibrate", tmp_path / "m", fresh, "--product", "nut", "-o", tmp_path / "m2", "--json")
    assert moved.code == 0 and "No fresh picture of bolt" in moved.err
    assert moved.json["num_calibration"] == 48  # the shared thresholds stay
    counts = {name: own["num_calibration"] for name, own in moved.json["products"].items()}
    assert counts == {"bolt": 24, "nut": 22}

    rows = fettle("inspect", tmp_path / "m", root / "nut" / "test", "-o", tmp_path / "i", "--product", "nut")
    assert rows.code == 0
