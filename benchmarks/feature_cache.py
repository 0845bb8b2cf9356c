"""What an epoch costs with the feature cache and without it, and whether both end at the same weights.

    OMP_NUM_THREADS=1 python benchmarks/feature_cache.py [PRODUCTS ...] [--epochs 3] [--most 48]

PRODUCTS are folders of good pictures or labelled data sets, learnt by one model (default: every product in
the folder that FETTLE_DATA names). UniAD's compact setting is trained three times from the same seed: without
a cache, with an empty one, and with the one that the second training filled. "prepare" is the walk before the
first step, which fills the cache; "epoch" is the mean over the epochs, "features" the part of it in which the
head waits for its batches. Ends with an error where the weights are not equal bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fettle.backbones.registry import DEFAULT_BACKBONE, find_entry, load_backbone
from fettle.datasets.open import open_dataset
from fettle.errors import DataError
from fettle.feature_cache import TrainingPictures
from fettle.feature_stream import GoodPicture
from fettle.gathering import gather_good
from fettle.images.framing import Frame, choose_frame
from fettle.methods.uniad import Uniad, UniadConfig
from fettle.protocols import Batch, Run, no_progress
from fettle.training import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("products", type=Path, nargs="*")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--most", type=int, default=48, help="pictures of all products together")
    parser.add_argument("--size", type=int, default=256)
    arguments = parser.parse_args()
    pictures, sizes = good_pictures(arguments.products or known_products(), arguments.most)
    config = UniadConfig(epochs=arguments.epochs)
    levels = Uniad.choose_levels(find_entry(arguments.backbone).levels, config)
    backbone = load_backbone(arguments.backbone, levels, weights=arguments.weights)
    frame = choose_frame("square", arguments.size, sizes, backbone.spec.side_step)
    num_products = len({picture.product for picture in pictures})
    print(
        f"uniad, {arguments.backbone}, {len(pictures)} pictures of {num_products} products, "
        f"{arguments.size} px, {torch.get_num_threads()} threads"
    )
    print("cache     prepare s  epoch s  features s  epoch ms a picture")
    epochs: dict[str, float] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cache_dir in (("none", None), ("empty", Path(folder)), ("filled", Path(folder))):
            run = Run(cache_dir=cache_dir)
            method = Uniad(backbone, config, levels)
            prepare, epochs[name], features = train_once(method, pictures, frame, run, arguments.epochs)
            weights[name] = {key: value.clone() for key, value in method.state_dict().items()}
            each = 1000 * epochs[name] / len(pictures)
            print(
                f"{name:8s}  {prepare:9.2f}  {epochs[name]:7.3f}  {features:10.3f}  {each:18.1f}", flush=True
            )
        stored = [path.stat().st_size for path in Path(folder).iterdir()]
    print(f"{sum(stored) / len(pictures) / 1024:.0f} KiB a picture on disk")
    print(f"epoch without the cache / with it: {epochs['none'] / epochs['filled']:.2f}")
    same = all(
        torch.equal(value, weights[name][key])
        for name in ("empty", "filled")
        for key, value in weights["none"].items()
    )
    print(f"weights equal bit for bit: {'yes' if same else 'no'}")
    sys.exit(0 if same else 1)


class TimedPictures(TrainingPictures):
    """Counts the seconds that batches take."""

    seconds = 0.0

    def batch(self, indices: Sequence[int], *, pictures: bool = False) -> Batch:
        start = time.perf_counter()
        batch = super().batch(indices, pictures=pictures)
        self.seconds += time.perf_counter() - start
        return batch


def train_once(
    method: Uniad, pictures: list[GoodPicture], frame: Frame, run: Run, epochs: float
) -> tuple[float, float, float]:
    """Seconds for the preparation, for an epoch, and for an epoch's batches."""
    start = time.perf_counter()
    stream = TimedPictures(method, pictures, frame, run)
    method.prepare(stream, run)
    prepared = time.perf_counter()
    train(method, stream, run)
    return prepared - start, (time.perf_counter() - prepared) / epochs, stream.seconds / epochs


def known_products() -> list[Path]:
    """The labelled products that FETTLE_DATA holds."""
    folder = os.environ.get("FETTLE_DATA")
    if not folder:
        sys.exit("Name products, or set FETTLE_DATA to the folder of real pictures.")
    return [path.parent for path in sorted(Path(folder).glob("*/train"))]


def good_pictures(products: list[Path], most: int) -> tuple[list[GoodPicture], list[tuple[int, int]]]:
    """Good pictures with their sizes, as many of each product."""
    pictures: list[GoodPicture] = []
    sizes: list[tuple[int, int]] = []
    for product in products:
        try:
            good = gather_good(open_dataset(product), None, no_progress)
        except DataError as error:
            sys.exit(str(error))
        for one in good.pictures[: max(most // len(products), 2)]:
            pictures.append(GoodPicture(one.path, one.key, one.group, product.name))
            sizes.append(good.sizes[one.key])
    return pictures, sizes


if __name__ == "__main__":
    main()
