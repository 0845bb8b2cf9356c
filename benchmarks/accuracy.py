"""Accuracy on real labelled pictures: one JSON record a cell, and the table of docs/results.md.

    python benchmarks/accuracy.py run                 # every cell that has no record yet
    python benchmarks/accuracy.py run --only fabric   # cells whose name holds the word
    python benchmarks/accuracy.py table               # Markdown, from the records

FETTLE_DATA and FETTLE_WEIGHTS name the folders of pictures and weights. Each cell fits on the training part
and evaluates on the test part; nothing is chosen by test labels. A backbone's features do not depend on the
seed or the method, so that cells of one data set and backbone share them: the answers are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from fettle.backbones import registry
from fettle.bench import read_records, spread, write_record
from fettle.detector import Detector
from fettle.protocols import Backbone

RECORDS = Path(__file__).parent / "records" / "accuracy"
DATA = {
    "screw_mixed": "split_screw_mixed.csv",
    "screw_original": "screw",
    "magnetic_tile": "split_magnetic_tile.csv",
    "battery_weld": "battery_weld",
    "fabric": "fabric",
}
OTHER_FRAMES = {"battery_weld": "auto", "magnetic_tile": "pad"}  # "auto" is a rectangle for the welds
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One fit and evaluation."""

    data: str
    backbone: str
    method: str
    frame: str
    seed: int

    @property
    def size(self) -> int:
        return 252 if self.backbone.startswith("vit") else 256

    @property
    def name(self) -> str:
        return f"{self.data}-{self.backbone}-{self.method}-{self.frame}-{self.seed}"


def cells() -> Iterator[Cell]:
    """Every cell, those that share features side by side."""
    methods = {
        "tf_efficientnet_lite2": ("patchcore", "padim", "cflow"),
        "resnet18": ("patchcore", "padim"),
        "resnet50_keras": ("patchcore",),
        "vit_small_patch14": ("patchcore",),
    }
    for backbone, data in itertools.product(methods, DATA):
        frames = ["square"]
        if backbone in ("tf_efficientnet_lite2", "resnet18") and data in OTHER_FRAMES:
            frames.append(OTHER_FRAMES[data])
        for frame, method, seed in itertools.product(frames, methods[backbone], SEEDS):
            yield Cell(data, backbone, method, frame, seed)


class RememberingBackbone(nn.Module):
    """A backbone that looks up pictures which it has seen, by the hash of their pixels."""

    def __init__(self, backbone: Backbone, seen: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner = backbone
        self.spec = backbone.spec
        self.seen = seen

    def forward(self, pictures: Tensor, levels: Sequence[str]) -> dict[str, Tensor]:
        keys = [hashlib.sha1(picture.numpy().tobytes()).hexdigest() for picture in pictures]
        if not all(f"{key}/{level}" in self.seen for key in keys for level in levels):
            for level, features in self.inner(pictures, levels).items():
                for key, one in zip(keys, features, strict=True):
                    self.seen[f"{key}/{level}"] = one.clone()
        return {level: torch.stack([self.seen[f"{key}/{level}"] for key in keys]) for level in levels}


@contextmanager
def remembered_features() -> Iterator[None]:
    """Backbones loaded inside share what they have seen."""
    seen: dict[str, Tensor] = {}
    load = registry.load_backbone

    def load_remembering(name: str | None, levels: Sequence[str], **more: object) -> Backbone:
        return RememberingBackbone(load(name, levels, **more), seen)  # type: ignore[arg-type, return-value]

    with mock.patch.object(registry, "load_backbone", load_remembering):
        yield


def run(words: Sequence[str]) -> None:
    wanted = [cell for cell in cells() if all(word in cell.name for word in words)]
    for (data, _), group in itertools.groupby(wanted, key=lambda cell: (cell.data, cell.backbone)):
        missing = [cell for cell in group if not (RECORDS / f"{cell.name}.json").exists()]
        with remembered_features():
            for cell in missing:
                record = run_cell(cell, Path(os.environ["FETTLE_DATA"]) / DATA[data])
                write_record(RECORDS, cell.name, record)
                figures = "  ".join(
                    f"{key} {record[key]:.4f}" for key in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
                )
                print(f"{cell.name:60s} {figures}", flush=True)


def run_cell(cell: Cell, data: Path) -> dict[str, object]:
    start = time.perf_counter()
    detector = Detector.fit(
        data,
        method=cell.method,
        backbone=cell.backbone,
        frame=cell.frame,
        size=cell.size,
        seed=cell.seed,
        group="tile" if cell.data == "magnetic_tile" else None,
    )
    result = detector.evaluate(data)
    spec = detector.method.backbone.spec
    return {
        **vars(cell),
        "size": [detector.frame.height, detector.frame.width],
        "weights": spec.sha256,
        "config": detector.method.config.model_dump(mode="json"),
        "num_fit": detector.num_fit,
        "num_calibration": detector.calibration.num_scores,
        "minutes": round((time.perf_counter() - start) / 60, 2),
        **result,
    }


def table() -> None:
    """Mean over seeds, the spread (standard deviation) where there are several."""
    records = list(read_records(RECORDS).values())
    keys = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")

    def group_of(record: dict[str, object]) -> tuple[object, ...]:
        order = list(DATA).index(str(record["data"]))
        return order, record["data"], record["method"], record["backbone"], record["frame"]

    records.sort(key=group_of)
    data = ""
    for (_, name, method, backbone, frame), group in itertools.groupby(records, key=group_of):
        runs = list(group)
        if name != data:
            data = str(name)
            print(f"\n### {data}\n")
            print(
                "| method | backbone | frame | seeds | "
                + " | ".join(keys)
                + " | false rejects: promised, measured |"
            )
            print("|" + "---|" * (len(keys) + 5))
        height, width = runs[0]["size"]
        cells = [spread([run[key] for run in runs]) for key in keys]
        promised = runs[0]["frr_promised"]
        promise = "none" if promised is None else f"{promised:.3g} on {runs[0]['promise_on']}"
        measured = ", ".join(f"{run['frr_measured']:.3f}" for run in runs)
        print(
            f"| {method} | {backbone} | {frame} {width} x {height} | {len(runs)} | "
            + " | ".join(cells)
            + f" | {promise}: {measured} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    arguments = parser.parse_args()
    sys.exit(run(arguments.only) if arguments.action == "run" else table())
