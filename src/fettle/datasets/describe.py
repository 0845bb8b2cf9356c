"""What a data set holds, what is suspicious in it, and which shortcuts would solve it.

One pass decodes each picture once and keeps a 64x64 grey thumbnail, a hash of the pixels and a
64-bit difference hash. A file that can't be read becomes a finding; it never ends the run.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fettle.datasets.description import Count, Description, Finding
from fettle.datasets.folder import picture_files, subfolders
from fettle.datasets.records import Dataset, Record
from fettle.errors import PictureError
from fettle.images.decode import picture_header, read_mask, read_picture
from fettle.metrics.ranking import image_auroc
from fettle.protocols import Progress, no_progress

__all__ = ["Count", "Description", "Finding", "describe"]

SIDE = 64  # px of the thumbnails
HASH_BITS_APART = 10  # of 64: above, two pictures are not compared any further
SAME_CORRELATION = 0.995
LEVELS_OFF = 3.0  # grey levels of 255, RMS
MIN_FOR_MEAN = 8  # training pictures
SHORTCUT = 0.9  # an AUROC from here on, or below 1 minus it, is worth a warning
_NEIGHBOUR_BLOCK = 256  # test pictures at a time


@dataclass(frozen=True)
class _Seen:
    """What is kept of one decoded picture."""

    record: Record
    thumbnail: NDArray[np.uint16]  # (SIDE * SIDE,), grey level times 257: half of float32's memory
    bits: int  # the difference hash
    pixels: str  # hash of size and pixels
    size: tuple[int, int]
    mode: str
    file_size: int


def describe(dataset: Dataset, progress: Progress = no_progress) -> Description:
    """Count, check and measure a data set.

    Args:
        dataset: any layout.
        progress: called with (what, done, total) after each picture.
    """
    seen: list[_Seen] = []
    findings: list[Finding] = []
    for done, record in enumerate(dataset.records, start=1):
        try:
            one = _look(record)
        except (PictureError, OSError) as error:
            findings.append(Finding("unreadable", str(error), (str(record.path),)))
        else:
            seen.append(one)
            findings += _mask_findings(record, one.size)
        progress("describe", done, len(dataset.records))
    findings += _missing_masks(dataset.records)
    findings += _orphan_masks(dataset)
    findings += _equal_pictures(seen)
    products = sorted({record.product for record in dataset.records})
    scores: dict[str, dict[str, float | None]] = {}
    shift: dict[str, dict[str, float | None]] = {}
    for product in products:
        mine = [one for one in seen if one.record.product == product]
        findings += _near_duplicates(mine)
        scores[product] = _trivial_scores(mine)
        shift[product] = _shift(mine)
    return Description(
        root=str(dataset.root),
        layout=dataset.layout,
        counts=_counts(dataset.records),
        sizes=_frequent(f"{one.size[1]}x{one.size[0]}" for one in seen),
        modes=_frequent(one.mode for one in seen),
        findings=tuple(findings),
        trivial_scores=scores,
        shift=shift,
        warnings=tuple(_warnings(scores, shift)),
    )


def _look(record: Record) -> _Seen:
    header = picture_header(record.path)
    picture = read_picture(record.path)
    grey = _grey(picture.pixels)
    small = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    rises = (small[:, 1:] > small[:, :-1]).ravel()
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX)).ravel()
    content = hashlib.sha256(f"{picture.size} {picture.pixels.dtype}".encode())
    content.update(picture.pixels.tobytes())
    mode = f"{header.format} {header.mode} {header.bits}-bit"
    return _Seen(
        record,
        np.rint(thumbnail * 257).astype(np.uint16),
        int.from_bytes(np.packbits(rises).tobytes(), "big"),
        content.hexdigest(),
        picture.size,
        mode,
        record.path.stat().st_size,
    )


def _grey(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> Image.Image:
    """Grey, float, 0..255. 16-bit pictures have three equal channels."""
    if pixels.dtype == np.uint16:
        return Image.fromarray(pixels[:, :, 0].astype(np.float32) / 257)
    return Image.fromarray(pixels).convert("L").convert("F")


# --- files and masks ------------------------------------------------------------------------------


def _counts(records: Sequence[Record]) -> tuple[Count, ...]:
    pictures = Counter((r.product, r.split, r.defect) for r in records)
    masks = Counter((r.product, r.split, r.defect) for r in records if r.mask is not None)
    return tuple(Count(*key, pictures[key], masks[key]) for key in sorted(pictures))


def _frequent(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _mask_findings(record: Record, size: tuple[int, int]) -> list[Finding]:
    """What is wrong with one picture's mask, looked at beside the decoded picture."""
    if record.mask is None:
        return []
    paths = (str(record.path), str(record.mask))
    try:
        mask, _ = read_mask(record.mask)
    except PictureError as error:
        return [Finding("mask_unreadable", str(error), paths)]
    if mask.shape != size:
        words = f"The mask is {mask.shape[1]}x{mask.shape[0]} px, its picture {size[1]}x{size[0]} px."
        return [Finding("mask_size", words, paths)]
    if record.is_good and mask.any():
        return [
            Finding("good_with_mask", "The picture is labelled good, but its mask marks a defect.", paths)
        ]
    if not record.is_good and not mask.any():
        return [Finding("mask_empty", "The picture is labelled defective, but its mask is empty.", paths)]
    return []


def _missing_masks(records: Sequence[Record]) -> list[Finding]:
    """Defective pictures without a mask; one finding for all where nobody has drawn any."""
    missing = [str(r.path) for r in records if not r.is_good and r.mask is None]
    if missing and all(r.mask is None for r in records):
        words = f"None of the {len(missing)} defective pictures has a mask, so pixels can't be judged."
        return [Finding("mask_missing", words, ())]
    return [Finding("mask_missing", "The defective picture has no mask.", (path,)) for path in missing]


def _orphan_masks(dataset: Dataset) -> list[Finding]:
    """Mask files that belong to no picture, where the layout says where masks stand."""
    if dataset.layout == "mvtec":
        folder = dataset.root / "ground_truth"
        known = {r.mask for r in dataset.records}
        orphans = [p for p in picture_files(folder) if p not in known] if folder.is_dir() else []
    elif dataset.layout == "magnetic_tile":
        stems = {r.path.with_suffix("") for r in dataset.records}
        files = [p for kind in subfolders(dataset.root) for p in _pngs(kind / "Imgs")]
        orphans = [p for p in files if p.with_suffix("") not in stems]
    else:
        return []
    return [Finding("mask_orphan", "The mask belongs to no picture.", (str(path),)) for path in orphans]


def _pngs(folder: Path) -> list[Path]:
    return [path for path in picture_files(folder) if path.suffix.lower() == ".png"]


# --- equal and nearly equal pictures --------------------------------------------------------------


def _equal_pictures(seen: Sequence[_Seen]) -> list[Finding]:
    """Pictures with equal pixels, whatever their files' bytes; leakage where both splits hold one."""
    by_pixels: dict[str, list[_Seen]] = defaultdict(list)
    for one in seen:
        by_pixels[one.pixels].append(one)
    findings = []
    for equal in by_pixels.values():
        if len(equal) < 2:
            continue
        paths = tuple(str(one.record.path) for one in equal)
        words = f"{len(equal)} pictures have equal pixels"
        if len({one.record.defect for one in equal}) > 1:
            words += " and different labels"
        leaks = {"train", "test"} <= {one.record.split for one in equal}
        words += ", in training and in test." if leaks else "."
        findings.append(Finding("leakage" if leaks else "duplicate", words, paths))
    return findings


def _near_duplicates(seen: Sequence[_Seen]) -> list[Finding]:
    """Pairs of one product across training and test: copies that were encoded or lit anew.

    Candidates differ in at most HASH_BITS_APART of 64 bits of the difference hash (is each cell of
    a 9x8 grid brighter than the one to its left). They are confirmed when their thumbnails, minus
    the mean training thumbnail, correlate and differ by few grey levels: pictures of one product
    are alike, it is what is left that tells copies. A copy that is moved or turned is not found.
    """
    train = [one for one in seen if one.record.split == "train"]
    test = [one for one in seen if one.record.split == "test"]
    if not train or not test:
        return []
    # The mean of very few pictures is mostly the pictures themselves: then nothing is taken off.
    mean = _matrix(train).mean(axis=0) if len(train) >= MIN_FOR_MEAN else np.float32(0)
    train_hashes = np.array([one.bits for one in train], np.uint64)
    findings = []
    for one in test:
        apart = np.bitwise_count(train_hashes ^ np.uint64(one.bits))
        for index in np.flatnonzero(apart <= HASH_BITS_APART):
            other = train[int(index)]
            first, second = _matrix([one, other]) - mean
            alike, levels_off = _likeness(first, second)
            if alike >= SAME_CORRELATION and levels_off <= LEVELS_OFF and one.pixels != other.pixels:
                words = f"A test picture is nearly a training picture (correlation {alike:.3f})."
                findings.append(
                    Finding("near_duplicate", words, (str(other.record.path), str(one.record.path)))
                )
    return findings


def _likeness(first: NDArray[np.float32], second: NDArray[np.float32]) -> tuple[float, float]:
    """Pearson's correlation, and the RMS grey levels by which the second is off the first's best line.

    Flat pictures all look alike: their correlation is given as 0.
    """
    a = first.astype(np.float64) - first.mean(dtype=np.float64)
    b = second.astype(np.float64) - second.mean(dtype=np.float64)
    if min(a.std(), b.std()) < 0.5:  # grey levels: less than rounding and coding leave
        return 0.0, 0.0
    correlation = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return correlation, float(b.std() * np.sqrt(max(0.0, 1 - correlation**2)))


# --- trivial scores -------------------------------------------------------------------------------


def _matrix(seen: Sequence[_Seen]) -> NDArray[np.float32]:
    """Thumbnails, (pictures, SIDE * SIDE), 0..255."""
    if not seen:
        return np.zeros((0, SIDE * SIDE), np.float32)
    return np.stack([one.thumbnail for one in seen]).astype(np.float32) / np.float32(257)


def _plain_scores(seen: Sequence[_Seen]) -> dict[str, list[float]]:
    """Scores of each picture that need no training picture."""
    thumbnails = _matrix(seen)
    return {
        "brightness": thumbnails.mean(axis=1).tolist(),
        "contrast": thumbnails.std(axis=1).tolist(),
        "file_size": [float(one.file_size) for one in seen],
        "height": [float(one.size[0]) for one in seen],
    }


def _trivial_scores(seen: Sequence[_Seen]) -> dict[str, float | None]:
    train = [one for one in seen if one.record.split == "train" and one.record.is_good]
    test = [one for one in seen if one.record.split == "test"]
    is_defect = [not one.record.is_good for one in test]
    scores: dict[str, list[float]] = {}
    if train:
        known, asked = _matrix(train), _matrix(test)
        scores["distance_to_mean"] = ((asked - known.mean(axis=0)) ** 2).sum(axis=1).tolist()
        scores["nearest_pixels"] = _nearest(asked, known).tolist()
    scores |= _plain_scores(test)
    names = ("distance_to_mean", "nearest_pixels", "brightness", "contrast", "file_size", "height")
    return {name: _auroc(scores[name], is_defect) if name in scores else None for name in names}


def _nearest(asked: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared distance of each row to its nearest row of `known`, in float64: near rows cancel."""
    wide = known.astype(np.float64)
    squares = np.einsum("ij,ij->i", wide, wide)
    nearest = [np.zeros(0)]
    for start in range(0, len(asked), _NEIGHBOUR_BLOCK):
        block = asked[start : start + _NEIGHBOUR_BLOCK].astype(np.float64)
        own = np.einsum("ij,ij->i", block, block)
        nearest.append(np.maximum((squares - 2 * (block @ wide.T)).min(axis=1) + own, 0))
    return np.concatenate(nearest)


def _shift(seen: Sequence[_Seen]) -> dict[str, float | None]:
    good = [one for one in seen if one.record.is_good and one.record.split in ("train", "test")]
    in_test = [one.record.split == "test" for one in good]
    return {name: _auroc(values, in_test) for name, values in _plain_scores(good).items()}


def _auroc(scores: list[float], is_defect: list[bool]) -> float | None:
    return image_auroc(scores, is_defect) if any(is_defect) and not all(is_defect) else None


def _warnings(
    scores: dict[str, dict[str, float | None]], shift: dict[str, dict[str, float | None]]
) -> list[str]:
    """The figures that a reader should not miss, in words."""
    result = []
    for product, values in scores.items():
        of = f" of '{product}'" if product else ""
        for name, value in values.items():
            if value is not None and max(value, 1 - value) >= SHORTCUT:
                result.append(f"In the test part{of}, {name} alone has an AUROC of {value:.2f}: a shortcut.")
        for name, value in shift[product].items():
            if value is not None and max(value, 1 - value) >= SHORTCUT:
                result.append(
                    f"Good training and test pictures{of} differ in {name} (AUROC {value:.2f}): "
                    "a false-reject rate promised on the one will not hold on the other."
                )
    return result
