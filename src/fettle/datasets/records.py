"""Record and Dataset: what every layout is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

GOOD = "good"


@dataclass(frozen=True)
class Record:
    """One picture of a data set, with what is known of it.

    Attributes:
        path: the picture's file.
        defect: "good", or the defect's name ("defective" where it has none).
        mask: the defect mask's file, None for a good picture or where there is none.
        split: "train", "test", "validation" (used for neither), or "" where the layout has no split.
        product: the product's name, "" where the layout has none.
        columns: further columns of a manifest, kept as they are.
    """

    path: Path
    defect: str = GOOD
    mask: Path | None = None
    split: str = ""
    product: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return self.defect == GOOD


@dataclass(frozen=True)
class Dataset:
    """The records of one folder or manifest, sorted by path.

    Attributes:
        root: the folder, or the manifest's file.
        layout: how it was read, a name in `open.LAYOUTS`, or "products" for several.
        records: every picture, sorted by path.
    """

    root: Path
    layout: str
    records: tuple[Record, ...]

    def good_for_training(self) -> tuple[Record, ...]:
        """Good pictures of the training part; all good ones where the layout has no split."""
        return tuple(r for r in self.records if r.is_good and r.split in ("train", ""))

    def for_testing(self) -> tuple[Record, ...]:
        """The test part; everything where the layout has no split."""
        return tuple(r for r in self.records if r.split in ("test", ""))
