"""The layout of MVTec AD: train/good, test/good, test/DEFECT and ground_truth/DEFECT.

Paul Bergmann et al., "MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly
Detection", CVPR 2019.
"""

from __future__ import annotations

from pathlib import Path

from fettle.datasets.folder import check_folder, folder_name, no_pictures, picture_files, subfolders
from fettle.datasets.records import GOOD, Dataset, Record
from fettle.errors import DataError

_MASK_ENDING = "_mask"


def looks_like_mvtec(root: Path) -> bool:
    """Whether a folder has train/ beside test/, or train/good alone."""
    return (root / "train" / GOOD).is_dir() or ((root / "train").is_dir() and (root / "test").is_dir())


def open_mvtec(root: Path) -> Dataset:
    """Read one product.

    The mask of test/DEFECT/NAME is ground_truth/DEFECT/NAME_mask, or else NAME, by the exact name
    whatever its ending. A defective picture without one has `mask=None`. The product is the
    folder's name.

    Raises:
        DataError: no folder, no pictures, pictures that stand outside good/ and DEFECT/, or
            training folders other than good/.
    """
    check_folder(root)
    if not looks_like_mvtec(root) and not (root / "test").is_dir():
        raise DataError(
            f"'{root}' has neither train/{GOOD} nor test/.",
            "Name the product's own folder, or use the layout 'folder'.",
        )
    product = folder_name(root)
    records: list[Record] = []
    for split in ("train", "test"):
        for folder in _label_folders(root / split):
            pictures = picture_files(folder)
            masks = _masks(root / "ground_truth" / folder.name, pictures) if folder.name != GOOD else {}
            records += [Record(path, folder.name, masks.get(path), split, product) for path in pictures]
    if not records:
        raise no_pictures(root)
    return Dataset(root, "mvtec", tuple(sorted(records, key=lambda record: record.path.as_posix())))


def _label_folders(part: Path) -> list[Path]:
    """good/ and the defects' folders in train/ or test/; anything that has no label is refused."""
    if not part.is_dir():
        return []
    folders = subfolders(part)
    loose = len(picture_files(part)) - sum(len(picture_files(folder)) for folder in folders)
    if loose > 0:
        raise DataError(
            f"{loose} pictures stand directly in '{part}', so their label is not known.",
            f"Move them to '{part.name}/{GOOD}'" + (" or to 'test/DEFECT'." if part.name == "test" else "."),
        )
    wrong = [folder.name for folder in folders if folder.name != GOOD and picture_files(folder)]
    if part.name == "train" and wrong:
        raise DataError(
            f"'{part}' holds '{wrong[0]}', but only good pictures are learnt from.",
            f"Move it to 'test/{wrong[0]}'.",
        )
    return folders


def _masks(folder: Path, pictures: list[Path]) -> dict[Path, Path]:
    """The mask of each picture that has one. NAME_mask goes first: with pictures `1` and `1_mask`
    in one folder, `1_mask.png` is the mask of `1`."""
    if not folder.is_dir():
        return {}
    by_stem = {path.stem: path for path in picture_files(folder)}
    found = {p: by_stem[p.stem + _MASK_ENDING] for p in pictures if p.stem + _MASK_ENDING in by_stem}
    taken = set(found.values())
    for picture in pictures:
        mask = by_stem.get(picture.stem)
        if picture not in found and mask is not None and mask not in taken:
            found[picture] = mask
    return found
