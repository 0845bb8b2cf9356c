"""The layout of VisA: OBJECT/Data/Images and Data/Masks, with the official split in split_csv/1cls.csv.

Yang Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
Segmentation", ECCV 2022.
"""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from fettle.datasets.folder import check_folder
from fettle.datasets.records import GOOD, Dataset, Record
from fettle.datasets.table import Row, read_table
from fettle.errors import DataError, nearest_name

_SPLIT_FILE = Path("split_csv") / "1cls.csv"
_COLUMNS = ("object", "split", "label", "image", "mask")
_DEFECTS = {"normal": GOOD, "anomaly": "defective"}  # the split file names no kinds of defect
_SPLITS = ("train", "test")


def looks_like_visa(root: Path) -> bool:
    """Whether a folder has split_csv/1cls.csv."""
    return (root / _SPLIT_FILE).is_file()


def looks_like_visa_object(root: Path) -> bool:
    """Whether a folder is one object's: its anomalous pictures stand beside the normal ones, and the
    split stands elsewhere."""
    return (root / "Data" / "Images" / "Anomaly").is_dir()


def open_visa(root: Path) -> Dataset:
    """Read every object by the split for learning from normal pictures only; an object is a product.

    Masks are the set's own: small numbers of classes, where all but 0 is defect. Columns of the split
    file beyond its five are kept in `Record.columns`.

    Args:
        root: the folder that holds split_csv.

    Raises:
        DataError: no split file, a column of it is missing, or a row that can't be meant: an unknown
            split or label, a path that leaves the root, a picture or mask that does not exist, a
            normal picture with a mask or an anomalous one without. The message names the line.
    """
    check_folder(root)
    file = root / _SPLIT_FILE
    if not file.is_file():
        raise DataError(
            f"'{root}' has no {_SPLIT_FILE.as_posix()}.", "Name the folder that VisA was unpacked into."
        )
    records: list[Record] = []
    lines: dict[Path, int] = {}
    for row in read_table(file, _COLUMNS, "split file"):
        record = _record(root, row)
        if record.path in lines:
            raise DataError(
                f"{row.at}: '{row.values['image']}' stands in line {lines[record.path]} already.",
                "Delete one of the two rows.",
            )
        lines[record.path] = row.line
        records.append(record)
    if not records:
        raise DataError(f"The split file '{file}' has no rows.", "Take the one that comes with VisA.")
    return Dataset(root, "visa", tuple(sorted(records, key=lambda record: record.path.as_posix())))


def _record(root: Path, row: Row) -> Record:
    values = row.values
    if not values["object"]:
        raise DataError(f"{row.at}: the object is empty.", "Write the product's name.")
    for column, known in (("split", _SPLITS), ("label", tuple(_DEFECTS))):
        if values[column] not in known:
            raise DataError(
                f"{row.at}: the {column} '{values[column]}' is unknown.", nearest_name(values[column], known)
            )
    defect = _DEFECTS[values["label"]]
    if (defect == GOOD) != (not values["mask"]):
        what = "normal, but has a mask" if defect == GOOD else "anomalous, but has no mask"
        raise DataError(f"{row.at}: the picture is {what}.", "Correct its label or its mask.")
    if defect != GOOD and values["split"] == "train":
        raise DataError(
            f"{row.at}: an anomalous picture is in the split 'train', but only good ones are learnt from.",
            "Write 'test'.",
        )
    path = _inside(root, row, "image")
    mask = _inside(root, row, "mask") if values["mask"] else None
    columns = {name: value for name, value in values.items() if name not in _COLUMNS}
    return Record(path, defect, mask, values["split"], values["object"], columns)


def _inside(root: Path, row: Row, column: str) -> Path:
    """The path in a column: a file below the root. The set comes from elsewhere, so it may not lead out."""
    value = row.values[column]
    parted = PureWindowsPath(value)  # splits at either slash, and knows drives
    if parted.anchor or ".." in parted.parts:
        raise DataError(
            f"{row.at}: the {column} '{value}' leaves the folder '{root}'.",
            "Write it relative to that folder, without '..'.",
        )
    path = root / value
    try:
        exists = path.is_file()
    except ValueError:  # a NUL inside
        exists = False
    if not exists:
        raise DataError(
            f"{row.at}: the {column} '{value}' does not exist.",
            f"Unpack VisA anew; paths are relative to '{root}'.",
        )
    return path
