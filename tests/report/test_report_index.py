"""The page of several products, and what both pages say that the false-reject rate counts."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from fettle.protocols import Json
from fettle.report.index import write_index
from fettle.report.tables import figure_groups


def metrics(**changed: Json) -> dict[str, Json]:
    return {
        "image_auroc": 0.987654,
        "pixel_auroc": 0.9,
        "pixel_ap": None,
        "aupro": 1.0,
        "frr_promised": 0.05,
        "promise_on": "review",
        "frr_measured": 0.1,
        "escape_rate": 0.25,
        **changed,
    }


class Cells(HTMLParser):
    """The table's cells, row by row, and the page's links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self._inside = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self._inside = True
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def measured_note(figures: dict[str, Json]) -> str:
    return next(
        figure.note
        for _, group in figure_groups(figures)
        for figure in group
        if figure.label == "False-reject rate, measured"
    )


@pytest.mark.parametrize(
    ("promise_on", "counted"),
    [("review", "good pictures not judged ok"), ("reject", "good pictures judged reject")],
)
def test_measured_rate_says_which_verdicts_it_counts(promise_on: str, counted: str) -> None:
    assert measured_note(metrics(promise_on=promise_on)) == counted
    with_interval = measured_note(metrics(promise_on=promise_on, frr_interval=[0.01, 0.2]))
    assert with_interval == f"95 % interval 1.0 % to 20.0 %; {counted}"


def test_rate_without_a_promise_counts_rejects() -> None:
    assert measured_note(metrics(promise_on=None, frr_promised=None)) == "good pictures judged reject"


def test_one_row_a_product_with_what_was_promised_and_found(tmp_path: Path) -> None:
    results = {
        "cap": metrics(),
        "nut": metrics(promise_on="reject", frr_promised=0.01),
        "gear": metrics(promise_on=None, frr_promised=None, frr_measured=None, escape_rate=None),
    }
    page = write_index(tmp_path / "report.html", results, {name: tmp_path / name for name in results})
    header, *rows = Cells(page).rows
    assert len({len(row) for row in (header, *rows)}) == 1
    figures = ["0.9877", "0.9000", "n/a", "1.0000"]
    assert rows[0] == ["cap", *figures, "at most 5.0 % not ok", "10.0 % not ok", "25.0 %"]
    assert rows[1] == ["nut", *figures, "at most 1.0 % reject", "10.0 % reject", "25.0 %"]
    assert rows[2] == ["gear", *figures, "nothing", "n/a", "n/a"]


@pytest.mark.parametrize("name", ["cap", "a b#1", "50%", "c:d", '"><script>'])
def test_links_lead_to_the_reports_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    report = tmp_path / "out" / name / "report.html"
    page = write_index(tmp_path / "out" / "report.html", {name: metrics()}, {name: report})
    cells = Cells(page)
    assert [unquote(link) for link in cells.links] == [f"{name}/report.html"]
    assert cells.rows[1][0] == name
    assert "<script>" not in page.read_text(encoding="utf-8")


def test_the_page_asks_nothing_of_a_network(tmp_path: Path) -> None:
    own = ({"cap": metrics()}, {"cap": tmp_path / "r.html"})
    assert "has learnt from 2 of" in write_index(tmp_path / "seen.html", *own, num_seen=2).read_text()
    html = write_index(tmp_path / "report.html", *own).read_text()
    assert "has learnt from" not in html
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "")
