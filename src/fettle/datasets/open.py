"""One way into every layout: `open_dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fettle.datasets.folder import check_folder, open_folder, subfolders
from fettle.datasets.magnetic_tile import looks_like_magnetic_tile, open_magnetic_tile
from fettle.datasets.manifest import open_manifest
from fettle.datasets.mvtec import looks_like_mvtec, open_mvtec
from fettle.datasets.mvtec3d import looks_like_mvtec3d, open_mvtec3d
from fettle.datasets.records import GOOD, Dataset
from fettle.datasets.visa import looks_like_visa, looks_like_visa_object, open_visa
from fettle.errors import DataError, UsageError, nearest_name

LAYOUTS: dict[str, Callable[[Path], Dataset]] = {
    "folder": open_folder,
    "mvtec": open_mvtec,
    "mvtec3d": open_mvtec3d,
    "visa": open_visa,
    "magnetic_tile": open_magnetic_tile,
    "manifest": open_manifest,
}


def open_dataset(path: str | Path, layout: str = "auto") -> Dataset:
    """Read a data set's records; no picture is decoded.

    Args:
        path: a folder, or a manifest's CSV file.
        layout: a name in `LAYOUTS`, or "auto": a .csv file is a manifest, a folder with
            split_csv/1cls.csv is "visa", one with train/good/rgb is "mvtec3d", one with train/ and
            test/ or with train/good is "mvtec", one with MT_* is "magnetic_tile", any other a plain
            folder of good pictures. A folder of several products is refused, see `products`.

    Raises:
        UsageError: an unknown layout.
        DataError: missing, empty, without pictures, or not what the layout says.
    """
    path = Path(path)
    if layout != "auto" and layout not in LAYOUTS:
        raise UsageError(f"There is no layout '{layout}'.", nearest_name(layout, [*LAYOUTS, "auto"]))
    return LAYOUTS[_detect(path) if layout == "auto" else layout](path)


def detect_layout(root: Path) -> str | None:
    """The name of the layout that a folder shows by its own folders; None for any other folder."""
    if looks_like_visa(root):
        return "visa"
    if looks_like_mvtec3d(root):  # before "mvtec", which it looks like too
        return "mvtec3d"
    if looks_like_mvtec(root):
        return "mvtec"
    return "magnetic_tile" if looks_like_magnetic_tile(root) else None


def _detect(path: Path) -> str:
    if path.is_file() and path.suffix.lower() == ".csv":
        return "manifest"
    check_folder(path)
    layout = detect_layout(path)
    if layout is not None:
        return layout
    # As a plain folder, the defects and masks of what follows would pass for good pictures.
    if looks_like_visa_object(path):
        raise DataError(
            f"'{path}' is one object of VisA, and its split stands in split_csv/1cls.csv beside the objects.",
            "Name the folder that holds split_csv and the objects.",
        )
    inner = [f.name for f in subfolders(path) if detect_layout(f) is not None or looks_like_visa_object(f)]
    if inner:
        raise DataError(
            f"'{path}' holds several products ({', '.join(inner)}), not one.",
            f"Name one of them, such as '{path / inner[0]}'; 'fettle fit --multi-class' learns all of them.",
        )
    whole = path.absolute().parent
    if path.absolute().name == "test" and (looks_like_mvtec(whole) or (whole / "ground_truth").is_dir()):
        raise DataError(
            f"'{path}' is the test part of '{whole.name}', so its pictures can't be taken as good.",
            f"Name '{path / GOOD}' for the good ones, or '{whole}' for the product.",
        )
    if (path / "ground_truth").is_dir():
        raise DataError(
            f"'{path}' has ground_truth/ but no train/, so its pictures can't be taken as good.",
            "Use the layout 'mvtec' to test on it, or name a folder of good pictures.",
        )
    return "folder"
