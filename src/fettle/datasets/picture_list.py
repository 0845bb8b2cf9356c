"""The pictures that a command line names: files, folders, manifests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fettle.datasets.folder import open_folder
from fettle.datasets.manifest import open_manifest
from fettle.datasets.open import detect_layout, open_dataset
from fettle.errors import UsageError


def list_pictures(paths: Iterable[Path]) -> list[Path]:
    """Pictures in the order of `paths`; a folder's are taken recursively, sorted, masks left out.

    A file is taken as it is, whatever its name: reading it decides.

    Raises:
        UsageError: a path that does not exist. DataError: a folder without pictures.
    """
    pictures: list[Path] = []
    for path in paths:
        if path.is_dir():
            # In these, masks and depth lie among the pictures; in others, loose pictures are taken, too.
            labelled = detect_layout(path) in ("magnetic_tile", "visa", "mvtec3d")
            dataset = open_dataset(path) if labelled else open_folder(path)
            pictures += [record.path for record in dataset.records]
        elif path.suffix.lower() == ".csv":
            pictures += [record.path for record in open_manifest(path).records]
        elif path.exists():
            pictures.append(path)
        else:
            raise UsageError(f"There is no {path}.", "Name pictures, folders of pictures, or manifests.")
    return pictures
