"""The study "refine": how well masks follow defects, by refiner, for every method.

    python benchmarks/refine.py list                    # cells that have no record yet, the first first
    python benchmarks/refine.py run --only screw -0     # those whose names hold every word
    python benchmarks/refine.py table                   # Markdown, from the records

FETTLE_DATA and FETTLE_WEIGHTS name the folders of pictures and weights. Cells are named
GROUP-DATA-METHOD-ARM-SEED:

- main: every refiner on the real products and on rendered parts. Each picture is refined once whatever its
  verdict; "gated" takes the base map where the verdict is ok, as the product does, "all" does not.
- ablation: F2PAD with one field changed, on defective pictures only, at 256 px: 20 a real product; 4 a
  rendered one, which the main cells refine besides. "fields" are all rows, "core" the few that every base
  and seed gets.
- chosen: how F2PAD's values were chosen, on defects drawn onto good pictures (`bench.drawn`).

Kinds whose masks are coarse by their source are evaluated apart ("coarse"). No more than so many defective
and good pictures a product are refined, chosen by content; nothing is chosen by a test mask. The time cap is
lifted, so that a busy machine changes no figure.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from fettle.bench import Cell, read_records, run_cells, spread
from fettle.bench.real_pictures import open_real
from fettle.bench.records import record_path
from fettle.bench.refinement import refine_and_measure
from fettle.datasets.open import open_dataset
from fettle.datasets.parts import PRODUCTS, write_parts
from fettle.datasets.records import Dataset, Record
from fettle.detector import Detector
from fettle.protocols import Json

RECORDS = Path(__file__).parent / "records" / "refine"
SEEDS = (0, 1, 2)
BASES = ("patchcore", "padim", "cflow")  # as in the paper
OTHERS = ("uniad", "fpfnet", "agpnet", "tfanet")  # one seed
FRAMES: dict[str, dict[str, Json]] = {
    "screw": {"frame": "square", "size": 512},
    "magnetic_tile": {"frame": "native"},
    "fabric": {"frame": "native"},
    "battery_weld": {"frame": "native"},
}
PARTS = "parts_"
SQUARE: dict[str, Json] = {"frame": "square", "size": 256}
COARSE = {
    "magnetic_tile": ("break", "fray", "uneven"),
    "fabric": ("broken_pick",),
    "battery_weld": ("defective",),
}
REFINERS = ("none", "blur", "guided", "grabcut", "difference", "f2pad")
MOST_DEFECTIVE, MOST_COARSE, MOST_GOOD = 20, 10, 10
ABLATION_PARTS = 4
NO_CAP: Mapping[str, object] = {"time_cap_s": 1000.0}
SHOWN = ("pixel_auroc", "pixel_ap", "aupro", "iou", "boundary_f", "hd95")
ABLATIONS: dict[str, dict[str, object]] = {
    "default": {},
    **{f"kappa_{name}": {"kappa": kappa} for name, kappa in (("none", None), ("0", 0.0), ("1", 1.0))},
    **{f"start_{start}": {"start": start} for start in ("zero", "half")},
    **{f"fill_{fill}": {"fill": fill} for fill in ("diffusion", "mean")},
    "turn_off": {"turn": False},
    "judge_off": {"judge": False},
    "choice_0.6": {"choice_lambda": 0.6},
    "floor_zero": {"floor": "zero"},
    "near_off": {"near": False},
    "free": {"form": "free"},
    "free_l1": {"form": "free", "sparsity": "l1"},
    "free_no_sparsity": {"form": "free", "sparsity": "none"},
    **{f"share_{share}": {"share": share} for share in ("none", "gauss")},
    "share_single": {"share": "gauss", "share_sigmas": (0.7,)},
    **{f"lambda_{value}": {"lambda1": value} for value in (0.2, 1.5)},
    "roi_off": {"roi": False},
    "adam": {"step": "adam"},
    **{f"iters_{count}": {"iters": count} for count in (0, 4, 16, 24, 48, 100)},
    **{f"refs_{count}": {"refs": count} for count in (0, 4, 32)},
    **{f"read_{name}": {"read_out": name} for name in ("V", "a")},
    **{f"snap_{name}": {"snap": name} for name in ("off", "always")},
    "acceptance_off": {"acceptance": False},
}
CORE = (
    *("default", "start_zero", "start_half", "fill_diffusion", "fill_mean"),
    *("share_none", "share_gauss", "free", "iters_0"),
)


def cells() -> Iterator[Cell]:
    """Every cell, the most important first."""
    for seed in SEEDS:
        for data in (*FRAMES, *(f"{PARTS}{product}" for product in PRODUCTS)):
            for method in BASES:
                yield cell("main", data, method, "refiners", seed)
    for data in FRAMES:
        for method in OTHERS:
            yield cell("main", data, method, "refiners", 0, SQUARE)  # their grids are square
    for seed in SEEDS:
        for data in ("screw", "magnetic_tile"):
            for method in BASES:
                yield cell(
                    "ablation", data, method, "fields" if all_rows(method, seed) else "core", seed, SQUARE
                )
    for data in FRAMES:
        yield cell("chosen", f"drawn_{data}", "patchcore", "fields", 0, SQUARE)


def all_rows(method: str, seed: int) -> bool:
    """Whether the ablation has every row there."""
    return method == "patchcore" and seed == 0


def cell(
    group: str, data: str, method: str, arm: str, seed: int, frame: Mapping[str, Json] | None = None
) -> Cell:
    own = FRAMES.get(data, SQUARE) if frame is None else frame
    return Cell(f"{group}-{data}-{method}-{arm}-{seed}", data, {"method": method, "seed": seed, **own})


def open_data(name: str) -> Dataset:
    """A real product, one with drawn defects, or rendered parts, whose masks are exact."""
    if not name.startswith(PARTS):
        return open_real(name)
    folder = Path(tempfile.gettempdir()) / f"fettle-refine-parts-{os.getuid()}"
    if not folder.exists():
        write_parts(folder, train=60, test_good=10, defects=4)
    return open_dataset(folder / name.removeprefix(PARTS))


def chosen_by_content(records: Sequence[Record], most: int) -> list[Record]:
    """So many of them, by the hash of their bytes."""
    return sorted(records, key=lambda one: hashlib.sha256(one.path.read_bytes()).digest())[:most]


def measure(cell_of: Cell, detector: Detector, dataset: Dataset) -> dict[str, Json]:
    """What a record holds besides: figures by part, refiner or field, and mode."""
    group, data, method, _, seed = cell_of.name.split("-")
    coarse = COARSE.get(data, ())
    good = chosen_by_content([r for r in dataset.for_testing() if r.is_good], MOST_GOOD)
    defective = [r for r in dataset.for_testing() if not r.is_good and r.mask is not None]
    tight = chosen_by_content([r for r in defective if r.defect not in coarse], MOST_DEFECTIVE)
    loose = chosen_by_content([r for r in defective if r.defect in coarse], MOST_COARSE)
    refiners = {name: (name, NO_CAP if name in ("difference", "f2pad") else {}) for name in REFINERS}
    fields = {
        name: ("f2pad", {**NO_CAP, **fields})
        for name, fields in ABLATIONS.items()
        if name in CORE or all_rows(method, int(seed))
    }
    if group == "ablation":
        return refine_and_measure(detector, {"ablation": tight}, fields)
    if group == "chosen":
        return refine_and_measure(detector, {"chosen": [*tight, *good]}, {**refiners, **fields})
    parts = {"tight": [*tight, *good], "coarse": [*loose, *good]}
    found = refine_and_measure(detector, parts if loose else {"tight": parts["tight"]}, refiners)
    if data.startswith(PARTS):
        found |= refine_and_measure(detector, {"ablation": tight[:ABLATION_PARTS]}, fields)
    return found


def table() -> None:
    """Means over seeds, by data and method."""
    records = read_records(RECORDS)
    found: dict[tuple[str, ...], dict[str, list[dict[str, float]]]] = {}
    for one in cells():
        group, data, method, *_ = one.name.split("-")
        extra = cast("dict[str, Json]", records.get(one.name, {}).get("extra", {}))
        for part, by_arm in cast("dict[str, dict[str, dict[str, dict[str, float]]]]", extra).items():
            for arm, modes in by_arm.items():
                for mode, metrics in modes.items():
                    rows = found.setdefault((group, data, method, part, mode), {})
                    rows.setdefault(arm, []).append(metrics)
    for (group, data, method, part, mode), rows in found.items():
        print(f"\n### {group}: {data}, {method}, {part} masks, {mode}\n")
        print(
            f"| refiner | seeds | {' | '.join(SHOWN)} | s a refined picture |\n|{'---|' * (len(SHOWN) + 3)}"
        )
        for arm, runs in rows.items():
            cells_of = [spread([run[key] for run in runs]) for key in SHOWN]
            seconds = spread([run["seconds_per_refined_image"] for run in runs])
            print(f"| {arm} | {len(runs)} | {' | '.join(cells_of)} | {seconds} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "run", "table"))
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    arguments = parser.parse_args()
    if arguments.action == "table":
        sys.exit(table())
    chosen = [one for one in cells() if all(word in one.name for word in arguments.only)]
    if arguments.action == "list":
        missing = [one.name for one in chosen if not record_path(RECORDS, one.name).exists()]
        sys.exit(print("\n".join(missing)))
    for one in chosen:
        run_cells([one], open_data, RECORDS, after=partial(measure, one), say=partial(print, flush=True))
