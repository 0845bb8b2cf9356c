"""What does each method cost at inspection beyond its backbone? One run, one table.

    python benchmarks/cost.py [--backbone NAME] [--size 256] [--batch 8] [--rounds 15]

Each method learns from rendered parts in its compact form, but in two steps where it is trained: what
inspection costs does not depend on how long the training was. Multiply-adds are those of matrix products,
convolutions and attention, a picture. Times are medians; the ratio is that of passes timed in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from fettle.backbones import registry
from fettle.bench.cost import cost_of
from fettle.datasets.parts import write_parts
from fettle.detector import Detector
from fettle.methods.registry import find_method

METHODS = ("patchcore", "padim", "uniad", "fpfnet", "agpnet", "tfanet")
PRODUCT = "hex_nut"
PICTURES = 12
COLUMNS = (
    *("method", "levels", "multiply-adds, G", "beyond the backbone, G", "trainable, M"),
    *("ms", "ms of the backbone", "ratio"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default=registry.DEFAULT_BACKBONE)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    print(
        f"{arguments.backbone}, {arguments.size} px, batches of {arguments.batch}, {threads} threads\n\n"
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), products=(PRODUCT,), train=PICTURES, test_good=1, defects=1)
        for name in METHODS:
            detector = Detector.fit(
                Path(folder) / PRODUCT,
                method=name,
                backbone=arguments.backbone,
                frame="square",
                size=arguments.size,
                settings={"steps": 2} if find_method(name).traits.trained else {},
                cache_mib=0,
            )
            cost = cost_of(detector, batch=arguments.batch, rounds=arguments.rounds)
            levels = [level.removeprefix("stride") for level in detector.method.levels]
            cells = [
                name,
                ", ".join(levels),
                f"{cost.multiply_adds / 1e9:.3f}",
                f"{(cost.multiply_adds - cost.backbone_multiply_adds) / 1e9:.3f}",
                f"{cost.trainable / 1e6:.2f}",
                f"{1000 * cost.seconds:.1f}",
                f"{1000 * cost.backbone_seconds:.1f}",
                f"{cost.ratio:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
