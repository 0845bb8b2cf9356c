"""One way into every layout: `open_dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fettle.datasets.folder import check_folder, open_folder, subfolders
from fettle.datasets.magnetic_tile import looks_like_magnetic_tile, open_magnetic_tile
from fettle.datasets.manifest import open_manifest
from fettle.datasets.mvtec import looks_like_mvtec, open_mvtec
from fettle.datasets.records import Dataset
from fettle.errors import DataError, UsageError, nearest_name

LAYOUTS: dict[str, Callable[[Path], Dataset]] = {
    "folder": open_folder,
    "mvtec": open_mvtec,
    "magnetic_tile": open_magnetic_tile,
    "manifest": open_manifest,
}


def open_dataset(path: str | Path, layout: str = "auto") -> Dataset:
    """Read a data set's records; no picture is decoded.

    Args:
        path: a folder, or a manifest's CSV file.
        layout: a name in `LAYOUTS`, or "auto": a .csv file is a manifest, a folder with train/ and
            test/ or with train/good is "mvtec", one with MT_* is "magnetic_tile", any other a
            plain folder of good pictures.

    Raises:
        UsageError: an unknown layout.
        DataError: missing, empty, without pictures, or not what the layout says.
    """
    path = Path(path)
    if layout != "auto" and layout not in LAYOUTS:
        raise UsageError(f"There is no layout '{layout}'.", nearest_name(layout, [*LAYOUTS, "auto"]))
    return LAYOUTS[_detect(path) if layout == "auto" else layout](path)


def _detect(path: Path) -> str:
    if path.is_file() and path.suffix.lower() == ".csv":
        return "manifest"
    check_folder(path)
    if looks_like_mvtec(path):
        return "mvtec"
    if looks_like_magnetic_tile(path):
        return "magnetic_tile"
    inner = [f.name for f in subfolders(path) if looks_like_mvtec(f) or looks_like_magnetic_tile(f)]
    if inner:  # as a plain folder, their defects and masks would pass for good pictures
        raise DataError(
            f"'{path}' holds several products ({', '.join(inner)}), not one.",
            f"Name one of them, such as '{path / inner[0]}', or write a manifest.",
        )
    if (path / "ground_truth").is_dir():
        raise DataError(
            f"'{path}' has ground_truth/ but no train/, so its pictures can't be taken as good.",
            "Use the layout 'mvtec' to test on it, or name a folder of good pictures.",
        )
    return "folder"
