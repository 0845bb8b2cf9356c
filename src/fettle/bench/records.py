"""Records of a grid: one JSON file a cell, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from fettle.errors import DataError
from fettle.protocols import Json

_SAME = 0.0005  # spreads below are no spreads at three decimals


def record_path(folder: Path, name: str) -> Path:
    """Where the record of a cell lies."""
    return folder / f"{name}.json"


def write_record(folder: Path, name: str, record: Mapping[str, Json]) -> Path:
    """Write one record; a kill leaves none, or the former one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(folder, name)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read_records(folder: Path) -> dict[str, dict[str, Json]]:
    """All records by the names of their cells, sorted.

    Raises:
        DataError: a record that is no JSON object.
    """
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("it is no object")
        except (OSError, ValueError) as error:
            raise DataError(
                f"The record '{path}' can't be read ({error}).", "Remove it, and run again."
            ) from error
        records[path.stem] = record
    return records


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds, three decimals; the mean alone where there is no spread."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "n/a"
    if len(known) < 2 or max(known) - min(known) < _SAME:
        return f"{mean(known):.3f}"
    return f"{mean(known):.3f} ± {stdev(known):.3f}"


@dataclass(frozen=True)
class Difference:
    """Of two arms of a study, seed by seed; more is better.

    Attributes:
        mean: over the seeds. deviation: standard deviation over them, None for one seed.
    """

    mean: float
    deviation: float | None

    @property
    def exceeds(self) -> bool | None:
        """Whether the mean is larger than its deviation over seeds; None for one seed."""
        return None if self.deviation is None else abs(self.mean) > max(self.deviation, _SAME)

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.mean:+.3f} (one seed)"
        verdict = ("better" if self.mean > 0 else "worse") if self.exceeds else "within the spread"
        return f"{self.mean:+.3f} ± {self.deviation:.3f}, {verdict}"


def paired_difference(
    own: Mapping[int, float | None], reference: Mapping[int, float | None]
) -> Difference | None:
    """Own value less the reference's for each seed that both have; None where there is no such seed.

    Args:
        own, reference: values by seed.
    """
    pairs = [(own[seed], reference[seed]) for seed in sorted(own.keys() & reference.keys())]
    known = [one - other for one, other in pairs if one is not None and other is not None]
    if not known:
        return None
    return Difference(mean(known), stdev(known) if len(known) > 1 else None)
