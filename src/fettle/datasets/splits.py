"""Deterministic splits by the hash of content, and by group: pure functions over strings.

A split never depends on the order in which a folder lists its files. Pictures of one group (the
same part, lot, ...) never stand on two sides, nor do pictures of equal content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fettle.datasets.records import Dataset, Record
from fettle.errors import DataError, UsageError, nearest_name

GROUP_COLUMNS = ("tile", "group", "lot")


def group_column(dataset: Dataset, asked: str | None = None) -> str | None:
    """The column that says which pictures belong together.

    Args:
        dataset: the records with their columns.
        asked: the column's name; None looks for "tile", "group" and "lot", in this order.

    Returns:
        The column's name, or None where nothing was asked for and no such column is filled.

    Raises:
        UsageError: the column asked for does not exist.
    """
    known = {name for record in dataset.records for name, value in record.columns.items() if value}
    if asked is None:
        return next((name for name in GROUP_COLUMNS if name in known), None)
    if asked not in known:
        hint = nearest_name(asked, known) if known else "The data set has no further columns."
        raise UsageError(f"'{dataset.root}' has no column '{asked}' to group by.", hint)
    return asked


def groups(records: Sequence[Record], column: str | None) -> list[str]:
    """The group of each record, in the records' order. Without a column, or where its value is
    empty, a picture is a group of its own."""
    values = [record.columns.get(column, "") if column else "" for record in records]
    return [
        f"{column}={value}" if value else f"path={record.path.as_posix()}"
        for record, value in zip(records, values, strict=True)
    ]


def hold_out(keys: Sequence[str], groups: Sequence[str], share: float, purpose: str = "") -> list[bool]:
    """Choose whole groups until about `share` of the pictures is held out.

    Groups are taken in the order of their hashes, each as long as it brings the number of pictures
    nearer to the share. At least one group is held out, and at least one is not.

    Args:
        keys: one a picture: the hash of its content.
        groups: one a picture: pictures of equal group stay together.
        share: of the pictures, between 0 and 1.
        purpose: another word gives another split.

    Returns:
        One bool a picture, True where it is held out.

    Raises:
        UsageError: the share is not between 0 and 1.
        DataError: fewer than two groups.
    """
    if not 0 < share < 1:
        raise UsageError(f"The share to hold out is {share:g}.", "Choose one between 0 and 1.")
    members = _members(keys, groups, purpose)
    if len(members) < 2:
        raise DataError(
            f"{len(keys)} pictures in {len(members)} group can't be split in two.",
            "Add good pictures of other parts, or name another group column.",
        )
    wanted = share * len(keys)
    held: list[int] = []
    num_held = 0
    for group in members:
        nearer = abs(len(held) + len(group) - wanted) < abs(len(held) - wanted)
        if nearer and num_held < len(members) - 1:
            held += group
            num_held += 1
    if not held:
        held = members[0]
    chosen = set(held)
    return [i in chosen for i in range(len(keys))]


def folds(keys: Sequence[str], groups: Sequence[str], num_folds: int, purpose: str = "") -> list[int]:
    """The fold, 0 to num_folds - 1, of each picture; groups stay together.

    Groups are dealt in the order of their hashes, each to the fold with the fewest pictures.

    Raises:
        UsageError: fewer than two folds.
        DataError: fewer groups than folds.
    """
    if num_folds < 2:
        raise UsageError(f"{num_folds} folds were asked for.", "Choose two or more.")
    members = _members(keys, groups, purpose)
    if len(members) < num_folds:
        raise DataError(
            f"{len(members)} groups of pictures can't fill {num_folds} folds.",
            "Choose fewer folds, or add good pictures of other parts.",
        )
    counts = [0] * num_folds
    result = [0] * len(keys)
    for group in members:
        fold = counts.index(min(counts))
        counts[fold] += len(group)
        for index in group:
            result[index] = fold
    return result


def _members(keys: Sequence[str], groups: Sequence[str], purpose: str) -> list[list[int]]:
    """Indices of the pictures of each group, groups in the order of their hashes.

    Groups that share a key are merged: equal pictures must not stand on two sides. A group's hash
    is the smallest of its pictures', so it does not depend on how the group is called.
    """
    if len(keys) != len(groups):
        raise UsageError(f"There are {len(keys)} keys and {len(groups)} groups.", "Give one group a picture.")
    parent: dict[str, str] = {}

    def top(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for key, group in zip(keys, groups, strict=True):
        parent[top(f"key {key}")] = top(f"group {group}")
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(top(f"group {group}"), []).append(index)
    hashes = [hashlib.sha256(f"{purpose}/{key}".encode()).hexdigest() for key in keys]
    return sorted(members.values(), key=lambda group: min(hashes[i] for i in group))
