"""The pictures that a method compares others with, in a run folder: OUT/templates/NN-NAME.png."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fettle.inspection import ComparedWith
from fettle.protocols import Json
from fettle.report.rows import printable, safe_stem

_FOLDER = "templates"
_FILE = re.compile(_FOLDER + r"/[0-9]{2,}-[A-Za-z0-9._-]+\.png")


class KeptTemplate(NamedTuple):
    """What run.json keeps of one: its file inside the run folder, the picture's own name, and its product."""

    file: str
    name: str
    product: str


def kept_templates(templates: Sequence[ComparedWith]) -> list[KeptTemplate]:
    """What run.json keeps of these."""
    return [
        KeptTemplate(
            f"{_FOLDER}/{number:02d}-{safe_stem(t.name)}.png", printable(t.name), printable(t.product)
        )
        for number, t in enumerate(templates, 1)
    ]


def write_templates(out: Path, templates: Sequence[ComparedWith]) -> None:
    """Write each as the file that `kept_templates` names."""
    from PIL import Image

    if templates:
        (out / _FOLDER).mkdir(exist_ok=True)
    for template, kept in zip(templates, kept_templates(templates), strict=True):
        Image.fromarray(template.pixels).save(out / kept.file)


def read_templates(run: dict[str, Json]) -> list[KeptTemplate]:
    """Those that run.json names; an entry that names a file elsewhere is left out."""
    entries = run.get("templates")
    return [
        KeptTemplate(*(printable(str(entry.get(key) or "")) for key in KeptTemplate._fields))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and _FILE.fullmatch(str(entry.get("file")))
    ]
