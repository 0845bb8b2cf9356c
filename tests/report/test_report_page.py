"""The page: what it shows, in which order, and what it never lets in."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fettle.errors import DataError, UsageError
from fettle.inspection import Inspection, Refusal, Region, Verdict
from fettle.protocols import Json
from fettle.report import RunWriter, Thresholds, write_report
from fettle.report.page import _MOST_CARDS
from fettle.report.tables import percent

CARD: dict[str, Json] = {
    "name": "screw",
    "promise": "At most 5 % of good parts are rejected.",
    "data": {"sha256": "12ab", "roi": None, "sizes": [256, 320]},
    "warnings": [],
    "frozen": True,
}
METRICS: dict[str, Json] = {
    "image_auroc": 0.96123,
    "aupro_005": None,
    "frr_measured": 0.02,
    "frr_interval": [0.0024, 0.07],
    "escape_rate": 0.25,
    "escape_interval": [0.1, 0.4],
    "per_defect": {"scratch": {"image_auroc": 0.91, "aupro": 0.88}},
}
SIDE = 8


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(" ".join(data.split()))

    def all(self, tag: str, css_class: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and (css_class is None or css_class in (attributes.get("class") or "").split())
        ]

    def section(self, heading: str) -> list[str]:
        """The words from a heading to the next one."""
        start = self.words.index(heading)
        return self.words[start : start + 60]


def add(
    run: RunWriter,
    path: str,
    score: float,
    truth: str | None = None,
    regions: tuple[Region, ...] = (),
    notes: tuple[str, ...] = (),
    refinement: dict[str, Json] | None = None,
) -> None:
    verdict = Verdict.REJECT if score > 0.6 else Verdict.REVIEW if score > 0.4 else Verdict.OK
    flat = np.zeros((SIDE, SIDE), np.float32)
    answer = Inspection(path, score, verdict, regions, flat, flat == 0, notes=notes, refinement=refinement)
    run.add(answer, np.zeros((SIDE, SIDE, 3), np.uint8), truth=truth)


def start(out: Path, overlays: bool = False) -> RunWriter:
    thresholds = Thresholds(review=0.4, reject=0.6, pixel=0.5)
    return RunWriter(out, card=CARD, thresholds=thresholds, overlays=overlays)


@pytest.fixture
def labelled(tmp_path: Path) -> Page:
    with start(tmp_path) as run:
        add(run, "good/1.png", 0.1, "good")
        add(run, "good/2.png", 0.7, "good")
        add(run, "good/3.png", 0.8, "good")
        add(run, "scratch/1.png", 0.3, "scratch")
        add(run, "scratch/2.png", 0.2, "scratch")
        add(run, "scratch/3.png", 0.9, "scratch")
        add(run, "dent/1.png", 0.5, "dent")
        run.refuse(Refusal("good/4.png", "The file is empty."), truth="good")
        run.finish(METRICS)
    return Page(write_report(tmp_path))


def card_names(words: list[str]) -> list[str]:
    return [word for word in words if re.fullmatch(r"\w+/\d\.png", word)]


def test_sections_come_in_the_order_of_interest(labelled: Page) -> None:
    order = [
        "screw: evaluation report",
        "7 pictures were inspected: 3 ok, 1 review, 3 reject. 1 picture could not be inspected.",
        "At most 5 % of good parts are rejected.",
        "Scores",
        "Metrics",
        "ROC, precision and recall",
        "By kind of defect",
        "Worst misses",
        "Worst false rejects",
        "Pictures by score",
        "Not inspected",
        "Model card",
    ]
    positions = [labelled.words.index(title) for title in order]
    assert positions == sorted(positions)


def test_misses_lowest_first_false_rejects_highest_first(labelled: Page) -> None:
    words = labelled.words
    marks = [
        words.index(h) for h in ("Worst misses", "Worst false rejects", "Pictures by score", "Not inspected")
    ]
    misses, false_rejects, gallery = (card_names(words[a:b]) for a, b in pairwise(marks))
    assert misses == ["scratch/2.png", "scratch/1.png"]
    assert false_rejects == ["good/3.png", "good/2.png"]
    assert gallery == [
        "scratch/3.png",
        "good/3.png",
        "good/2.png",
        "dent/1.png",
        "scratch/1.png",
        "scratch/2.png",
        "good/1.png",
    ]


def test_metrics_have_words_and_intervals_and_null_is_not_available(labelled: Page) -> None:
    words = labelled.section("Metrics")
    assert words[words.index("Image AUROC") + 1] == "0.9612"
    assert words[words.index("AUPRO (FPR to 0.05)") + 1] == "n/a"
    at = words.index("Escape rate")
    assert words[at + 1 : at + 3] == [
        "25.0 %",
        "95 % interval 10.0 % to 40.0 %; defective pictures judged ok",
    ]


def test_table_by_kind_counts_verdicts_and_shows_the_metrics_of_the_kind(labelled: Page) -> None:
    words = labelled.section("By kind of defect")
    at = words.index("scratch")
    assert words[at : at + 8] == ["scratch", "3", "2", "0", "1", "66.7 %", "0.9100", "0.8800"]
    at = words.index("dent")
    assert words[at : at + 8] == ["dent", "1", "0", "1", "0", "0.0 %", "n/a", "n/a"]
    assert words.index("good") < words.index("dent") < words.index("scratch")


def test_refusals_and_model_card_are_shown(labelled: Page) -> None:
    words = labelled.section("Not inspected")
    assert {"good/4.png", "The file is empty."} <= set(words)
    words = labelled.section("Model card")
    for key, value in (
        ("sha256", "12ab"),
        ("roi", "n/a"),
        ("sizes", "256, 320"),
        ("frozen", "yes"),
        ("pixel", "0.5"),
    ):
        assert words[words.index(key) + 1] == value


def test_a_run_without_labels_has_no_part_that_needs_them(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        add(run, "a.png", 0.1)
        add(run, "b.png", 0.9)
    page = Page(write_report(tmp_path))
    assert "screw: inspection report" in page.words
    assert not {"Metrics", "By kind of defect", "Worst misses", "ROC, precision and recall"} & set(page.words)
    assert {"ok (1)", "reject (1)"} <= set(page.words)


def test_names_from_outside_never_become_elements(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>.png"
    with start(tmp_path) as run:
        add(run, f"lot/{evil}", 0.9, truth="<script>alert(2)</script>", notes=('"><b onclick=x>',))
        add(run, "x.png", 0.1, truth="good")
        run.refuse(Refusal(evil, "</table><script>alert(3)</script>"))
    page = Page(write_report(tmp_path))
    assert len(page.all("script")) == 1
    assert not page.all("b", None)[4:]  # the four tiles have the only <b>
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src") in (None, *(image["src"] for image in page.all("img")))
    for image in page.all("img"):
        assert re.fullmatch(r"panels/[0-9]{6}_[\w.-]+\.jpg", image["src"] or "")
    assert f"lot/{evil}" in page.words


def test_the_model_card_is_escaped_too(tmp_path: Path) -> None:
    card: dict[str, Json] = {
        "name": "<i>n</i>",
        "promise": "<i>p</i>",
        "<i>k</i>": ["<i>v</i>", {"a": "<i>w</i>"}],
    }
    with RunWriter(tmp_path, card=card, thresholds=Thresholds(), overlays=False) as run:
        add(run, "a.png", 0.1)
    page = Page(write_report(tmp_path))
    assert len(page.all("i")) == len(page.all("i", "ok")) + len(page.all("i", "line"))
    assert "<i>p</i>" in page.words


def test_the_page_asks_nothing_of_any_network(labelled: Page) -> None:
    assert not re.search(r"(https?:)?//[\w.-]+\.\w", re.sub(r"<svg.*?</svg>", "", labelled.html, flags=re.S))
    for _, attributes in labelled.elements:
        for name in ("src", "href"):
            assert re.match(r"(panels/|inspections\.|$)", attributes.get(name) or "")
    [policy] = [meta["content"] or "" for meta in labelled.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_the_policy_lets_the_pages_own_script_run(labelled: Page) -> None:
    [script] = re.findall(r"<script>(.*?)</script>", labelled.html, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in labelled.html


def test_pictures_load_lazily_and_have_words_and_sizes(labelled: Page) -> None:
    images = labelled.all("img")
    assert len(images) == 7 + 2 + 2
    for image in images:
        assert image["loading"] == "lazy"
        assert "score" in (image["alt"] or "")
        assert (image["width"], image["height"]) == (str(3 * SIDE + 8), str(SIDE))


def test_plots_have_words(labelled: Page) -> None:
    plots = labelled.all("svg")
    assert [svg["role"] for svg in plots] == ["img"] * 3
    assert (plots[1]["aria-label"] or "").startswith("ROC curve of 4 defective and 3 good pictures")


def test_filter_has_a_button_for_each_verdict_and_is_hidden_without_a_script(labelled: Page) -> None:
    assert [button["data-verdict"] for button in labelled.all("button")] == ["", "reject", "review", "ok"]
    [group] = labelled.all("div", "filter")
    assert "hidden" in group
    assert [card["data-verdict"] for card in labelled.all("figure")][-7:].count("reject") == 3


def test_a_large_run_shows_the_highest_scores_and_says_so(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        for i in range(_MOST_CARDS + 3):
            add(run, f"lot/{i}.png", i / 1000)
    page = Page(write_report(tmp_path))
    assert len(page.all("figure")) == _MOST_CARDS
    sentence = "The 500 pictures with the highest scores of 503 are shown; inspections.csv lists all."
    assert sentence in page.words
    assert "lot/502.png" in page.words
    assert "lot/2.png" not in page.words


def test_equal_scores_keep_the_order_of_inspection(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        for name in ("d/3.png", "d/1.png", "d/2.png"):
            add(run, name, 0.5)
    assert card_names(Page(write_report(tmp_path)).words) == ["d/3.png", "d/1.png", "d/2.png"]


def test_region_sizes_are_told_in_px_and_mm(tmp_path: Path) -> None:
    small = Region(0, 0, 2, 2, 4, 2.0, 0.9)
    large = Region(0, 0, 40, 50, 1500, 61.6, 0.8, area_mm2=2.5, length_mm=3.25)
    with start(tmp_path) as run:
        add(run, "d/1.png", 0.9, regions=(small, large))
        add(run, "d/2.png", 0.8, regions=(small,))
    words = Page(write_report(tmp_path)).words
    assert any("2 regions, the largest 1,500 px² (2.5 mm²), 62 px (3.25 mm) long" in word for word in words)
    assert any("1 region: 4 px², 2 px long" in word for word in words)


def test_strip_links_to_the_overlay_where_there_is_one(tmp_path: Path) -> None:
    for overlays, target in ((False, "panels/000001_1.jpg"), (True, "overlays/000001_1.png")):
        with start(tmp_path, overlays) as run:
            add(run, "d/1.png", 0.9)
        assert Page(write_report(tmp_path)).all("a")[0]["href"] == target


def test_what_a_refiner_did_is_told(tmp_path: Path) -> None:
    thresholds = Thresholds()  # without a pixel threshold contours are the refiner's
    with RunWriter(tmp_path, card=CARD, thresholds=thresholds, overlays=False) as run:
        add(run, "1.png", 0.9, refinement={"refined": "yes", "applied": True})
        add(run, "2.png", 0.2, refinement={"refined": "gate", "applied": False, "gate_reason": "verdict_ok"})
    words = " ".join(Page(write_report(tmp_path)).words)
    assert "refined: yes" in words and "refined: gate, verdict_ok" in words
    assert "found: the refiner's mask" in words and "there are no contours" not in words
    with RunWriter(tmp_path, card=CARD, thresholds=thresholds, overlays=False) as run:
        add(run, "2.png", 0.2)
    words = " ".join(Page(write_report(tmp_path)).words)
    assert "refined" not in words and "found:" not in words and "there are no contours" in words


def test_known_pictures_and_boundaries_are_told(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        add(run, "scratch/1.png", 0.9, "scratch")
        run.finish({**METRICS, "num_seen_in_fit": 3, "iou": 0.25, "boundary_f": 0.5, "hd95": 12.34})
    page = Page(write_report(tmp_path))
    assert "has learnt from 3 of these pictures" in " ".join(page.words)
    for label, value in (
        ("IoU", "0.2500"),
        ("Boundary F (2 px)", "0.5000"),
        ("Hausdorff distance, 95 %", "12.3 px"),
    ):
        assert page.words[page.words.index(label) + 1] == value


def test_a_stopped_run_is_told_and_missing_panels_break_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), start(tmp_path) as run:
        add(run, "d/1.png", 0.9)
        raise KeyboardInterrupt
    (tmp_path / "panels/000001_1.jpg").unlink()
    page = Page(write_report(tmp_path))
    assert "This run did not come to its end. The page shows what was finished by then." in page.words
    assert "The panel of this picture was not written." in page.words
    assert not page.all("img")


def test_a_run_without_pictures_has_a_page(tmp_path: Path) -> None:
    with start(tmp_path):
        pass
    page = Page(write_report(tmp_path))
    assert "0 pictures were inspected: 0 ok, 0 review, 0 reject." in page.words
    assert not page.all("svg")


def test_a_path_that_is_no_unicode_has_a_place_on_the_page(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        add(run, b"lot/\xff.png".decode("utf-8", "surrogateescape"), 0.9)
    assert "lot/\\udcff.png" in Page(write_report(tmp_path)).words


def test_a_folder_that_is_no_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run folder.*fettle inspect"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        add(run, "a.png", 0.1)
    with (tmp_path / "inspections.jsonl").open("a", encoding="utf-8") as file:
        file.write("[]\n")
    with pytest.raises(DataError, match="Line 2"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0.0 %"),
        (0.05, "5.0 %"),
        (1.0, "100.0 %"),
        (0.0024, "0.24 %"),
        (0.00025, "0.025 %"),
        (None, "n/a"),
    ],
)
def test_small_rates_keep_their_digits(value: Json, words: str) -> None:
    assert percent(value) == words
