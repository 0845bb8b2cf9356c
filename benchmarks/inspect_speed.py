"""How much does inspection cost beyond the backbone itself? Ratios in one run.

    python benchmarks/inspect_speed.py PICTURES [--backbone resnet18] [--banks 1024 2048 4096]
        [--batches 4] [--size 256]

PICTURES is a folder of at least 40 good pictures; half is learnt from, all are inspected. "backbone" is the
network's forward alone, in the same batches, on the same pictures already framed; "inspect" goes from files
to verdicts: decoding, framing, backbone, exact search, map, regions. Each figure is the median of several
alternating rounds. "unoverlapped" adds up what the steps take one after the other.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from fettle.datasets.picture_list import list_pictures
from fettle.detector import Detector
from fettle.images.decode import read_picture
from fettle.memory import views_together


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--banks", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[views_together("cpu")])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=80, help="pictures")
    arguments = parser.parse_args()
    paths = list_pictures([arguments.pictures])[: arguments.most]
    print(f"{arguments.backbone}, {len(paths)} pictures, {torch.get_num_threads()} threads")
    print("bank rows  batch  backbone ms  inspect ms  ratio  unoverlapped ms")
    for rows in arguments.banks:
        detector = Detector.fit(
            paths[::2],
            backbone=arguments.backbone,
            frame="square",
            size=arguments.size,
            settings={"bank_rows": rows},
        )
        placed = [detector.frame.place(read_picture(path)) for path in paths]
        views = torch.from_numpy(np.concatenate([one.views for one in placed]))
        times: dict[int, list[tuple[float, float, float]]] = {batch: [] for batch in arguments.batches}
        for _ in range(arguments.rounds):
            for batch, found in times.items():
                alone = timed_backbone(detector, views, batch)
                found.append((alone, *timed_inspection(detector, paths, batch)))
        for batch, found in times.items():
            backbone, inspect, steps = (
                1000 * median(values) / len(paths) for values in zip(*found, strict=True)
            )
            print(
                f"{rows:9d}  {batch:5d}  {backbone:11.1f}  {inspect:10.1f}  {inspect / backbone:5.2f}  "
                f"{steps:15.1f}",
                flush=True,
            )


def timed_backbone(detector: Detector, views: torch.Tensor, batch: int) -> float:
    method = detector.method
    start = time.perf_counter()
    with torch.inference_mode():
        for i in range(0, len(views), batch):
            method.backbone(views[i : i + batch], method.levels)
    return time.perf_counter() - start


def timed_inspection(detector: Detector, paths: list[Path], batch: int) -> tuple[float, float]:
    start = time.perf_counter()
    answers = detector.inspect(paths, batch_size=batch)
    steps = sum(sum(answer.seconds.values()) for answer in answers)  # type: ignore[union-attr]
    return time.perf_counter() - start, steps


if __name__ == "__main__":
    main()
