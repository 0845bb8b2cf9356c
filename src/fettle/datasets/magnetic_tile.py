"""The layout of the magnetic tile set: MT_NAME/Imgs/*.jpg, each with a mask of the same name in PNG.

Yibin Huang, Congying Qiu, Kui Yuan, "Surface defect saliency of magnetic tile", The Visual
Computer 36, 2020.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fettle.datasets.folder import check_folder, folder_name, no_pictures, picture_files, subfolders
from fettle.datasets.own_split import split_by_groups
from fettle.datasets.records import GOOD, Dataset, Record
from fettle.errors import DataError

NEIGHBOUR_GAP = 500
_PREFIX = "MT_"
_NUMBER = re.compile(r"exp\d+_num_(\d+)$")


def looks_like_magnetic_tile(root: Path) -> bool:
    """Whether a folder has folders named MT_*."""
    return any(folder.name.startswith(_PREFIX) for folder in subfolders(root))


def open_magnetic_tile(root: Path) -> Dataset:
    """Read the set. It has no split of its own; this one is made here, by groups.

    One tile was photographed at up to six exposures, and its pictures are nearly the same, so a
    split by single pictures would put a tile on both sides. Its exposures have neighbouring numbers
    in their names (`exp3_num_4711`): sorted by number, pictures whose numbers differ by at most
    `NEIGHBOUR_GAP` from the one before form one group, and `split_by_groups` splits by them. The
    group is kept in the column "group". The rule is cheap and finds most tiles, not all: where a
    manifest names the tiles, use the manifest.

    Raises:
        DataError: no folder, no MT_* in it, or no pictures.
    """
    check_folder(root)
    kinds = [folder for folder in subfolders(root) if folder.name.startswith(_PREFIX)]
    if not kinds:
        raise DataError(f"'{root}' has no folders named MT_*.", "Name the folder that holds MT_Free.")
    product = folder_name(root)
    records: list[Record] = []
    for folder in kinds:
        kind = folder.name.removeprefix(_PREFIX).lower()
        defect = GOOD if kind == "free" else kind
        files = picture_files(folder / "Imgs")
        masks = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".png"}
        for path in files:
            if path.suffix.lower() != ".png":
                mask = None if defect == GOOD else masks.get(path.with_suffix(""))
                records.append(Record(path, defect, mask, "", product))
    if not records:
        raise no_pictures(root)
    records.sort(key=lambda record: record.path.as_posix())
    return Dataset(root, "magnetic_tile", tuple(_split(records)))


def _split(records: list[Record]) -> list[Record]:
    """The records with split and group filled in."""
    groups = neighbour_groups([record.path.stem for record in records])
    return [
        replace(record, columns={"group": group})
        for record, group in zip(split_by_groups(records, groups), groups, strict=True)
    ]


def neighbour_groups(names: list[str]) -> list[str]:
    """The group of each file name by the rule in `open_magnetic_tile`; other names stand alone."""
    numbers = [int(match[1]) if (match := _NUMBER.search(name)) else None for name in names]
    groups = [f"name {name}" for name in names]
    first = last = -NEIGHBOUR_GAP - 1
    for number, index in sorted((number, i) for i, number in enumerate(numbers) if number is not None):
        if number - last > NEIGHBOUR_GAP:
            first = number
        groups[index] = f"num {first}"
        last = number
    return groups
