"""write_index: one page that leads to the reports of several products."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fettle.protocols import Json
from fettle.report.page import template_environment

_COLUMNS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "frr_measured": "false rejects",
    "escape_rate": "escapes",
}


def write_index(path: Path, results: Mapping[str, Mapping[str, Json]], reports: Mapping[str, Path]) -> Path:
    """Write a page with one line a product: its figures and a link to its report.

    Args:
        path: the page.
        results: product -> the keys of `Detector.evaluate`.
        reports: product -> its report's page, linked relative to `path`.
    """
    from markupsafe import Markup

    environment = template_environment()
    loader = environment.loader
    assert loader is not None
    style, _, _ = loader.get_source(environment, "style.css")
    rows = [
        (name, Path(os.path.relpath(reports[name], path.parent)).as_posix(), [_cell(r[k]) for k in _COLUMNS])
        for name, r in results.items()
    ]
    html = environment.get_template("index.html.j2").render(
        style=Markup(style), columns=list(_COLUMNS.values()), rows=rows
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _cell(value: Json) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "n/a"
