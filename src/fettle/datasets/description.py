"""What `describe` says of a data set: plain data, as JSON and as text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from fettle.protocols import Json

SHOWN_FINDINGS = 20  # in the text; the JSON has all
SHOWN_SIZES = 5


@dataclass(frozen=True)
class Count:
    """Pictures of one product, split and label, and how many of them have a mask."""

    product: str
    split: str
    label: str
    pictures: int
    masks: int


@dataclass(frozen=True)
class Finding:
    """Something suspicious.

    Attributes:
        kind: "unreadable", "duplicate", "leakage", "near_duplicate", "mask_unreadable",
            "mask_empty", "mask_missing", "mask_orphan" or "good_with_mask". A mask of another size
            than its picture is "mask_size".
        message: one sentence.
        paths: the files that it is about.
    """

    kind: str
    message: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """Everything that `describe` found; `to_json` makes plain data of it.

    Attributes:
        root, layout: of the data set.
        counts: pictures by product, split and label.
        sizes: pictures by "WIDTHxHEIGHT", the most frequent first.
        modes: pictures by format, pixel layout and bits, such as "JPEG L 8-bit".
        findings: what is suspicious.
        trivial_scores: by product, the image AUROC of scores that look at no defect (None where
            the test part lacks good or defective pictures): "distance_to_mean", "nearest_pixels",
            "brightness", "contrast", "file_size", "height". High means defect.
        shift: by product, the same AUROC between good training and good test pictures (the two
            distances are left out): far from 0.5, good pictures of both parts are not alike, and
            no promise made on the one holds on the other.
        warnings: shortcuts and shifts, in words.
    """

    root: str
    layout: str
    counts: tuple[Count, ...]
    sizes: dict[str, int]
    modes: dict[str, int]
    findings: tuple[Finding, ...]
    trivial_scores: dict[str, dict[str, float | None]]
    shift: dict[str, dict[str, float | None]]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Json]:
        """Plain dictionaries, lists, strings and numbers."""
        plain: dict[str, Json] = json.loads(json.dumps(asdict(self)))
        return plain

    def to_text(self) -> str:
        """The same for reading: a line a fact."""
        lines = [f"{self.root} (layout: {self.layout})", "", "Pictures"]
        for count in self.counts:
            place = " ".join(part for part in (count.product, count.split, count.label) if part)
            masks = f", {count.masks} with a mask" if count.masks else ""
            lines.append(f"  {place}: {count.pictures}{masks}")
        lines += ["", "Sizes", *_some(self.sizes), "", "Formats", *_some(self.modes)]
        lines += ["", f"Findings: {len(self.findings)}"]
        for finding in self.findings[:SHOWN_FINDINGS]:
            lines.append(f"  {finding.kind}: {finding.message}")
            lines += [f"    {path}" for path in finding.paths if path not in finding.message]
        if len(self.findings) > SHOWN_FINDINGS:
            lines.append(f"  and {len(self.findings) - SHOWN_FINDINGS} more; the JSON output has all of them")
        for product, scores in self.trivial_scores.items():
            if any(value is not None for value in scores.values()):
                lines += ["", f"Trivial scores, image AUROC {product}".rstrip()]
                lines += [f"  {name}: {_figure(value)}" for name, value in scores.items()]
        if self.warnings:
            lines += ["", "Warnings", *(f"  {warning}" for warning in self.warnings)]
        return "\n".join(lines)


def _some(counts: dict[str, int]) -> list[str]:
    """The most frequent entries, a line each."""
    lines = [f"  {name}: {count}" for name, count in list(counts.items())[:SHOWN_SIZES]]
    more = len(counts) - SHOWN_SIZES
    return [*lines, f"  and {more} others"] if more > 0 else lines


def _figure(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"
