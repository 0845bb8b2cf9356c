"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fettle.errors import UsageError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, no words.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")]
Model = Annotated[Path, typer.Argument(help="A model folder, made by 'fettle fit'.")]


def parse_settings(pairs: list[str]) -> dict[str, object]:
    """field=value pairs; values are read as JSON where they are JSON, else as text.

    Raises:
        UsageError: a pair without '='.
    """
    settings: dict[str, object] = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair} has no '='.", "Write --set field=value.")
        try:
            settings[field.strip()] = json.loads(value)
        except ValueError:
            settings[field.strip()] = value
    return settings
