"""Time of a coreset pick: exact selection in rounds against two ways of one pick after another.

    python benchmarks/coreset.py [--rows 51200] [--dims 267] [--picks 5120] [--features FILE] [--all]

All three start at the same row of the same rows, in one process on one thread. The two slow ways are timed
on the first picks only, unless --all. FILE is a torch file of features, (..., D).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fettle.layers.coreset import draw_projection, predict, project, select_greedy


def in_place(rows: Tensor, num_picks: int, start: int) -> list[int]:
    """One matrix-vector product a pick, half squared distances, everything in place."""
    half_norms = rows.square().sum(1) / 2
    keys, buffer = torch.full_like(half_norms, torch.inf), torch.empty_like(half_norms)
    picks = [start]
    while len(picks) < num_picks:
        pick = picks[-1]
        torch.addmv(half_norms, rows, rows[pick], alpha=-1, out=buffer).add_(half_norms[pick])
        torch.minimum(keys, buffer, out=keys)
        keys[pick] = -1
        picks.append(int(keys.argmax()))
    return picks


def difference_and_norm(rows: Tensor, num_picks: int, start: int) -> list[int]:
    """The usual implementation: the norm of the difference to all rows, a pick at a time."""
    distances: Tensor | None = None
    picks = [start]
    while len(picks) < num_picks:
        pick = picks[-1]
        to_pick = torch.linalg.norm(rows - rows[pick : pick + 1], ord=2, dim=1, keepdim=True)
        distances = to_pick if distances is None else torch.minimum(distances, to_pick)
        distances[pick] = 0
        picks.append(int(distances.argmax()))
    return picks


def synthetic(num_rows: int, dims: int) -> Tensor:
    """Clustered rows with correlated columns."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, dims, generator=generator)
    spread = torch.randn(30, dims, generator=generator)
    cluster = torch.randint(200, (num_rows,), generator=generator)
    return centres[cluster] + 0.3 * torch.randn(num_rows, 30, generator=generator) @ spread


def timed(select: Callable[[], list[int]]) -> tuple[list[int], float]:
    begin = time.process_time()
    picks = select()
    return picks, 1000 * (time.process_time() - begin) / len(picks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=51_200)
    parser.add_argument("--dims", type=int, default=267)
    parser.add_argument("--picks", type=int, default=5_120)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--all", action="store_true", help="let the slow ways pick as many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.features:
        features = torch.load(options.features, weights_only=True)
        features = features.reshape(-1, features.shape[-1])[: options.rows]
        generator = torch.Generator().manual_seed(0)
        rows = project(features, draw_projection(features.shape[1], len(features), generator))
    else:
        rows = project(synthetic(options.rows, options.dims), None)
    seconds, mib = predict(len(rows), rows.shape[1], options.picks)
    print(
        f"{len(rows)} rows x {rows.shape[1]}, {options.picks} picks; predicted {seconds:.1f} s, {mib:.0f} MiB"
    )

    rounds, base = timed(lambda: select_greedy(rows, options.picks).indices.tolist())
    band = 4e-6 * float(rows.square().sum(1).max())
    print(f"{'way':24} {'ms a pick':>10} {'times':>7}  picks like the exact rounds'")
    print(f"{'exact, in rounds':24} {base:10.3f} {1:7.1f}")
    for name, way, few in (
        ("in place, one by one", in_place, 500),
        ("difference and norm", difference_and_norm, 200),
    ):
        count = options.picks if options.all else min(few, options.picks)
        picks, each = timed(lambda way=way, count=count: way(rows, count, rounds[0]))
        same = sum(ours == theirs for ours, theirs in zip(rounds, picks, strict=False))
        shared = len(set(picks) & set(rounds[:count]))
        print(f"{name:24} {each:10.3f} {each / base:7.1f}  {same} of {count} in order, {shared} in the set")
    print(f"(squared distances within {band:.3g} of each other may swap two picks: float32)")


if __name__ == "__main__":
    main()
