"""Several products as one `Dataset`, for one model of all of them: `open_products`, `merge_datasets`."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fettle.datasets.folder import check_folder, subfolders
from fettle.datasets.mvtec3d import VALIDATION
from fettle.datasets.open import detect_layout, open_dataset
from fettle.datasets.own_split import split_by_groups
from fettle.datasets.records import Dataset, Record
from fettle.datasets.splits import group_column, groups
from fettle.errors import DataError, UsageError, nearest_name
from fettle.images.decode import PICTURE_SUFFIXES

MANIFEST = "manifest.csv"  # in a product's folder, it says what is in it
SPLIT_MADE = "split_made"  # the column of records whose product has no split of its own
_WHOLE = "none"  # its values: all is for training,
_BY_CONTENT = "by content"  # or held out by `split_by_groups`
# Folders that part one product's pictures. As products, defects and masks would pass for good pictures.
_PARTS = frozenset(
    (
        *("train", "test", "validation", "ground_truth", "images", "masks"),
        *("good", "bad", "ok", "normal", "anomaly", "defective"),
    )
)


def open_products(root: Path, products: Sequence[str] = (), *, missing_ok: bool = False) -> Dataset:
    """Read several products into one data set, every record with its product's name.

    `root` is one of:

    - a folder with one folder a product, each in any layout that `open_dataset` finds by itself, or with
      a `manifest.csv` in it, which then says what belongs to it. The product is the folder's name. Hidden
      and empty folders are passed over, files beside the folders too, if they are no pictures;
    - a manifest in which every row names its product;
    - VisA.

    See `merge_datasets` for products without a split of their own, and `product_notes` for what to tell.

    Args:
        root: the folder, or the manifest's file.
        products: names of those to read; empty for all. Folders that aren't chosen are not looked into.
        missing_ok: take those of `products` that are there; at least one must be.

    Raises:
        UsageError: a product that is not there.
        DataError: `root` is one product, not several, or holds none; a product that can't be read (the
            message names it); rows of a manifest without a product.
    """
    root = Path(root)
    if root.is_file():
        return _from_one_list(root, products, missing_ok)
    check_folder(root)
    layout = detect_layout(root)
    if layout == "visa":
        return _from_one_list(root, products, missing_ok)
    _check_several(root, layout)
    folders = {folder.name: folder for folder in subfolders(root) if _listed(folder)}
    if not folders:
        raise DataError(f"'{root}' holds no folders of products.", "Make one folder a product in it.")
    chosen = _choose(root, products, folders, missing_ok)
    return merge_datasets({name: _open_product(folders[name]) for name in chosen}, root)


def merge_datasets(named: Mapping[str, Dataset], root: Path | None = None) -> Dataset:
    """One data set of several, each of which becomes the product of the name given.

    A product without a split gets one here, since training and test may not share a picture: where it
    has defective pictures, they are for testing, and good ones are held out beside them, whole groups
    (see `split_by_groups`); where it has good ones only, all are for training. The split depends on the
    product's own files alone, not on their places or on other products.

    Each product is grouped by its own column (see `group_column`). Where they differ, the groups are
    copied into one column, the one that `group_column` finds in the whole.

    Args:
        named: product name to its data set, of one product each.
        root: what messages shall call the whole; None takes the folder above all of them.

    Returns:
        Layout "products", sorted by path.

    Raises:
        DataError: nothing to merge, no name, a data set of several products, one with a split for some
            pictures only, or a picture that stands in two products.
    """
    if not named:
        raise DataError("No products were given to merge.", "Name at least one.")
    records: list[Record] = []
    columns: dict[str, str] = {}
    for name, dataset in named.items():
        _check_one_product(name, dataset)
        own = group_column(dataset)
        if own is not None:
            columns[name] = own
        records += [replace(record, product=name) for record in _with_split(name, dataset, own)]
    _check_no_picture_twice(records)
    records.sort(key=lambda record: record.path.as_posix())
    if root is None:
        root = Path(os.path.commonpath([dataset.root.absolute() for dataset in named.values()]))
    merged = Dataset(root, "products", tuple(records))
    if len(set(columns.values())) < 2:
        return merged
    # One column for all. Values of two products may be equal; who splits the whole keeps products apart.
    target = group_column(merged)
    return replace(merged, records=tuple(_regrouped(r, columns.get(r.product), target) for r in records))


def product_notes(dataset: Dataset) -> list[str]:
    """What a user should know of a data set of products, a sentence each.

    That is: a split that was made here; good pictures that are neither for training nor for testing;
    and products with nothing to learn from, or nothing to test on.
    """
    by_product: dict[str, list[Record]] = defaultdict(list)
    for record in dataset.records:
        by_product[record.product].append(record)
    notes = []
    for name, records in sorted(by_product.items()):
        own = replace(dataset, records=tuple(records))
        train, test = len(own.good_for_training()), Counter(r.is_good for r in own.for_testing())
        made = records[0].columns.get(SPLIT_MADE)
        if made == _WHOLE:
            notes.append(f"'{name}' has good pictures only and no split: all {train} are to learn from.")
            continue
        if made == _BY_CONTENT:
            notes.append(
                f"'{name}' has no split of its own. One was made by contents, groups kept whole: "
                f"{train} good ones to learn from, {test[True]} good and {test[False]} defective to test on."
            )
        validation = sum(r.split == VALIDATION for r in records)
        if validation:
            notes.append(f"'{name}' has {validation} pictures for validation: they are left out.")
        if not train:
            notes.append(f"'{name}' has no good picture to learn from.")
        if not test:
            notes.append(f"'{name}' has no picture to test on.")
    return notes


# --- one list for all -----------------------------------------------------------------------------


def _from_one_list(root: Path, products: Sequence[str], missing_ok: bool) -> Dataset:
    """A manifest, or VisA: one data set that names the product of each picture."""
    dataset = open_dataset(root)
    unnamed = sum(not record.product for record in dataset.records)
    if unnamed == len(dataset.records):
        raise DataError(
            f"'{root}' names no products, so it is one product.",
            "Fill its column 'product', or leave --multi-class away.",
        )
    if unnamed:
        first = next(record.path for record in dataset.records if not record.product)
        raise DataError(
            f"'{root}' names no product for {unnamed} pictures, such as '{first}'.",
            "Fill its column 'product' in every row.",
        )
    by_product: dict[str, list[Record]] = defaultdict(list)
    for record in dataset.records:
        by_product[record.product].append(record)
    chosen = _choose(root, products, by_product, missing_ok)
    return merge_datasets({n: replace(dataset, records=tuple(by_product[n])) for n in chosen}, root)


def _choose(root: Path, asked: Sequence[str], known: Iterable[str], missing_ok: bool) -> list[str]:
    """The products asked for, sorted; all where none is."""
    names = set(known)
    if missing_ok and names & set(asked):
        return sorted(names & set(asked))
    for name in asked:
        if name not in names:
            raise UsageError(f"'{root}' has no product '{name}'.", nearest_name(name, names))
    return sorted(set(asked) or names)


# --- a folder of products -------------------------------------------------------------------------


def _check_several(root: Path, layout: str | None) -> None:
    """Refuse a folder that is itself one product, or whose pictures have no product."""
    if (root / MANIFEST).is_file():
        raise DataError(
            f"'{root}' has a {MANIFEST} of its own.",
            f"Name it: '{root / MANIFEST}', with its column 'product'.",
        )
    folders = subfolders(root)
    part = next((folder.name for folder in folders if folder.name.lower() in _PARTS), None)
    loose = sum(path.suffix.lower() in PICTURE_SUFFIXES and path.is_file() for path in _listed(root))
    if not layout and not part and loose and any(_listed(folder) for folder in folders):
        raise DataError(
            f"{loose} pictures stand directly in '{root}', so their product is not known.",
            "Move them into their product's folder; or, if all is one product, leave --multi-class away.",
        )
    if layout or part or loose:
        has = f"the layout '{layout}'" if layout else f"a folder '{part}'" if part else "pictures of its own"
        raise DataError(
            f"'{root}' is itself one product: it has {has}.",
            "To fit it, leave --multi-class away; to evaluate or calibrate, name it with --product; or "
            f"give the folder above it, '{root.absolute().parent}'.",
        )


def _listed(folder: Path) -> list[Path]:
    """What stands directly in a folder, hidden files and folders left out."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"'{folder}' can't be listed: {error.strerror}.", "Check its permissions.") from None


def _open_product(folder: Path) -> Dataset:
    """Read one product's folder; the refusal names it."""
    manifest = folder / MANIFEST
    try:
        return open_dataset(manifest if manifest.is_file() else folder)
    except DataError as error:
        raise DataError(
            f"'{folder.name}' can't be read as a product: {error.what}",
            f"{error.remedy} Or leave it out by naming the other products.",
        ) from error


# --- merging --------------------------------------------------------------------------------------


def _check_one_product(name: str, dataset: Dataset) -> None:
    if not name:
        raise DataError(f"The product of '{dataset.root}' has no name.", "Give it one.")
    inner = sorted({record.product for record in dataset.records})
    if len(inner) > 1:
        named = ", ".join(f"'{product}'" for product in inner)
        raise DataError(
            f"'{dataset.root}' holds several products ({named}), and '{name}' is to be one.",
            "Give each of them a data set of its own.",
        )


def _with_split(name: str, dataset: Dataset, column: str | None) -> list[Record]:
    """The records with a split, and marked where it was made here or by the layout."""
    records = list(dataset.records)
    without = sum(not record.split for record in records)
    if without and without < len(records):
        first = next(record.path for record in records if not record.split)
        raise DataError(
            f"{without} of {len(records)} pictures of '{name}' have no split, such as '{first}'.",
            "Write 'train' or 'test' for all of its pictures, or for none.",
        )
    if without and all(record.is_good for record in records):
        return [_marked(replace(record, split="train"), _WHOLE) for record in records]
    if without:
        records = split_by_groups(records, groups(records, column))
    elif dataset.layout != "magnetic_tile":  # which has none either: its reader makes one in the same way
        return records
    return [_marked(record, _BY_CONTENT) for record in records]


def _marked(record: Record, made: str) -> Record:
    return replace(record, columns={**record.columns, SPLIT_MADE: made})


def _check_no_picture_twice(records: Sequence[Record]) -> None:
    product_of: dict[str, str] = {}
    for record in records:
        place = os.path.realpath(record.path)
        other = product_of.setdefault(place, record.product)
        if other != record.product:
            raise DataError(
                f"'{record.path}' stands in two products, '{other}' and '{record.product}'.",
                "Leave one of them out.",
            )


def _regrouped(record: Record, own: str | None, target: str | None) -> Record:
    value = record.columns.get(own, "") if own else ""
    if target is None or not own or own == target:
        return record
    return replace(record, columns={**record.columns, target: value})
