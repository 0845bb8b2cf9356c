"""Run the cells of a grid: fit, evaluate, write the record. Cells that have a record are left alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias, cast

from fettle.bench.records import record_path, write_record
from fettle.datasets.records import Dataset
from fettle.detector import Detector
from fettle.protocols import Json, Progress, no_progress, no_words

After: TypeAlias = "Callable[[Detector, Dataset], dict[str, Json] | None]"
"""after(detector, dataset): more facts for a cell's record, or None."""


@dataclass(frozen=True)
class Cell:
    """One fit and evaluation.

    Attributes:
        name: of its record.
        data: name of the data set that it is fitted and evaluated on.
        fit: fields of `fitting.FitRequest`: method, preset, seed, settings, ...
    """

    name: str
    data: str
    fit: Mapping[str, Json] = field(default_factory=dict)


def run_cells(
    cells: Iterable[Cell],
    open_data: Callable[[str], Dataset],
    folder: Path,
    *,
    after: After | None = None,
    say: Callable[[str], None] = no_words,
    progress: Progress = no_progress,
) -> None:
    """Run every cell that has no record in `folder` yet, in order.

    Args:
        open_data: opens a cell's data set by its name.
        after: looks at each fitted detector once more; what it finds goes into the record.
        say: hears what is begun and what is done.
    """
    for cell in cells:
        if record_path(folder, cell.name).exists():
            continue
        say(f"{cell.name}: begins.")
        record = run_cell(cell, open_data(cell.data), after=after, say=say, progress=progress)
        write_record(folder, cell.name, record)
        say(f"{cell.name}: done in {cast(float, record['seconds']):.0f} s.")


def run_cell(
    cell: Cell,
    dataset: Dataset,
    *,
    after: After | None = None,
    say: Callable[[str], None] = no_words,
    progress: Progress = no_progress,
) -> dict[str, Json]:
    """Fit on the good training part and evaluate on the test part: the record of one cell.

    Its keys: cell, config, backbone, weights, frame, num_fit, num_calibration, fit (its facts), warnings,
    seconds_fit, seconds, result (see `Detector.evaluate`), and extra where `after` found something.
    """
    start = time.perf_counter()
    detector = Detector.fit(dataset, say=say, progress=progress, **cell.fit)
    seconds_fit = time.perf_counter() - start
    result = detector.evaluate(dataset, progress=progress)
    seconds = time.perf_counter() - start
    extra = after(detector, dataset) if after else None
    spec = detector.method.backbone.spec
    return {
        "cell": cast("dict[str, Json]", asdict(cell)),
        "config": detector.method.config.model_dump(mode="json"),
        "backbone": spec.id,
        "weights": spec.sha256,
        "frame": [detector.frame.height, detector.frame.width],
        "num_fit": detector.num_fit,
        "num_calibration": detector.calibration.num_scores,
        "fit": detector.card["fit"],
        "warnings": cast("list[Json]", detector.warnings()),
        "versions": detector.card["versions"],
        "seconds_fit": round(seconds_fit, 1),
        "seconds": round(seconds, 1),
        "result": result,
        **({"extra": extra} if extra else {}),
    }
