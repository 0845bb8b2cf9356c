"""A CSV manifest: one row a picture, with the columns path, label, mask, split, product and any others."""

from __future__ import annotations

import os
from pathlib import Path

from fettle.datasets.records import GOOD, Dataset, Record
from fettle.datasets.table import Row, read_table
from fettle.errors import DataError, nearest_name

NEEDED = ("path", "label", "mask", "split", "product")
SPLITS = ("train", "test", "")
_UNNAMED_DEFECT = "defective"
_UNNAMED = frozenset({"bad", "defective", "anomaly"})
_OTHER_WORDS_FOR_GOOD = frozenset({"ok", "normal", "pass", "0", "free", "none"})


def open_manifest(file: Path) -> Dataset:
    """Read a manifest.

    Columns: `path` and `mask` (relative to the manifest's folder, or absolute; `mask` may be
    empty), `label` ("good", or a defect's name; "bad", "defective" and "anomaly" stand for a defect
    without a name), `split` ("train", "test" or empty), `product` (may be empty). Further columns
    are kept in `Record.columns`. UTF-8 with or without a byte-order mark; any line ends.

    A manifest is the user's own list: paths may lead out of its folder. Pictures are only read.

    Raises:
        DataError: not a readable CSV, a missing column, or a row that can't be meant: the message
            names the line.
    """
    folder = file.parent
    records: list[Record] = []
    lines: dict[str, int] = {}
    for row in read_table(file, NEEDED, "manifest"):
        record = _record(folder, row)
        place = os.path.normpath(record.path)
        if place in lines:
            raise DataError(
                f"{row.at}: '{row.values['path']}' stands in line {lines[place]} already.",
                "Delete one of the two rows.",
            )
        lines[place] = row.line
        records.append(record)
    if not records:
        raise DataError(f"The manifest '{file}' has no rows.", "Write one row a picture below the header.")
    return Dataset(file, "manifest", tuple(sorted(records, key=lambda record: record.path.as_posix())))


def _record(folder: Path, row: Row) -> Record:
    values = row.values
    split = values["split"].lower()
    if split not in SPLITS:
        raise DataError(
            f"{row.at}: the split '{values['split']}' is unknown.",
            nearest_name(split, ("train", "test")) + " It may be empty.",
        )
    path = _existing(folder, row, "path")
    mask = _existing(folder, row, "mask") if values["mask"] else None
    columns = {name: value for name, value in values.items() if name not in NEEDED}
    return Record(path, _label(row), mask, split, values["product"], columns)


def _label(row: Row) -> str:
    """The defect's name. Other words for "good" are refused: they would become a defect."""
    label = row.values["label"]
    if not label:
        raise DataError(f"{row.at}: the label is empty.", f"Write '{GOOD}' or a defect's name.")
    if label.lower() == GOOD:
        return GOOD
    if label.lower() in _OTHER_WORDS_FOR_GOOD:
        raise DataError(
            f"{row.at}: the label '{label}' can't be told from a defect's name.",
            f"Write '{GOOD}' for a good picture, 'bad' for a defect without a name.",
        )
    return _UNNAMED_DEFECT if label.lower() in _UNNAMED else label


def _existing(folder: Path, row: Row, column: str) -> Path:
    """The path in a column, which must be a file."""
    value = row.values[column]
    try:
        if value and (folder / value).is_file():
            return folder / value
    except ValueError:  # a NUL inside
        pass
    what = "picture" if column == "path" else "mask"
    raise DataError(
        f"{row.at}: the {what} '{value}' does not exist.",
        "Paths are relative to the manifest's folder, with '/' between their parts.",
    )
