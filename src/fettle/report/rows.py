"""Row: one picture's line in a run folder, and the three files that hold the rows.

`inspections.jsonl` is the truth and grows line by line. The CSV and the Parquet file are made from it in
blocks, so that a run of any length needs little memory.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path, PurePath

from fettle.errors import DataError
from fettle.inspection import Inspection, Refusal, Region, Verdict
from fettle.protocols import Json

JSONL = "inspections.jsonl"
_PICTURE_FILE = re.compile(r"(panels|overlays|explanations)/[0-9]{6,}_[A-Za-z0-9._-]+\.(jpg|png)")
_BLOCK = 4096
_LARGEST = ("area_px", "length_px", "area_mm2", "length_mm")


@dataclass(frozen=True)
class Row:
    """What a run folder keeps of one picture.

    Attributes:
        number: running number in this run, from 1.
        path: as it was given.
        verdict, score: None for a refused picture; `refusal` then says why.
        truth: "good" or the defect's name where the picture is labelled.
        panel, overlay, explanation: picture files inside the run folder, relative; None where there is none.
        refinement: what a refiner did; the tables hold its state as `refined`.
    """

    number: int
    path: str
    score: float | None = None
    verdict: str | None = None
    refusal: str | None = None
    truth: str | None = None
    product: str = ""
    regions: tuple[Region, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    sha256: str = ""
    notes: tuple[str, ...] = ()
    panel: str | None = None
    overlay: str | None = None
    explanation: str | None = None
    refinement: dict[str, Json] | None = None

    @property
    def pictures(self) -> tuple[str, ...]:
        """The picture files that it names."""
        return tuple(name for name in (self.panel, self.overlay, self.explanation) if name is not None)

    @property
    def largest(self) -> Region | None:
        """The region with the largest area."""
        return max(self.regions, key=lambda region: region.area_px, default=None)

    def to_line(self) -> str:
        """One line of JSON, without its line break. Paths that are no Unicode survive as escapes."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Row:
        """The row of a line that `to_line` made.

        Raises:
            ValueError, TypeError, KeyError: the line is something else.
        """
        values = json.loads(line)
        values["regions"] = tuple(Region(**region) for region in values["regions"])
        values["notes"] = tuple(str(note) for note in values["notes"])
        row = cls(**values)
        if row.verdict is not None:
            Verdict(row.verdict)
        if (row.verdict is None) == (row.refusal is None) or (row.verdict is None) != (row.score is None):
            raise ValueError("a row has a score and a verdict, or a refusal")
        for name in row.pictures:
            # The report links to these: a name that leads out of the folder is never followed.
            if not _PICTURE_FILE.fullmatch(name):
                raise ValueError(f"'{name}' is no picture of this folder")
        return row


def inspected_row(
    number: int,
    inspection: Inspection,
    truth: str | None,
    panel: str,
    overlay: str | None,
    explanation: str | None,
) -> Row:
    """The row of a picture that was inspected."""
    return Row(
        number=number,
        path=inspection.path,
        score=float(inspection.score),
        verdict=inspection.verdict.value,
        truth=truth,
        product=inspection.product,
        regions=inspection.regions,
        seconds={step: float(value) for step, value in inspection.seconds.items()},
        sha256=inspection.sha256,
        notes=inspection.notes,
        panel=panel,
        overlay=overlay,
        explanation=explanation,
        refinement=None if inspection.refinement is None else dict(inspection.refinement),
    )


def refused_row(number: int, refusal: Refusal, truth: str | None) -> Row:
    """The row of a picture that could not be inspected."""
    return Row(number=number, path=refusal.path, refusal=refusal.reason, truth=truth)


def read_rows(out: Path) -> Iterator[Row]:
    """Every row of a run folder, in the order of inspection.

    A last line without its line break was cut off when the run was killed and is left out.

    Raises:
        DataError: a line is not one of ours.
    """
    with (out / JSONL).open(encoding="utf-8") as lines:
        for position, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield Row.from_line(line)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(
                    f"Line {position} of '{out / JSONL}' is damaged ({error}).",
                    "Delete that line, or run `fettle inspect` again.",
                ) from error


def printable(text: str) -> str:
    """The text with what is no Unicode written as an escape, so that every file and page can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def safe_stem(path: str) -> str:
    """A file name without suffix from a picture's name: letters, digits, . _ - and never nothing."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", PurePath(path).stem)[:60].strip("._") or "picture"


def _for_spreadsheet(text: str) -> str:
    """A text cell that no spreadsheet takes for a formula: a leading = + - @ gets an apostrophe."""
    shown = printable(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@", "\t", "\r") else shown


def write_csv(out: Path, steps: Sequence[str]) -> None:
    """`inspections.csv` from the rows: one line a picture; `seconds_STEP` columns for `steps`.

    Regions are JSON in one cell. Text cells that a spreadsheet would run as a formula start with '.
    """
    partial = out / "inspections.csv.partial"
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in read_rows(out):
            cells = _cells(row, steps)
            cells["regions"] = json.dumps([asdict(region) for region in row.regions])
            cells["notes"] = "; ".join(row.notes)
            safe = {k: _for_spreadsheet(v) if isinstance(v, str) else v for k, v in cells.items()}
            if writer is None:
                writer = csv.DictWriter(file, list(safe))
                writer.writeheader()
            writer.writerow(safe)
        if writer is None:
            csv.DictWriter(file, list(_cells(Row(0, ""), steps))).writeheader()
    partial.replace(out / "inspections.csv")


def write_parquet(out: Path, steps: Sequence[str]) -> None:
    """`inspections.parquet` from the rows: the CSV's columns, with regions as a list of structs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number, real = pa.string(), pa.int64(), pa.float64()
    region = dict.fromkeys(("left", "top", "width", "height", "area_px"), number)
    region |= dict.fromkeys(("length_px", "peak", "area_mm2", "length_mm"), real)
    special = {
        "number": number,
        "score": real,
        "num_regions": number,
        "largest_area_px": number,
        "regions": pa.list_(pa.struct(list(region.items()))),
        "notes": pa.list_(text),
    }
    real_columns = {f"largest_{name}" for name in _LARGEST} | {f"seconds_{step}" for step in steps}
    names = list(_cells(Row(0, ""), steps))
    schema = pa.schema([(name, special.get(name, real if name in real_columns else text)) for name in names])
    partial = out / "inspections.parquet.partial"
    rows = read_rows(out)
    with pq.ParquetWriter(partial, schema) as writer:
        while block := [_cells(row, steps) for row in islice(rows, _BLOCK)]:
            for cells in block:
                for name, value in cells.items():
                    if isinstance(value, str):
                        cells[name] = printable(value)
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
    partial.replace(out / "inspections.parquet")


def _cells(row: Row, steps: Sequence[str]) -> dict[str, object]:
    """A row as flat columns, in the order of the tables."""
    largest = row.largest
    cells: dict[str, object] = {
        "number": row.number,
        "path": row.path,
        "product": row.product,
        "truth": row.truth,
        "score": row.score,
        "verdict": row.verdict,
        "refusal": row.refusal,
        "num_regions": len(row.regions),
    }
    for name in _LARGEST:
        cells[f"largest_{name}"] = getattr(largest, name) if largest else None
    cells["regions"] = [asdict(region) for region in row.regions]
    for step in steps:
        cells[f"seconds_{step}"] = row.seconds.get(step)
    cells |= {"sha256": row.sha256, "notes": [printable(note) for note in row.notes]}
    cells |= {"panel": row.panel, "overlay": row.overlay, "explanation": row.explanation}
    cells["refined"] = (row.refinement or {}).get("refined")
    return cells
