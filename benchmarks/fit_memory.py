"""Peak memory and time of a fit, at growing numbers of pictures; each fit in its own process.

    python benchmarks/fit_memory.py [--method patchcore] [--counts 250 500 1000] [--memory-mib 256] ...

Pictures are rendered (procedural parts) into a temporary folder, so that none repeats. "peak" is the largest
resident memory of the process less what it held after a fit on four pictures, so that neither the imports nor
the network count.
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

from fettle.datasets.parts import write_parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="patchcore")
    parser.add_argument("--backbone", default="tf_efficientnet_lite2")
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--memory-mib", type=int, default=256)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        fit_one(arguments)
        return
    print(f"{arguments.method}, {arguments.backbone}, {arguments.size} px, memory {arguments.memory_mib} MiB")
    print("pictures  peak MiB  seconds  ms a picture  model MiB")
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), products=("hex_nut",), train=max(arguments.counts), test_good=1, defects=1)
        for count in arguments.counts:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", folder, "--count", str(count)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            print(
                f"{count:8d}  {found['peak']:8.0f}  {found['seconds']:7.1f}  "
                f"{1000 * found['seconds'] / count:12.1f}  {found['model']:9.1f}",
                flush=True,
            )


def fit_one(arguments: argparse.Namespace) -> None:
    from fettle.detector import Detector

    paths = sorted((arguments.one / "hex_nut" / "train" / "good").iterdir())
    settings = {
        "method": arguments.method,
        "backbone": arguments.backbone,
        "size": arguments.size,
        "memory_mib": arguments.memory_mib,
    }
    Detector.fit(paths[:4], **settings)  # imports and the first allocations are not what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    detector = Detector.fit(paths[: arguments.count], **settings)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with tempfile.TemporaryDirectory() as folder:
        detector.save(folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
    print(json.dumps({"peak": peak, "seconds": seconds, "model": size}))


if __name__ == "__main__":
    main()
