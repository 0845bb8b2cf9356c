"""The demo on few small parts with a tiny network; `tests/test_readme.py` runs it as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from command_line import fettle

from fettle.datasets import parts
from fettle.detector import Detector

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(parts.write_parts, train=6, test_good=2, defects=1, size=64)
    tiny = partial(Detector.fit, backbone="tiny", weights="random", size=64, settings={"bank_rows": 100})
    monkeypatch.setattr(parts, "write_parts", few)
    monkeypatch.setattr(Detector, "fit", tiny)


def test_demo_prints_metrics_and_ends_with_the_reports_path(tmp_path: Path) -> None:
    answer = fettle("demo", "-o", tmp_path / "demo")
    assert answer.code == 0
    page = Path(answer.out.split()[-1])
    assert page == tmp_path / "demo" / "report.html"
    header, *rows = answer.out.splitlines()
    assert "image AUROC" in header and "AUPRO 0.05" in header
    names = [row.split()[0] for row in rows[:2]]
    assert names == list(parts.PRODUCTS[:2])
    links = page.read_text(encoding="utf-8")
    assert all(f'href="{name}/run/report.html"' in links for name in names)
    assert all((page.parent / name / "run" / "report.html").is_file() for name in names)
    assert "Rendering" in answer.err


def test_demo_as_json(tmp_path: Path) -> None:
    answer = fettle("demo", "-o", tmp_path / "demo", "--json")
    assert answer.code == 0
    assert Path(answer.json["report"]).is_file()
    assert set(answer.json["per_product"]) == set(parts.PRODUCTS[:2])
    assert all(0 <= result["image_auroc"] <= 1 for result in answer.json["per_product"].values())


def test_demo_may_be_repeated(tmp_path: Path) -> None:
    codes = [fettle("demo", "-o", tmp_path / "demo").code for _ in range(2)]
    assert codes == [0, 0]
