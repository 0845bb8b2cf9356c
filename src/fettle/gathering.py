"""The good pictures of a data set: hashed, each content once, grouped."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fettle.datasets.records import Dataset
from fettle.datasets.splits import group_column, groups
from fettle.errors import DataError, PictureError
from fettle.feature_stream import GoodPicture
from fettle.images.decode import picture_size
from fettle.inspection import Refusal
from fettle.protocols import Progress


@dataclass(frozen=True)
class GatheredPictures:
    """Distinct good pictures, with their sizes (height, width) by key, and what was left out."""

    pictures: list[GoodPicture]
    sizes: dict[str, tuple[int, int]]
    column: str | None
    num_duplicates: int
    refused: list[Refusal]


def gather_good(
    dataset: Dataset, group: str | None, progress: Progress, *, by_product: bool = False
) -> GatheredPictures:
    """The good training pictures of a data set: hashed, deduplicated, grouped.

    Equal files count once: a copy is no further evidence, and would break the promise.

    Args:
        group: column of pictures that belong together. by_product: keep each picture's product; a group is
            then one within its product.

    Raises:
        DataError: none is left.
    """
    column = group_column(dataset, group)
    records = dataset.good_for_training()
    pictures: dict[str, GoodPicture] = {}
    sizes: dict[str, tuple[int, int]] = {}
    refused: list[Refusal] = []
    num_duplicates = 0
    for done, (record, own_group) in enumerate(zip(records, groups(records, column), strict=True), 1):
        progress("reading", done, len(records))
        try:
            size = picture_size(record.path)
            key = hashlib.sha256(record.path.read_bytes()).hexdigest()
        except (PictureError, OSError) as error:
            refused.append(Refusal(str(record.path), str(error)))
            continue
        product = record.product if by_product else ""
        own_group = f"{product}/{own_group}" if product else own_group
        num_duplicates += key in pictures
        if key not in pictures or own_group < pictures[key].group:  # not: the first that is listed
            pictures[key] = GoodPicture(record.path, key, own_group, product)
        sizes[key] = size
    if not pictures:
        first = f" The first refusal: {refused[0].reason}" if refused else ""
        raise DataError(
            f"There is no good picture to learn from in {dataset.root}.{first}",
            "Give a folder of good pictures, or a labelled layout with a training part.",
        )
    return GatheredPictures(list(pictures.values()), sizes, column, num_duplicates, refused)
