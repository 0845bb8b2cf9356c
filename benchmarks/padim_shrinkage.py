"""How much should PaDiM's covariances be shrunk? Asked of good pictures only.

    python benchmarks/padim_shrinkage.py GOOD [--backbone NAME] [--pictures 150]

For each candidate the Gaussian of every position is fitted without one good picture and asked how likely that
picture is; the mean negative log-likelihood per channel says which diagonal fits pictures that were not seen.
Candidates are shares of the mean variance of the features. No test picture and no label is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fettle.backbones import registry
from fettle.datasets.open import open_dataset
from fettle.feature_stream import GoodFeatures
from fettle.gathering import gather_good
from fettle.images.framing import choose_frame
from fettle.methods.padim import Padim, PadimConfig
from fettle.protocols import Run, no_progress

SHARES = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("good", type=Path)
    parser.add_argument("--backbone", default=registry.DEFAULT_BACKBONE)
    parser.add_argument("--pictures", type=int, default=150)
    arguments = parser.parse_args()
    config = PadimConfig(grid_stride=16)  # every sixteenth position is enough to see the minimum
    entry = registry.find_entry(arguments.backbone)
    levels = Padim.choose_levels(entry.levels, config)
    method = Padim(registry.load_backbone(arguments.backbone, levels), config, levels)
    good = gather_good(open_dataset(arguments.good), None, no_progress).pictures[: arguments.pictures]
    frame = choose_frame("square", 256, [], 32)
    stream = GoodFeatures(method, good, frame, device="cpu", progress=no_progress, what="")
    method._choose_channels(Run())
    rows = torch.cat([method._rows(batch.features) for batch in stream], dim=1).double()  # (P, n, d)
    count = rows.shape[1]
    scatter = (rows - rows.mean(1, keepdim=True)).mT @ (rows - rows.mean(1, keepdim=True))
    variance = float(scatter.diagonal(dim1=1, dim2=2).mean()) / (count - 1)
    print(f"{arguments.good.name}, {arguments.backbone}: {count} pictures, mean variance {variance:.4g}")
    for share in SHARES:
        found = loss(rows, scatter, share * variance)
        print(f"  share {share:7.4f}  diagonal {share * variance:8.4g}  {found:.4f}")


def loss(rows: torch.Tensor, scatter: torch.Tensor, diagonal: float) -> float:
    """Mean leave-one-out negative log-likelihood per channel, less its constant."""
    count, dims = rows.shape[1:]
    eye = torch.eye(dims, dtype=rows.dtype)
    total = 0.0
    for i in range(0, count, 3):
        deviation = rows[:, i] - rows.mean(1)  # (P, d)
        without = scatter - deviation[:, :, None] * deviation[:, None] * count / (count - 1)
        covariance = without / (count - 2) + diagonal * eye
        factor = torch.linalg.cholesky(covariance)
        whitened = torch.linalg.solve_triangular(
            factor, (deviation * count / (count - 1))[:, :, None], upper=False
        )
        log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        total += float((whitened.square().sum((1, 2)) + log_det).mean()) / (2 * dims)
    return total / len(range(0, count, 3))


if __name__ == "__main__":
    main()
