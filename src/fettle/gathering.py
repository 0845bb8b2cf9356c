"""The good pictures of a data set: hashed, each content once, grouped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from fettle.datasets.few_shot import few_shot_order
from fettle.datasets.records import Dataset
from fettle.datasets.splits import group_column, groups
from fettle.errors import DataError, PictureError
from fettle.feature_stream import GoodPicture
from fettle.images.decode import picture_size, read_picture
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

    def few(self, shots: int, seed: int) -> GatheredPictures:
        """The same with `shots` pictures of each product alone, the first readable ones in their order.

        Raises:
            DataError: a product has fewer.
        """
        by_product: dict[str, dict[str, GoodPicture]] = {}
        for picture in self.pictures:
            by_product.setdefault(picture.product, {})[picture.key] = picture
        refused = [*self.refused]
        chosen: set[str] = set()
        for product, own in sorted(by_product.items()):
            _check_enough(shots, len(own), product)
            ordered = (own[key] for key in few_shot_order(list(own), seed))
            first = list(islice(_readable(ordered, refused), shots))
            _check_enough(shots, len(first), product)
            chosen |= {picture.key for picture in first}
        return replace(
            self,
            pictures=[picture for picture in self.pictures if picture.key in chosen],
            sizes={key: size for key, size in self.sizes.items() if key in chosen},
            refused=refused,
        )


def _readable(pictures: Iterable[GoodPicture], refused: list[Refusal]) -> Iterator[GoodPicture]:
    """Those that can be decoded; the others join `refused`."""
    for picture in pictures:
        try:
            read_picture(picture.path)
        except PictureError as error:
            refused.append(Refusal(str(picture.path), str(error)))
        else:
            yield picture


def _check_enough(shots: int, number: int, product: str) -> None:
    if shots > number:
        whose = f" of product '{product}'" if product else ""
        remedy = f"Use --shots {number} or fewer, or give more" if number else "Give"
        raise DataError(
            f"{shots} shots are asked for, but there are only {number} distinct good pictures{whose}.",
            f"{remedy} good pictures.",
        )


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
