"""Write a set of rendered parts in the MVTec AD layout."""

from __future__ import annotations

import io
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fettle.datasets.parts.render import PRODUCTS, check_size, defects_of, render
from fettle.errors import DataError, UsageError
from fettle.protocols import Progress, no_progress

# Sensor noise has no repeats worth a search: run lengths and Huffman codes alone make smaller files, sooner.
_COMPRESSION = {"compress_level": 1, "compress_type": zlib.Z_RLE}


@dataclass(frozen=True)
class PartsSummary:
    """What was written.

    Attributes:
        out: the folder that holds one folder a product.
        products: the products written.
        train, test_good, test_defective: number of pictures over all products.
        seconds: time it took.
    """

    out: Path
    products: tuple[str, ...]
    train: int
    test_good: int
    test_defective: int
    seconds: float

    @property
    def pictures(self) -> int:
        """All pictures, masks not counted."""
        return self.train + self.test_good + self.test_defective


@dataclass(frozen=True)
class _Job:
    """One picture to write; its stream ("train/good", "test/scratch") is its folder too."""

    product: str
    stream: str
    defect: str | None
    index: int
    picture: Path
    mask: Path | None


def _plan(out: Path, product: str, train: int, test_good: int, defects: int) -> list[_Job]:
    """Every picture of one product, in the order written."""
    root = out / product
    series: list[tuple[str, str | None, int]] = [("train/good", None, train), ("test/good", None, test_good)]
    series += [(f"test/{defect}", defect, defects) for defect in defects_of(product)]
    jobs = []
    for stream, defect, count in series:
        digits = max(3, len(str(count - 1)))
        for index in range(count):
            name = f"{index:0{digits}d}"
            mask = root / "ground_truth" / defect / f"{name}_mask.png" if defect else None
            jobs.append(_Job(product, stream, defect, index, root / stream / f"{name}.png", mask))
    return jobs


def _refuse_strangers(out: Path, products: Sequence[str], jobs: Sequence[_Job]) -> None:
    """A folder with pictures that this set does not have would make a mixture: refuse it."""
    ours = {path for job in jobs for path in (job.picture, job.mask) if path is not None}
    for product in products:
        for found in sorted((out / product).rglob("*.png")):
            if found not in ours:
                raise DataError(
                    f"{found} is there already and does not belong to the set asked for.",
                    f"Give an empty folder, or remove {out / product} first.",
                )


def _write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a PNG so that the file is whole or not there."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **_COMPRESSION)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(job: _Job, seed: int, size: int) -> None:
    shown = render(job.product, seed=seed, index=job.index, defect=job.defect, size=size, stream=job.stream)
    if job.mask is not None:  # first, so that no defective picture is ever there without its mask
        _write_png(job.mask, shown.mask)
    _write_png(job.picture, shown.pixels)


def _keep_memory() -> None:
    """Let freed memory be used again at once.

    Each picture takes and frees some hundred fields. The C library hands blocks of that size back to the
    system each time, which costs a quarter of the time in page faults; once it has seen a larger block freed,
    it keeps them (glibc's dynamic threshold; elsewhere this does nothing).
    """
    np.empty(24 << 20, np.uint8)


def write_parts(
    out: Path,
    *,
    products: Sequence[str] = PRODUCTS,
    train: int = 60,
    test_good: int = 20,
    defects: int = 4,
    size: int = 256,
    seed: int = 0,
    progress: Progress = no_progress,
    workers: int = 2,
) -> PartsSummary:
    """Render a data set: OUT/PRODUCT/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}/NNN.png.

    The same arguments give the same files, bit for bit; the number of workers changes nothing, nor does
    leaving a product out or asking for more pictures (those of the smaller set stay as they were).

    Args:
        out: folder to write into; made if it is not there.
        products: names out of PRODUCTS.
        train, test_good: good pictures a product.
        defects: test pictures a defect kind and product.
        size: side of the pictures, px, 64..2048.
        seed: seed of the set.
        progress: called after each picture.
        workers: threads that render at once.

    Raises:
        UsageError: an unknown product, a count below 1, or a size out of bounds; nothing is written.
        DataError: a product's folder holds pictures that do not belong to this set, or a folder cannot be
            made; no picture is written.
    """
    started = time.perf_counter()
    chosen = tuple(dict.fromkeys(products))
    counts = {
        "products": len(chosen),
        "train": train,
        "test_good": test_good,
        "defects": defects,
        "workers": workers,
    }
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"'{name}' is {count}, but must be at least 1.", "Give a positive number.")
    check_size(size)
    jobs = [job for product in chosen for job in _plan(out, product, train, test_good, defects)]
    _refuse_strangers(out, chosen, jobs)
    for folder in sorted(
        {path.parent for job in jobs for path in (job.picture, job.mask) if path is not None}
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"The folder {folder} cannot be made: {error.strerror}.",
                "Give a folder that you may write to.",
            ) from error
    _keep_memory()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done, _ in enumerate(pool.map(lambda job: _write(job, seed, size), jobs), start=1):
                progress("render parts", done, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    defective = sum(job.defect is not None for job in jobs)
    return PartsSummary(
        out,
        chosen,
        train * len(chosen),
        test_good * len(chosen),
        defective,
        time.perf_counter() - started,
    )
