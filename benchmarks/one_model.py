"""What one model for all products saves, and what FPFNet costs beside UniAD.

    python benchmarks/one_model.py [--methods patchcore uniad] [--products 7] [--steps 100]

Rendered products, the default backbone, 256 px. "one each" is the sum of sizes and times and the largest peak
of a model a product; "one for all" has the same steps as each of these. Each fit has its own process; "peak"
is its largest resident memory, imports and network included. The last line is the ratio of the time of
FPFNet's answers to UniAD's, by turns in one process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from fettle.datasets.parts import PRODUCTS, write_parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["patchcore", "uniad"])
    parser.add_argument("--products", type=int, default=len(PRODUCTS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--multi-class", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(fit_one(*arguments.one, arguments.steps, arguments.multi_class)))
        return
    with tempfile.TemporaryDirectory() as folder:
        names = PRODUCTS[: arguments.products]
        write_parts(Path(folder), products=names, test_good=1, defects=1)
        print(f"{len(names)} products, {arguments.steps} steps a training")
        print("method      models       size MiB  seconds  peak MiB")
        for method in arguments.methods:
            each = [measured(arguments, method, Path(folder) / name) for name in names]
            row(method, "one each", sum(e[0] for e in each), sum(e[1] for e in each), max(e[2] for e in each))
            row(method, "one for all", *measured(arguments, method, Path(folder), "--multi-class"))
        print(f"FPFNet's time over UniAD's: {latency_ratio(Path(folder) / names[0]):.3f}")


def row(method: str, models: str, size: float, seconds: float, peak: float) -> None:
    print(f"{method:10s}  {models:11s}  {size:8.1f}  {seconds:7.1f}  {peak:8.0f}", flush=True)


def measured(arguments: argparse.Namespace, method: str, folder: Path, *more: str) -> list[float]:
    """Size in MiB, seconds, and peak in MiB of one fit in its own process."""
    command = [sys.executable, __file__, "--one", method, str(folder), "--steps", str(arguments.steps), *more]
    found: list[float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def fit_one(method: str, folder: str, steps: int, multi_class: bool) -> list[float]:
    from fettle.detector import Detector

    settings = {} if method == "patchcore" else {"steps": steps}
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        detector = Detector.fit(
            folder,
            method=method,
            settings=settings,
            frame="square",
            multi_class=multi_class,
            cache_dir=Path(cache),
        )
        seconds = time.perf_counter() - start
        detector.save(out)
        size = sum(path.stat().st_size for path in Path(out).iterdir()) / 2**20
    return [size, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


def latency_ratio(folder: Path, *, pictures: int = 8, turns: int = 15) -> float:
    """The median time of FPFNet's answer over UniAD's, for a batch, by turns."""
    import torch

    from fettle.detector import Detector

    with tempfile.TemporaryDirectory() as cache:
        methods = [
            Detector.fit(
                folder, method=name, settings={"steps": 1}, frame="square", cache_dir=Path(cache)
            ).method
            for name in ("uniad", "fpfnet")
        ]
    batch, valid = torch.rand(pictures, 3, 256, 256), torch.ones(pictures, 1, 256, 256, dtype=torch.bool)
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(turns):
            for method, own in zip(methods, times, strict=True):
                start = time.perf_counter()
                method(batch, valid)
                own.append(time.perf_counter() - start)
    return median(times[1]) / median(times[0])


if __name__ == "__main__":
    main()
