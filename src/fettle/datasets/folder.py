"""Any folder of pictures: all of them good, no split. Also how folders are walked, for every layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from fettle.datasets.records import Dataset, Record
from fettle.errors import DataError
from fettle.images.decode import PICTURE_SUFFIXES

RUN_JSON = "run.json"
RUN_FORMAT = "fettle-run"  # what a run folder's run.json begins with
_DRAWN = frozenset(("panels", "overlays", "explanations", "templates", "contours"))  # by a run


def open_folder(root: Path) -> Dataset:
    """Every picture below `root`, at any depth, taken as good.

    Names that don't end like a picture's are passed over, and what `picture_files` passes over.

    Raises:
        DataError: not a folder, empty, or without pictures.
    """
    check_folder(root)
    records = tuple(Record(path) for path in picture_files(root))
    if not records:
        raise no_pictures(root)
    return Dataset(root, "folder", records)


def picture_files(root: Path) -> list[Path]:
    """All pictures below `root` by their names, sorted by path. Links are followed, each folder once.

    Passed over are hidden ones, the masks of a labelled layout (ground_truth/ beside test/), and what a run
    drew into a run folder that lies there.
    """
    return sorted(_walk(root), key=Path.as_posix)


def _walk(root: Path) -> Iterator[Path]:
    seen = set()
    for folder, inner, names in os.walk(root, onerror=_cannot_list, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above, or to one seen already
            inner.clear()
            continue
        seen.add(real)
        others = {"ground_truth"} if "test" in inner else set()
        if RUN_JSON in names and _is_run(Path(folder)):
            others |= _DRAWN
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in others)
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURE_SUFFIXES:
                yield Path(folder) / name


def _is_run(folder: Path) -> bool:
    """Whether the folder's run.json is one of Fettle's."""
    try:
        with (folder / RUN_JSON).open("rb") as file:
            return f'"{RUN_FORMAT}"'.encode() in file.read(64)
    except OSError:
        return False


def _cannot_list(error: OSError) -> NoReturn:
    raise DataError(f"'{error.filename}' can't be listed: {error.strerror}.", "Check its permissions.")


def subfolders(root: Path) -> list[Path]:
    """The folders directly in `root`, hidden ones left out, sorted."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def check_folder(root: Path) -> None:
    """Refuse what is not a folder with something in it. Raises DataError."""
    if not root.exists():
        raise DataError(f"'{root}' does not exist.", "Check the path.")
    if not root.is_dir():
        raise DataError(f"'{root}' is a file where a folder is meant.", "Name the folder that holds it.")
    try:
        empty = next(root.iterdir(), None) is None
    except OSError as error:
        _cannot_list(error)
    if empty:
        raise DataError(f"The folder '{root}' is empty.", "Put pictures into it.")


def no_pictures(root: Path) -> DataError:
    """The refusal of a folder in which no file is named like a picture."""
    endings = ", ".join(sorted(PICTURE_SUFFIXES))
    return DataError(f"The folder '{root}' holds no pictures.", f"Pictures are files that end in {endings}.")


def folder_name(root: Path) -> str:
    """The folder's own name, also where it is given as '.' or with '..'."""
    return root.resolve().name
