"""A split into training and test for a product that comes without one: by content, whole groups at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from fettle.datasets.records import Record
from fettle.datasets.splits import hold_out
from fettle.errors import DataError, PictureError
from fettle.images.decode import file_sha256

TEST_SHARE = 1 / 3  # of the good pictures


def split_by_groups(records: Sequence[Record], groups: Sequence[str]) -> list[Record]:
    """The records, in their order, each with the split "train" or "test".

    All defective pictures are for testing, and so is each group that holds one. Of the other groups
    whole ones are held out for testing, in the order of their contents' hashes, until about a third
    of the good pictures is. No group and no equal file stands on two sides. One group that holds all
    good pictures is for training.

    Args:
        records: of one product.
        groups: one a record: pictures of equal group stay together.
    """
    keys = [_key(record) for record in records]
    tested = _beside_a_defect(records, keys, groups)
    free = [i for i in range(len(records)) if i not in tested]
    num_good = sum(record.is_good for record in records)
    wanted = TEST_SHARE * num_good - (num_good - len(free))  # good ones beside a defect are in test already
    if wanted > 0:
        with suppress(DataError):  # one group only: it is learnt from
            chosen = hold_out([keys[i] for i in free], [groups[i] for i in free], wanted / len(free))
            tested |= {i for i, out in zip(free, chosen, strict=True) if out}
    return [replace(record, split="test" if i in tested else "train") for i, record in enumerate(records)]


def _beside_a_defect(records: Sequence[Record], keys: Sequence[str], groups: Sequence[str]) -> set[int]:
    """Indices of the defective pictures and of all that share a group or a content with one of them,
    also through others."""
    found: set[int] = set()
    more = {i for i, record in enumerate(records) if not record.is_good}
    while more - found:
        found |= more
        near_groups, near_keys = {groups[i] for i in found}, {keys[i] for i in found}
        more = {i for i in range(len(records)) if groups[i] in near_groups or keys[i] in near_keys}
    return found


def _key(record: Record) -> str:
    """Hash of the content; the name where the file can't be read: opening never fails for one file."""
    try:
        return file_sha256(record.path)
    except PictureError:
        return record.path.name
