"""The procedural parts: how fast they are drawn, and how far trivial scores get on them.

    python benchmarks/parts.py                    speed and trivial scores
    python benchmarks/parts.py --sheet sheet.png  writes the contact sheet, too

A set that a trivial score can solve tests nothing, so each score's AUROC between good and defective test
pictures should be near 0.5. Set OMP_NUM_THREADS=1 for a fair speed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata

from fettle.datasets.parts import PRODUCTS, contact_sheet, write_parts

Score = Callable[[Path], float]


def auroc(good: list[float], defective: list[float]) -> float:
    """Area under the ROC curve by ranks; ties count one half."""
    ranks = rankdata([*good, *defective])
    n, m = len(good), len(defective)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def brightness(path: Path) -> float:
    return float(np.asarray(Image.open(path)).mean())


def contrast(path: Path) -> float:
    return float(np.asarray(Image.open(path).convert("L")).std())


def file_size(path: Path) -> float:
    return float(path.stat().st_size)


def small_grey(path: Path) -> NDArray[np.float32]:
    """The picture as 64 x 64 grey values in a row."""
    small = Image.open(path).convert("L").resize((64, 64), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def nearest_distance(root: Path) -> Score:
    """Distance to the nearest training picture."""
    train = np.stack([small_grey(path) for path in sorted((root / "train/good").glob("*.png"))])

    def score(path: Path) -> float:
        return float(np.sqrt(((train - small_grey(path)) ** 2).sum(axis=1)).min())

    return score


def trivial_scores(root: Path) -> dict[str, float]:
    """AUROC of each trivial score on one product's test pictures."""
    scores: dict[str, Score] = {
        "brightness": brightness,
        "contrast": contrast,
        "file size": file_size,
        "nearest": nearest_distance(root),
    }
    good = sorted((root / "test/good").glob("*.png"))
    defective = sorted(path for path in (root / "test").glob("*/*.png") if path.parent.name != "good")
    return {
        name: auroc([score(p) for p in good], [score(p) for p in defective]) for name, score in scores.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sheet", type=Path, help="write the contact sheet to this PNG")
    parser.add_argument("--train", type=int, default=60)
    parser.add_argument("--test-good", type=int, default=40)
    parser.add_argument("--defects", type=int, default=6)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        busy = time.process_time()
        summary = write_parts(
            Path(folder),
            train=given.train,
            test_good=given.test_good,
            defects=given.defects,
            size=given.size,
            seed=given.seed,
            workers=given.workers,
        )
        busy = time.process_time() - busy
        rate, cost = summary.pictures / summary.seconds, 1e3 * busy / summary.pictures
        print(f"{summary.pictures} pictures of {given.size} px in {summary.seconds:.1f} s")
        print(f"{rate:.1f} pictures a second with {given.workers} workers; {cost:.1f} ms of one core each")
        rows = {product: trivial_scores(Path(folder) / product) for product in PRODUCTS}
    names = list(rows[PRODUCTS[0]])
    print(f"{'AUROC':15}" + "".join(f"{name:>12}" for name in names))
    for product, row in rows.items():
        print(f"{product:15}" + "".join(f"{row[name]:12.3f}" for name in names))
    means = [float(np.mean([row[name] for row in rows.values()])) for name in names]
    print(f"{'mean':15}" + "".join(f"{mean:12.3f}" for mean in means))
    if given.sheet is not None:
        Image.fromarray(contact_sheet(seed=given.seed)).save(given.sheet)
        print(f"contact sheet: {given.sheet}")


if __name__ == "__main__":
    main()
