"""write_index: one page that leads to the reports of several products."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from fettle.protocols import Json
from fettle.report.page import template_environment
from fettle.report.tables import NOT_KNOWN, percent, ratio

_COLUMNS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
}
_RATES = ("promised for good parts", "measured on good parts", "escapes")
_NO_PROMISE = "nothing"


def write_index(
    path: Path,
    results: Mapping[str, Mapping[str, Json]],
    reports: Mapping[str, Path],
    together: Mapping[str, Mapping[str, Json]] | None = None,
    num_seen: int = 0,
) -> Path:
    """Write a page with one line a product: its figures and a link to its report.

    Args:
        path: the page.
        results: product -> the keys of `Detector.evaluate`.
        reports: product -> its report's page, linked relative to `path`.
        together: lines over all products, below: their mean, all pooled.
        num_seen: pictures that the model has learnt from.
    """
    from markupsafe import Markup

    environment = template_environment()
    loader = environment.loader
    assert loader is not None
    style, _, _ = loader.get_source(environment, "style.css")
    rows = [
        (name, quote(Path(os.path.relpath(reports[name], path.parent)).as_posix()), _cells(r))
        for name, r in results.items()
    ]
    rows += [(name, "", _cells(r)) for name, r in (together or {}).items()]
    html = environment.get_template("index.html.j2").render(
        style=Markup(style), columns=[*_COLUMNS.values(), *_RATES], rows=rows, num_seen=num_seen
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _cells(result: Mapping[str, Json]) -> list[str]:
    """One product's figures in the order of the columns."""
    on = "not ok" if result.get("promise_on") == "review" else "reject"
    promised, measured = result.get("frr_promised"), result.get("frr_measured")
    return [
        *(ratio(result.get(key)) for key in _COLUMNS),
        _NO_PROMISE if promised is None else f"at most {percent(promised)} {on}",
        NOT_KNOWN if measured is None else f"{percent(measured)} {on}",
        percent(result.get("escape_rate")),
    ]
