"""A CSV file, row by row, each with the line that it ends on: how manifests and split files are read."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fettle.errors import DataError

MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """One row by column name, its file, and the line that it ends on."""

    file: Path
    line: int
    values: Mapping[str, str]

    @property
    def at(self) -> str:
        """Where it stands, as a message begins."""
        return _at(self.file, self.line)


def read_table(file: Path, needed: Sequence[str], what: str) -> list[Row]:
    """Every row that is not blank.

    UTF-8 with or without a byte-order mark; any line ends; fields are stripped.

    Args:
        file: the CSV file.
        needed: columns that the header must have, in any order and among others.
        what: what the file is called in messages, such as "manifest".

    Raises:
        DataError: missing, too large, not UTF-8 text, no valid CSV, a column that is missing or stands
            there twice, or a row of another length than the header.
    """
    reader = csv.reader(io.StringIO(_text(file, what), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(file, header, needed)
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
            rows.append(Row(file, reader.line_num, values))
        return rows
    except csv.Error as error:
        raise DataError(
            f"{_at(file, reader.line_num)} is no valid CSV ({error}).", "Save the table as CSV again."
        ) from None


def _at(file: Path, line: int) -> str:
    return f"'{file}', line {line}"


def _text(file: Path, what: str) -> str:
    """The file's text, bounded."""
    if not file.exists():
        raise DataError(f"'{file}' does not exist.", "Check the path.")
    if not file.is_file():
        raise DataError(f"'{file}' is not a file, and a {what} is one.", "Name the CSV file itself.")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise DataError(
            f"The {what} '{file}' has {size >> 20} MiB, over the bound of {MAX_BYTES >> 20} MiB.",
            "Split it into several files.",
        )
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The {what} '{file}' is not UTF-8 text ({error}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(
            f"The {what} '{file}' can't be read: {error.strerror}.", "Check its permissions."
        ) from None


def _check_header(file: Path, header: list[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in header]
    if missing:
        found = ", ".join(header) or "nothing"
        raise DataError(
            f"{_at(file, 1)}: the column '{missing[0]}' is missing; found: {found}.",
            f"The header needs {','.join(needed)}, with commas between them.",
        )
    double = next((name for name in header if header.count(name) > 1), None)
    if double is not None:
        raise DataError(f"{_at(file, 1)}: the column '{double}' stands there twice.", "Rename one of them.")
