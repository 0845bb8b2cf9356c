"""What does F2PAD cost a picture, and how does that grow with batch and region? Ratios in one run.

    python benchmarks/refine_speed.py [--methods patchcore padim cflow] [--rounds 3]

Models of rendered nuts, 256 px, compact settings, the time cap lifted. A disc of brighter ground on good
test pictures is the defect: its radius sets the region's size. Seconds are wall time of the refinement alone,
the median of several rounds by turns; "share" is that of the frame which regions take, "crops" how many
pictures were refined in a crop.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from PIL import Image

from fettle.datasets.open import open_dataset
from fettle.datasets.parts import write_parts
from fettle.detector import Detector
from fettle.inspection import Inspection

BATCHES = (1, 2, 4, 8)
RADII = (4, 8, 16, 32)  # px
NUM_PICTURES = 8
CENTRE = (128, 70)  # x, y: on the nut


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["patchcore", "padim", "cflow"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), products=["hex_nut"], train=60, test_good=NUM_PICTURES, defects=1)
        dataset = open_dataset(Path(folder) / "hex_nut")
        good = [record.path for record in dataset.for_testing() if record.is_good]
        discs = {radius: with_discs(good, radius, Path(folder) / f"disc{radius}") for radius in RADII}
        print(f"{NUM_PICTURES} pictures, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
        for method in arguments.methods:
            detector = Detector.fit(dataset, method=method, seed=0)
            print(f"\n| {method} | share | crops | seconds a picture |\n|---|---|---|---|")
            cells = [(f"batch {size}, radius 16", discs[16], size) for size in BATCHES]
            cells += [(f"batch 8, radius {radius}", discs[radius], 8) for radius in RADII]
            cells.append(("difference, batch 8, radius 16", discs[16], 8))
            rounds = [[timed(detector, *cell) for cell in cells] for _ in range(arguments.rounds)]
            for number, (name, _, _) in enumerate(cells):
                share, crops, _ = rounds[0][number]
                seconds = median(one[number][2] for one in rounds)
                print(f"| {name} | {share:.3f} | {crops} | {seconds:.2f} |", flush=True)


def with_discs(paths: list[Path], radius: int, folder: Path) -> list[Path]:
    """Copies of pictures with a brighter disc."""
    folder.mkdir()
    made = []
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
        y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
        inside = (x - CENTRE[0]) ** 2 + (y - CENTRE[1]) ** 2 <= radius**2
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * 250
        made.append(folder / path.name)
        Image.fromarray(pixels.astype(np.uint8)).save(made[-1])
    return made


def timed(detector: Detector, name: str, paths: list[Path], batch: int) -> tuple[float, int, float]:
    """Share of the frame in regions, pictures in crops, and seconds a picture of the refinement."""
    refiner = detector.refiner(
        "difference" if name.startswith("difference") else "f2pad",
        everything=True,
        settings={"time_cap_s": 1000.0},
    )
    start = time.perf_counter()
    answers = list(detector.inspect(paths, batch_size=batch, refine=refiner))
    whole = time.perf_counter() - start
    start = time.perf_counter()
    list(detector.inspect(paths, batch_size=batch))
    plain = time.perf_counter() - start
    records = [one.refinement for one in answers if isinstance(one, Inspection) and one.refinement]
    share = fmean(float(str(record["roi_pixels"])) for record in records) / 256**2
    crops = sum(record["crop"] is not False for record in records)
    return share, crops, (whole - plain) / len(paths)


if __name__ == "__main__":
    main()
