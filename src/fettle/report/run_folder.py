"""RunWriter: the run folder of `fettle inspect -o OUT` and `fettle evaluate -o OUT`.

OUT/run.json              card, thresholds, counts, metrics, what explanations show, whether it ended well
OUT/inspections.jsonl     one row a picture, written as it comes
OUT/inspections.csv       the same rows, made at the end
OUT/inspections.parquet   the same rows, made at the end
OUT/panels/*.jpg          picture, heat map and contours side by side
OUT/overlays/*.png        heat and contours at the picture's own size, where asked for
OUT/explanations/*.jpg    the method's inner view of the framed picture, where asked for
OUT/templates/*.png       the pictures that the method compares with, where it does
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fettle import __version__
from fettle.datasets.folder import RUN_FORMAT, RUN_JSON
from fettle.errors import DataError, FettleError, PictureError, UsageError
from fettle.inspection import ComparedWith, Explained, Inspection, Refusal, Verdict
from fettle.protocols import Json
from fettle.report.compared import kept_templates, read_templates, write_templates
from fettle.report.explanations import draw_explanation
from fettle.report.overlays import Pixels, draw_overlay, draw_panel
from fettle.report.rows import (
    JSONL,
    Row,
    inspected_row,
    printable,
    read_rows,
    refused_row,
    safe_stem,
    write_csv,
    write_parquet,
)

_MADE_AT_THE_END = ("inspections.csv", "inspections.parquet", "report.html")
_MAKE_ONE = "Make one first: `fettle inspect MODEL PICTURES -o OUT`, into a folder of its own."
_NUM_THREADS = 2
_NUM_WAITING = 4  # pictures that may wait for a thread: what bounds the memory


@dataclass(frozen=True)
class Thresholds:
    """The calibration's cuts: `review` and `reject` of the score, `pixel` of the map. None: not promised."""

    review: float | None = None
    reject: float | None = None
    pixel: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """How many pictures a run has seen, by verdict, and where it is. `pictures` includes the refused."""

    pictures: int
    ok: int
    review: int
    reject: int
    refused: int
    out: Path


class RunWriter:
    """Writes a run folder while the run goes on; rows come first, pictures follow in the background.

    A folder that already holds a run gets the new run in its place: the former rows and their pictures
    are removed, other files are left alone. As a context manager it finishes the folder whatever ends the
    block; an exception or Ctrl-C leaves `complete: false` in run.json and every row that was added. Call
    it from one thread.

    Args:
        out: the run folder; made if need be.
        card: what is known of the model and the run, for the model card; `card["promise"]` is the
            calibration's promise in words, `card["name"]` the model's name.
        thresholds: the calibration's cuts.
        overlays: also write OUT/overlays/NAME.png at each picture's own size.
        templates: the pictures that the method compares with.

    Raises:
        UsageError: OUT is a file, can't be written, or holds a `run.json` of something else.
    """

    def __init__(
        self,
        out: Path,
        *,
        card: dict[str, Json],
        thresholds: Thresholds,
        overlays: bool,
        templates: Sequence[ComparedWith] = (),
    ) -> None:
        self.out = out
        self._card = card
        self._thresholds = thresholds
        self._overlays = overlays
        self._counts = {verdict.value: 0 for verdict in Verdict} | {"refused": 0}
        self._number = 0
        self._steps: dict[str, None] = {}
        self._started = datetime.now(UTC)
        self._summary: RunSummary | None = None
        self._failed: list[tuple[int, str, Exception]] = []  # with the picture's number
        self._explanation: dict[str, object] | None = None
        self._templates = kept_templates(templates)
        with _writing(out):
            _clear_former_run(out)
            (out / "panels").mkdir(parents=True, exist_ok=True)
            if overlays:
                (out / "overlays").mkdir(exist_ok=True)
            self._write_run_json(complete=False, metrics=None)
            write_templates(out, templates)
            self._lines = (out / JSONL).open("w", encoding="utf-8")
        self._places = threading.BoundedSemaphore(_NUM_THREADS + _NUM_WAITING)
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="panels")

    def add(
        self,
        inspection: Inspection,
        pixels: Pixels,
        *,
        truth: str | None = None,
        mask: NDArray[np.bool_] | None = None,
        explained: Explained | None = None,
    ) -> None:
        """Write the row of one picture at once and its pictures in the background.

        Args:
            inspection: the answer; its map is (H, W).
            pixels: the picture, uint8 or uint16 (H, W, 3).
            truth: "good" or the defect's name, where the picture is labelled.
            mask: the labelled defect, bool (H, W), outlined in the panel.
            explained: the method's inner view, drawn as OUT/explanations/NAME.jpg. Its numbers and words are
                kept once, in run.json: those of the first picture.

        Raises:
            PictureError: the score or a region's peak is not finite, or picture, map and mask differ in
                size. Nothing is written then; the run may go on.
            UsageError: the numbers of an explanation hold something that JSON can't, like NaN.
        """
        _check_sizes(inspection, pixels, mask)
        self._number += 1
        name = _safe_name(self._number, inspection.path)
        panel = f"panels/{name}.jpg"
        overlay = f"overlays/{name}.png" if self._overlays else None
        explanation = f"explanations/{name}.jpg" if explained is not None else None
        if explained is not None and self._explanation is None:
            self._begin_explanations(explained)
        self._steps |= dict.fromkeys(inspection.seconds)
        self._append(inspected_row(self._number, inspection, truth, panel, overlay, explanation))
        self._counts[inspection.verdict.value] += 1
        self._places.acquire()
        future = self._pool.submit(self._draw, inspection, pixels, mask, explained, name)
        number = self._number
        future.add_done_callback(lambda done: self._drawn(number, inspection.path, done))

    def refuse(self, refusal: Refusal, *, truth: str | None = None) -> None:
        """Write the row of a picture that could not be inspected."""
        self._number += 1
        self._append(refused_row(self._number, refusal, truth))
        self._counts["refused"] += 1

    def finish(self, metrics: dict[str, Json] | None = None) -> RunSummary:
        """Wait for the background, write CSV, Parquet and run.json. A second call changes nothing.

        Args:
            metrics: the evaluation's figures by their standard keys, where there are labels.

        Raises:
            FettleError: a panel or an overlay could not be written; everything else is there then.
            UsageError: the metrics hold something that JSON can't, like NaN.
        """
        return self._finish(metrics, complete=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish(None, complete=True)
            return
        try:
            self._finish(None, complete=False)
        except FettleError as second:
            error.add_note(str(second))

    def _finish(self, metrics: dict[str, Json] | None, *, complete: bool) -> RunSummary:
        if self._summary is not None:
            return self._summary
        self._pool.shutdown(wait=True)
        self._summary = RunSummary(
            pictures=self._number,
            ok=self._counts["ok"],
            review=self._counts["review"],
            reject=self._counts["reject"],
            refused=self._counts["refused"],
            out=self.out,
        )
        with _writing(self.out):
            self._lines.close()
            write_csv(self.out, list(self._steps))
            write_parquet(self.out, list(self._steps))
            self._write_run_json(complete=complete and not self._failed, metrics=metrics)
        if self._failed:
            _, path, first = min(self._failed, key=lambda failed: failed[0])
            raise FettleError(
                f"{len(self._failed)} pictures of the report could not be drawn or written, the first for "
                f"'{printable(path)}' ({type(first).__name__}: {first}); all rows are in '{self.out}'.",
                "Check the free space and the rights there, then run again.",
            )
        return self._summary

    def _append(self, row: Row) -> None:
        with _writing(self.out):
            self._lines.write(row.to_line() + "\n")
            self._lines.flush()

    def _begin_explanations(self, first: Explained) -> None:
        """Their folder, and in run.json what is the same for all of them."""
        self._explanation = {
            "pictures": list(first.pictures),
            "maps": list(first.maps),
            "numbers": dict(first.numbers),
            "words": first.words,
        }
        with _writing(self.out):
            (self.out / "explanations").mkdir(exist_ok=True)
            self._write_run_json(complete=False, metrics=None)

    def _draw(
        self,
        inspection: Inspection,
        pixels: Pixels,
        mask: NDArray[np.bool_] | None,
        explained: Explained | None,
        name: str,
    ) -> None:
        from PIL import Image

        of_map = (inspection.anomaly_map, self._thresholds.pixel, inspection.valid)
        shown = (pixels, *of_map, mask, None if inspection.soft is None else inspection.soft > 0.5)
        panel = Image.fromarray(draw_panel(*shown))
        panel.save(self.out / f"panels/{name}.jpg", quality=85)
        if self._overlays:
            overlay = Image.fromarray(draw_overlay(*shown))
            overlay.save(self.out / f"overlays/{name}.png", compress_level=3)
        if explained is not None:
            explanation = Image.fromarray(draw_explanation(explained, self._thresholds.pixel))
            explanation.save(self.out / f"explanations/{name}.jpg", quality=85)

    def _drawn(self, number: int, path: str, done: Future[None]) -> None:
        error = done.exception()
        if isinstance(error, Exception):
            self._failed.append((number, path, error))
        self._places.release()

    def _write_run_json(self, *, complete: bool, metrics: dict[str, Json] | None) -> None:
        run: dict[str, object] = {
            "format": RUN_FORMAT,
            "format_version": 1,
            "fettle": __version__,
            "complete": complete,
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "pictures": self._number,
            "counts": self._counts,
            "thresholds": asdict(self._thresholds),
            "card": self._card,
            "metrics": metrics,
            "explanation": self._explanation,
            "templates": [kept._asdict() for kept in self._templates],
        }
        try:
            text = json.dumps(run, allow_nan=False, indent=1)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The run's card, metrics or explanation can't be kept as JSON ({error}).",
                "Use None where a figure is not defined.",
            ) from error
        partial = self.out / f"{RUN_JSON}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.out / RUN_JSON)


def read_run(out: Path) -> dict[str, Json]:
    """What run.json of a run folder holds.

    Raises:
        UsageError: the folder holds no run.
        DataError: run.json is damaged or of a newer format.
    """
    if not (out / RUN_JSON).is_file() or not (out / JSONL).is_file():
        raise UsageError(f"'{out}' is not a run folder: it has no {RUN_JSON} with {JSONL}.", _MAKE_ONE)
    return _load_run_json(out)


def _load_run_json(out: Path) -> dict[str, Json]:
    path = out / RUN_JSON
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' can't be read as JSON ({error}).", _MAKE_ONE) from error
    if not isinstance(run, dict) or run.get("format") != RUN_FORMAT:
        raise UsageError(f"'{path}' was not written by Fettle.", _MAKE_ONE)
    if run.get("format_version") != 1:
        raise DataError(
            f"'{path}' has format version {run.get('format_version')}, this Fettle reads version 1.",
            "Use the version of Fettle that wrote it.",
        )
    return run


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say in one sentence what stopped a write."""
    try:
        yield
    except OSError as error:
        raise FettleError(
            f"The run folder '{out}' could not be written ({error.strerror or error}).",
            "Free some space, check the rights, or name another folder with -o.",
        ) from error


def _clear_former_run(out: Path) -> None:
    """Remove what a former run wrote in `out`, and nothing else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"'{out}' is a file, not a folder.", "Name a folder with -o.")
    if not (out / RUN_JSON).exists():
        taken = [name for name in (JSONL, *_MADE_AT_THE_END) if (out / name).exists()]
        if taken:
            raise UsageError(
                f"'{out}' holds {taken[0]} but no {RUN_JSON}: it may not be a run of Fettle.",
                "Name another folder with -o, or move that file away.",
            )
        return
    for template in read_templates(_load_run_json(out)):
        (out / template.file).unlink(missing_ok=True)
    # A run that was killed early has no rows; a damaged line ends the clean-up, what it named stays.
    with suppress(DataError, FileNotFoundError):
        for row in read_rows(out):
            for name in row.pictures:
                (out / name).unlink(missing_ok=True)
    for name in _MADE_AT_THE_END:
        (out / name).unlink(missing_ok=True)


def remove_run(out: Path) -> None:
    """Remove the run in a folder that something else is written to; nothing where there is none.

    Raises:
        UsageError: its `run.json` is of something else.
    """
    if (out / RUN_JSON).exists():
        _clear_former_run(out)
        (out / JSONL).unlink(missing_ok=True)
        (out / RUN_JSON).unlink()


def _check_sizes(inspection: Inspection, pixels: Pixels, mask: NDArray[np.bool_] | None) -> None:
    shown = printable(inspection.path)
    numbers = {"score": inspection.score} | {
        f"peak of region {i}": r.peak for i, r in enumerate(inspection.regions, 1)
    }
    for what, value in numbers.items():
        if not math.isfinite(value):
            raise PictureError(f"The {what} of '{shown}' is {value}.", "Inspect the picture again.")
    size = inspection.anomaly_map.shape
    others = {"picture": pixels.shape[:2], "valid area": inspection.valid.shape}
    if mask is not None:
        others["mask"] = mask.shape
    for what, other in others.items():
        if other != size:
            raise PictureError(
                f"The {what} of '{shown}' is {other[1]} x {other[0]} px, its map {size[1]} x {size[0]} px.",
                "Give all of them at the picture's own size.",
            )


def _safe_name(number: int, path: str) -> str:
    return f"{number:06d}_{safe_stem(path)}"
