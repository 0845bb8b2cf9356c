"""fettle methods: what methods there are and what they can do."""

from __future__ import annotations

from dataclasses import asdict

from fettle.cli.console import print_json, print_table
from fettle.cli.options import AsJson
from fettle.protocols import Json


def methods(as_json: AsJson = False) -> None:
    """List the methods and their traits."""
    from fettle.methods.registry import find_method, method_names

    rows: list[dict[str, Json]] = [
        {"name": name, "presets": [*sorted(find_method(name).presets)], **asdict(find_method(name).traits)}
        for name in method_names()
    ]
    if as_json:
        print_json([*rows])
        return
    header = [key for key in rows[0] if key != "presets"]
    words = [
        [_yes_no(row[key]) for key in header] + [", ".join(map(str, _list(row["presets"])))] for row in rows
    ]
    print_table([*(key.replace("_", " ") for key in header), "presets"], words)


def _yes_no(value: Json) -> Json:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "nowhere"
    return ("yes" if value else "no") if isinstance(value, bool) else value


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []
