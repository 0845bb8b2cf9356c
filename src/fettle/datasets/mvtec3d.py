"""The layout of MVTec 3D-AD: train, validation and test, each with DEFECT/rgb, DEFECT/xyz and DEFECT/gt.

Paul Bergmann et al., "The MVTec 3D-AD Dataset for Unsupervised 3D Anomaly Detection and
Localization", VISAPP 2022.
"""

from __future__ import annotations

from pathlib import Path

from fettle.datasets.folder import check_folder, folder_name, no_pictures, picture_files, subfolders
from fettle.datasets.records import GOOD, Dataset, Record
from fettle.errors import DataError

VALIDATION = "validation"
_PARTS = ("train", VALIDATION, "test")


def looks_like_mvtec3d(root: Path) -> bool:
    """Whether a folder has train/DEFECT/rgb, and no ground_truth/ as the layout "mvtec" has."""
    train = root / "train"
    has_colour = train.is_dir() and any((folder / "rgb").is_dir() for folder in subfolders(train))
    return has_colour and not (root / "ground_truth").is_dir()


def open_mvtec3d(root: Path) -> Dataset:
    """Read the colour pictures of one product; the points beside them are named, not read.

    The picture is rgb/NNN.png, its mask gt/NNN.png, and the path of xyz/NNN.tiff is kept in the
    column "xyz" where there is such a file. Good pictures have no mask (theirs in gt/ are all zero);
    a defective picture without one has `mask=None`. The product is the folder's name.

    The set's validation part is good, but not for learning, and not for testing either: its split is
    "validation", so that `Dataset.good_for_training` and `for_testing` both leave it out. Fettle holds
    pictures out of the training part by itself.

    Raises:
        DataError: no folder, no pictures in rgb/, pictures that stand outside DEFECT/rgb, xyz or gt,
            or defects in train/ or validation/.
    """
    check_folder(root)
    if not looks_like_mvtec3d(root) and not any(_rgb_folders(root / part) for part in _PARTS):
        raise DataError(f"'{root}' has no train/{GOOD}/rgb.", "Name the product's own folder.")
    product = folder_name(root)
    records: list[Record] = []
    for part in _PARTS:
        for rgb in _rgb_folders(root / part):
            defect = rgb.parent.name
            pictures = picture_files(rgb)
            if defect != GOOD and part != "test" and pictures:
                raise DataError(
                    f"'{root / part}' holds '{defect}', but only good pictures may stand there.",
                    f"Move it to 'test/{defect}'.",
                )
            records += [_record(rgb.parent, path, part, product) for path in pictures]
    if not records:
        raise no_pictures(root)
    return Dataset(root, "mvtec3d", tuple(sorted(records, key=lambda record: record.path.as_posix())))


def _rgb_folders(part: Path) -> list[Path]:
    """DEFECT/rgb of every DEFECT in train/, validation/ or test/; pictures elsewhere in it are refused."""
    if not part.is_dir():
        return []
    folders = subfolders(part)
    known = tuple((folder / kind).as_posix() + "/" for folder in folders for kind in ("rgb", "xyz", "gt"))
    loose = [path for path in picture_files(part) if not path.as_posix().startswith(known)]
    if loose:
        raise DataError(
            f"'{loose[0]}' stands outside of DEFECT/rgb, DEFECT/xyz and DEFECT/gt.",
            f"Move it to '{part.name}/{GOOD}/rgb'"
            + (" or to 'test/DEFECT/rgb'." if part.name == "test" else "."),
        )
    return [folder / "rgb" for folder in folders if (folder / "rgb").is_dir()]


def _record(folder: Path, path: Path, part: str, product: str) -> Record:
    mask = folder / "gt" / path.name
    points = folder / "xyz" / f"{path.stem}.tiff"
    return Record(
        path,
        folder.name,
        mask if folder.name != GOOD and mask.is_file() else None,
        part,
        product,
        {"xyz": points.as_posix()} if points.is_file() else {},
    )
