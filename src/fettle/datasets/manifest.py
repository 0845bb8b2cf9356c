"""A CSV manifest: one row a picture, with the columns path, label, mask, split, product and any others."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fettle.datasets.records import GOOD, Dataset, Record
from fettle.errors import DataError, nearest_name

MAX_BYTES = 256 << 20
NEEDED = ("path", "label", "mask", "split", "product")
SPLITS = ("train", "test", "")
_UNNAMED_DEFECT = "defective"
_UNNAMED = frozenset({"bad", "defective", "anomaly"})
_OTHER_WORDS_FOR_GOOD = frozenset({"ok", "normal", "pass", "0", "free", "none"})


@dataclass(frozen=True)
class _Row:
    """One row by column name, and the line that it ends on."""

    line: int
    values: Mapping[str, str]


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
    rows = _rows(file)
    folder = file.parent
    records: list[Record] = []
    lines: dict[str, int] = {}
    for row in rows:
        record = _record(file, folder, row)
        place = os.path.normpath(record.path)
        if place in lines:
            raise DataError(
                f"{_at(file, row.line)}: '{row.values['path']}' stands in line {lines[place]} already.",
                "Delete one of the two rows.",
            )
        lines[place] = row.line
        records.append(record)
    if not records:
        raise DataError(f"The manifest '{file}' has no rows.", "Write one row a picture below the header.")
    return Dataset(file, "manifest", tuple(sorted(records, key=lambda record: record.path.as_posix())))


def _at(file: Path, line: int) -> str:
    return f"'{file}', line {line}"


def _text(file: Path) -> str:
    """The file's text, bounded."""
    if not file.exists():
        raise DataError(f"'{file}' does not exist.", "Check the path.")
    if not file.is_file():
        raise DataError(f"'{file}' is not a file, and a manifest is one.", "Name the CSV file itself.")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise DataError(
            f"The manifest '{file}' has {size >> 20} MiB, over the bound of {MAX_BYTES >> 20} MiB.",
            "Split it into several manifests.",
        )
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The manifest '{file}' is not UTF-8 text ({error}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(
            f"The manifest '{file}' can't be read: {error.strerror}.", "Check its permissions."
        ) from None


def _rows(file: Path) -> list[_Row]:
    """Every row that is not blank, by column name."""
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(file, header)
        rows = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{_at(file, reader.line_num)} has {len(cells)} fields, the header {len(header)}.",
                    "Put fields that hold a comma into double quotes.",
                )
            values = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            rows.append(_Row(reader.line_num, values))
        return rows
    except csv.Error as error:
        raise DataError(
            f"{_at(file, reader.line_num)} is no valid CSV ({error}).", "Save the table as CSV again."
        ) from None


def _check_header(file: Path, header: list[str]) -> None:
    missing = [name for name in NEEDED if name not in header]
    if missing:
        found = ", ".join(header) or "nothing"
        raise DataError(
            f"{_at(file, 1)}: the column '{missing[0]}' is missing; found: {found}.",
            f"The header needs {','.join(NEEDED)}, with commas between them.",
        )
    double = next((name for name in header if header.count(name) > 1), None)
    if double is not None:
        raise DataError(f"{_at(file, 1)}: the column '{double}' stands there twice.", "Rename one of them.")


def _record(file: Path, folder: Path, row: _Row) -> Record:
    values = row.values
    split = values["split"].lower()
    if split not in SPLITS:
        raise DataError(
            f"{_at(file, row.line)}: the split '{values['split']}' is unknown.",
            nearest_name(split, ("train", "test")) + " It may be empty.",
        )
    path = _existing(file, folder, row, "path")
    mask = _existing(file, folder, row, "mask") if values["mask"] else None
    columns = {name: value for name, value in values.items() if name not in NEEDED}
    return Record(path, _label(file, row), mask, split, values["product"], columns)


def _label(file: Path, row: _Row) -> str:
    """The defect's name. Other words for "good" are refused: they would become a defect."""
    label = row.values["label"]
    if not label:
        raise DataError(f"{_at(file, row.line)}: the label is empty.", f"Write '{GOOD}' or a defect's name.")
    if label.lower() == GOOD:
        return GOOD
    if label.lower() in _OTHER_WORDS_FOR_GOOD:
        raise DataError(
            f"{_at(file, row.line)}: the label '{label}' can't be told from a defect's name.",
            f"Write '{GOOD}' for a good picture, 'bad' for a defect without a name.",
        )
    return _UNNAMED_DEFECT if label.lower() in _UNNAMED else label


def _existing(file: Path, folder: Path, row: _Row, column: str) -> Path:
    """The path in a column, which must be a file."""
    value = row.values[column]
    try:
        if value and (folder / value).is_file():
            return folder / value
    except ValueError:  # a NUL inside
        pass
    what = "picture" if column == "path" else "mask"
    raise DataError(
        f"{_at(file, row.line)}: the {what} '{value}' does not exist.",
        "Paths are relative to the manifest's folder, with '/' between their parts.",
    )
