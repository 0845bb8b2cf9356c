"""Speed and memory of the pixel metrics against scikit-learn, both in one run on the same pictures.

Each side runs in a process of its own, reading one picture at a time. scikit-learn computes AUROC and
average precision (2 values); Fettle AUROC, AP, F1-max and AUPRO at 0.3 and 0.05 (5 values). Time is
CPU seconds of one thread, reading included. Memory is the peak less what was resident after the
imports and the first picture. Where `--reference-pictures` is smaller than `--pictures`, the reference's
figures are scaled up in proportion.

    python benchmarks/metrics.py --pictures 100 --size 256
    python benchmarks/metrics.py --pictures 25 --size 1024
    python benchmarks/metrics.py --pictures 100 --size 1024 --reference-pictures 50
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Picture = tuple[NDArray[np.float32], NDArray[np.bool_]]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Side:
    """What one process measured."""

    name: str
    pictures: int
    seconds: float
    peak_mib: float
    values: dict[str, float] = field(default_factory=dict)

    def scaled(self, pictures: int) -> Side:
        ratio = pictures / self.pictures
        values = self.values if pictures == self.pictures else {}  # those of fewer pictures say nothing
        return Side(self.name, pictures, self.seconds * ratio, self.peak_mib * ratio, values)


def write_pictures(folder: Path, number: int, size: int, seed: int) -> None:
    """Smooth random fields; six of ten with one to three blurred ellipses (radii 0.01 to 0.12)."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size]
    for index in range(number):
        noise = ndimage.zoom(rng.gamma(4, 0.25, (size // 8, size // 8)), 8, order=1)
        anomaly_map = ndimage.gaussian_filter(noise, 4 * size / 256)
        mask = np.zeros((size, size), bool)
        for _ in range(rng.integers(1, 4) if index % 10 < 6 else 0):
            (y, x), (height, width) = rng.uniform(0.1, 0.9, 2) * size, 0.01 * 12 ** rng.random(2) * size
            ellipse = ((row - y) / height) ** 2 + ((column - x) / width) ** 2 <= 1
            mask |= ellipse
            weight = rng.uniform(0.1, 1.2)
            anomaly_map += weight * ndimage.gaussian_filter(ellipse.astype(float), 5 * size / 256)
        np.save(folder / f"map_{index:05d}.npy", anomaly_map.astype(np.float32))
        np.save(folder / f"mask_{index:05d}.npy", mask)


def read_pictures(folder: Path, number: int) -> Iterator[Picture]:
    for index in range(number):
        yield np.load(folder / f"map_{index:05d}.npy"), np.load(folder / f"mask_{index:05d}.npy")


def fettle_side(pictures: Iterator[Picture], capacity: int | None) -> dict[str, float]:
    from fettle.metrics import PixelMetrics

    metrics = PixelMetrics(capacity)
    for anomaly_map, mask in pictures:
        metrics.update(anomaly_map, mask, defect="defect" if mask.any() else "good")
    result = metrics.compute()
    names = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro", "aupro_005")
    return {name: float(getattr(result, name)) for name in names}


def scikit_learn_side(pictures: Iterator[Picture]) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    maps, masks = [], []
    for anomaly_map, mask in pictures:
        maps.append(anomaly_map.ravel())
        masks.append(mask.ravel())
    scores, labels = np.concatenate(maps), np.concatenate(masks)
    del maps, masks
    return {
        "pixel_auroc": float(roc_auc_score(labels, scores)),
        "pixel_ap": float(average_precision_score(labels, scores)),
    }


SIDES: dict[str, Callable[[Iterator[Picture]], dict[str, float]]] = {
    "scikit-learn": scikit_learn_side,
    "fettle 2^23": lambda pictures: fettle_side(pictures, 1 << 23),
    "fettle 2^22": lambda pictures: fettle_side(pictures, 1 << 22),
    "fettle unbounded": lambda pictures: fettle_side(pictures, None),
}


class PeakMemory:
    """Samples the resident memory of this process every 2 ms (Linux)."""

    def __init__(self) -> None:
        self._page_mib = os.sysconf("SC_PAGE_SIZE") / 2**20
        self._base = self._peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        return self._peak - self._base

    def _now(self) -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * self._page_mib

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._now())


def measure(name: str, folder: Path, number: int) -> Side:
    """Run one side in this process: first on one small picture, for the imports, then measured."""
    generator = np.random.default_rng(0)
    small = generator.random((16, 16), np.float32)
    SIDES[name](iter([(small, small > 0.5), (small, small > 2)]))
    first = next(read_pictures(folder, 1))
    with PeakMemory() as peak:
        start = time.thread_time()
        values = SIDES[name](read_pictures(folder, number))
        seconds = time.thread_time() - start
    del first
    return Side(name, number, seconds, peak.mib, values)


def measure_apart(name: str, folder: Path, number: int) -> Side:
    """Run one side in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--side", name, "--folder", str(folder), "--pictures", str(number)]
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return Side(**json.loads(done.stdout))


def print_table(reference: Side, ours: list[Side], size: int) -> None:
    print(f"{reference.pictures} maps of {size} px, {reference.pictures * size * size / 1e6:.1f} M pixels")
    print(f"{'side':<18}{'CPU s':>9}{'MiB':>9}{'faster':>9}{'memory':>9}{'AUROC gap':>12}{'AP gap':>12}")
    for side in [reference, *ours]:
        faster, memory = reference.seconds / side.seconds, reference.peak_mib / max(side.peak_mib, 0.1)
        gaps = [abs(side.values[key] - value) for key, value in reference.values.items()]
        gap = "".join(f"{one:>12.1e}" for one in gaps) if side is not reference else ""
        print(
            f"{side.name:<18}{side.seconds:>9.2f}{side.peak_mib:>9.1f}{faster:>8.1f}x   1/{memory:<4.1f}{gap}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--size", type=int, default=256, help="side of the maps, px (a multiple of 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference-pictures", type=int, help="pictures that scikit-learn gets; then scaled")
    parser.add_argument("--least-speedup", type=float, default=0, help="fail below this ratio of times")
    parser.add_argument("--least-saving", type=float, default=0, help="fail below this ratio of memory")
    parser.add_argument("--side", choices=SIDES, help="measure this side only, on --folder, and print JSON")
    parser.add_argument("--folder", type=Path, help="where the pictures lie, with --side")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(vars(measure(options.side, options.folder, options.pictures))))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, options.pictures, options.size, options.seed)
        number = options.reference_pictures or options.pictures
        reference = measure_apart("scikit-learn", folder, number).scaled(options.pictures)
        ours = [measure_apart(side, folder, options.pictures) for side in list(SIDES)[1:]]
    print_table(reference, ours, options.size)
    fast_enough = reference.seconds >= options.least_speedup * ours[0].seconds
    small_enough = reference.peak_mib >= options.least_saving * ours[0].peak_mib
    if not (fast_enough and small_enough):
        print("A ratio is below its target.", file=sys.stderr)
    return 0 if fast_enough and small_enough else 1


if __name__ == "__main__":
    sys.exit(main())
