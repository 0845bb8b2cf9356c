"""Outlines of regions in the formats of labelling tools, beside a run folder's other files.

OUT/contours/coco.json            one file for all pictures
OUT/contours/labelme/NAME.json    a file a picture
OUT/contours/yolo/NAME.txt        a file a picture
OUT/contours/png/NAME.png         masks of the pictures' own sizes

NAME is the picture's without suffix, with its folder's in front (FOLDER_NAME) where others have the same.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fettle.inspection import Inspection
from fettle.refine.contours import OutlinedPicture, outlines, to_coco, to_labelme, to_png, to_yolo
from fettle.report.rows import printable, safe_stem

FORMATS = ("coco", "labelme", "yolo", "png")
_SUFFIXES = {"labelme": ".json", "yolo": ".txt", "png": ".png"}


class ContourWriter:
    """Writes outlines while a run goes on; what a former run wrote there is removed.

    Args:
        out: the run folder.
        formats: of `FORMATS`; with none, nothing is written.
        min_area_px: smaller regions are left out.
        paths: of all pictures to come, as far as they are known: which names come more than once.
        pixel_threshold: where no refiner says otherwise, regions are where the map is above; None: none are.
    """

    def __init__(
        self,
        out: Path,
        formats: Sequence[str],
        pixel_threshold: float | None,
        min_area_px: int = 1,
        paths: Iterable[Path] = (),
    ) -> None:
        self._min_area = min_area_px
        self._folder = out / "contours"
        self._formats = formats
        self._threshold = math.inf if pixel_threshold is None else pixel_threshold
        self._pictures: list[OutlinedPicture] = []
        self._names: set[str] = set()
        self._stems = Counter(safe_stem(path.name) for path in paths)
        self._clear()
        for name in formats:
            folder = self._folder / name if name in _SUFFIXES else self._folder
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, inspection: Inspection) -> None:
        """Write one picture's outlines."""
        if not self._formats:
            return
        values, level = inspection.anomaly_map, self._threshold
        if inspection.soft is not None:
            values, level = inspection.soft, 0.5
        marks = inspection.marks(self._threshold)
        small = _small_parts(marks, self._min_area)
        found = () if math.isinf(level) else outlines(values, inspection.valid & ~small, level)
        height, width = values.shape
        picture = OutlinedPicture(printable(inspection.path), width, height, found)
        name = self._name(inspection.path)
        if "coco" in self._formats:
            self._pictures.append(picture)
        if "labelme" in self._formats:
            shown = picture._replace(name=printable(self._from_labelme(inspection.path)))
            self._write("labelme", name, json.dumps(to_labelme(shown)).encode())
        if "yolo" in self._formats:
            self._write("yolo", name, to_yolo(picture).encode())
        if "png" in self._formats:
            self._write("png", name, to_png((marks & ~small).astype(np.float32)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever ended the run, COCO's file holds the pictures that were added."""
        if "coco" in self._formats:
            text = json.dumps(to_coco(self._pictures))
            (self._folder / "coco.json").write_text(text, encoding="utf-8")

    def _write(self, kind: str, name: str, content: bytes) -> None:
        (self._folder / kind / f"{name}{_SUFFIXES[kind]}").write_bytes(content)

    def _from_labelme(self, path: str) -> str:
        """The picture as LabelMe looks for it, from its JSON's folder."""
        try:
            return os.path.relpath(path, self._folder / "labelme")
        except ValueError:  # on another drive
            return str(Path(path).absolute())

    def _name(self, path: str) -> str:
        """The picture's own, told from others; with a number where the folder's name is not enough."""
        stem = safe_stem(path)
        if self._stems[stem] > 1 and (folder := Path(path).parent.name):
            stem = f"{safe_stem(folder)}_{stem}"
        name = stem
        number = 1
        while name in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name)
        return name

    def _clear(self) -> None:
        (self._folder / "coco.json").unlink(missing_ok=True)
        for kind, suffix in _SUFFIXES.items():
            for path in (self._folder / kind).glob(f"*{suffix}"):
                path.unlink()


def _small_parts(marks: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """The pixels of connected parts (8 neighbours) that are smaller than `least` px, (H, W)."""
    if least <= 1 or not marks.any():
        return np.zeros_like(marks)
    from scipy import ndimage

    labels, count = ndimage.label(marks, structure=np.ones((3, 3), dtype=bool))
    small = np.bincount(labels.ravel(), minlength=count + 1) < least
    small[0] = False
    parts: NDArray[np.bool_] = small[labels]
    return parts
