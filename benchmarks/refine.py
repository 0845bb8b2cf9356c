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
- many: the other methods, one model for all rendered parts; fewer pictures a product.
- chosen: how F2PAD's values were chosen, on defects drawn onto good pictures (`bench.drawn`): the fields that
  were a choice, on 10 pictures with a defect and 5 good ones.

Kinds whose masks are coarse by their source are evaluated apart ("coarse"). No more than so many defective
and good pictures a product are refined, chosen by content; nothing is chosen by a test mask. Rendered
pictures differ in their last bits between kinds of processors, and so may the choice of them: run their
cells on one. The time cap is lifted, so that a busy machine changes no figure.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import cast

from fettle.bench import Cell, read_records, run_cells
from fettle.bench.real_pictures import open_real
from fettle.bench.records import record_path
from fettle.bench.refinement import refine_and_measure
from fettle.datasets.open import open_dataset
from fettle.datasets.parts import PRODUCTS, write_parts
from fettle.datasets.products import open_products
from fettle.datasets.records import Dataset, Record
from fettle.detector import Detector
from fettle.protocols import Json

RECORDS = Path(__file__).parent / "records" / "refine"
SEEDS = (0, 1, 2)
BASES = ("patchcore", "padim", "cflow")  # as in the paper
OTHERS = ("uniad", "fpfnet", "agpnet", "tfanet")
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
MANY_DEFECTIVE, MANY_GOOD = 8, 4
ABLATION_PARTS = 4
CHOSEN_DEFECTIVE, CHOSEN_GOOD = 10, 5
NO_CAP: Mapping[str, object] = {"time_cap_s": 1000.0}
REAL = tuple(FRAMES)
DRAWN = ("fabric", "magnetic_tile", "screw")
STRUCTURAL = (  # kinds whose colours good surface has too
    *("manipulated_front", "thread_side", "thread_top"),
    *("missing", "dent", "broken_pick", "break", "fray", "uneven", "defective"),
)
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
CHOICES = (
    *("default", "kappa_0", "kappa_1", "start_zero", "start_half", "choice_0.6", "free", "share_gauss"),
    *("lambda_0.2", "lambda_1.5", "iters_0", "iters_4", "iters_16", "snap_off"),
)


def cells() -> Iterator[Cell]:
    """Every cell, the most important first."""
    for seed in SEEDS:
        for data in (*FRAMES, *(f"{PARTS}{product}" for product in PRODUCTS)):
            for method in BASES:
                yield cell("main", data, method, "refiners", seed)
        for data in ("screw", "magnetic_tile"):
            for method in BASES:
                yield cell(
                    "ablation", data, method, "fields" if all_rows(method, seed) else "core", seed, SQUARE
                )
    for seed in SEEDS:
        for data in FRAMES:
            for method in OTHERS:
                yield cell("main", data, method, "refiners", seed, SQUARE)  # their grids are square
    for seed in SEEDS:
        for method in OTHERS:
            yield cell("many", "parts", method, "refiners", seed, {**SQUARE, "multi_class": True})
    for data in DRAWN:
        yield cell("chosen", f"drawn_{data}", "patchcore", "choices", 0, SQUARE)


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
    if not name.startswith("parts"):
        return open_real(name)
    folder = Path(tempfile.gettempdir()) / f"fettle-refine-parts-{os.getuid()}"
    if not folder.exists():  # another process may be at it too
        own = folder.with_name(f"{folder.name}-{os.getpid()}")
        write_parts(own, train=60, test_good=10, defects=4)
        with suppress(OSError):
            own.rename(folder)
    return (
        open_products(folder, PRODUCTS)
        if name == "parts"
        else open_dataset(folder / name.removeprefix(PARTS))
    )


def chosen_by_content(records: Sequence[Record], most: int) -> list[Record]:
    """So many of them, by the hash of their bytes."""
    return sorted(records, key=lambda one: hashlib.sha256(one.path.read_bytes()).digest())[:most]


def measure(cell_of: Cell, detector: Detector, dataset: Dataset) -> dict[str, Json]:
    """What a record holds besides: figures by part, refiner or field, and mode."""
    group, data, method, _, seed = cell_of.name.split("-")
    refiners = {name: (name, NO_CAP if name in ("difference", "f2pad") else {}) for name in REFINERS}
    if group == "many":
        return {name: measure_product(detector, dataset, name, refiners) for name in PRODUCTS}
    coarse = COARSE.get(data, ())
    good = chosen_by_content([r for r in dataset.for_testing() if r.is_good], MOST_GOOD)
    defective = [r for r in dataset.for_testing() if not r.is_good and r.mask is not None]
    tight = chosen_by_content([r for r in defective if r.defect not in coarse], MOST_DEFECTIVE)
    loose = chosen_by_content([r for r in defective if r.defect in coarse], MOST_COARSE)
    fields = {
        name: ("f2pad", {**NO_CAP, **fields})
        for name, fields in ABLATIONS.items()
        if name in CORE or all_rows(method, int(seed))
    }
    if group == "ablation":
        return refine_and_measure(detector, {"ablation": tight}, fields)
    if group == "chosen":
        pictures = [*tight[:CHOSEN_DEFECTIVE], *good[:CHOSEN_GOOD]]
        choices = {name: one for name, one in fields.items() if name in CHOICES}
        return refine_and_measure(detector, {"chosen": pictures}, {**refiners, **choices})
    parts = {name: [*own, *good] for name, own in (("tight", tight), ("coarse", loose)) if own}
    found = refine_and_measure(detector, parts, refiners)
    if data.startswith(PARTS):
        found |= refine_and_measure(detector, {"ablation": tight[:ABLATION_PARTS]}, fields)
    return found


def measure_product(
    detector: Detector,
    dataset: Dataset,
    product: str,
    refiners: Mapping[str, tuple[str, Mapping[str, object]]],
) -> Json:
    """Figures of one product of a model of many."""
    own = [record for record in dataset.for_testing() if record.product == product]
    defective = chosen_by_content([record for record in own if record.mask is not None], MANY_DEFECTIVE)
    good = chosen_by_content([record for record in own if record.is_good], MANY_GOOD)
    return refine_and_measure(detector, {"tight": [*defective, *good]}, refiners, product)["tight"]


Figures = Mapping[str, float | None]
Run = Mapping[str, Mapping[str, Figures]]  # of one fit: arm, mode


def table() -> None:
    """Markdown of what there is, means over seeds."""
    records = read_records(RECORDS)
    for title, part, mode in (
        ("Tight masks, every picture refined", "tight", "all"),
        ("Tight masks, as used: verdicts other than ok refined", "tight", "gated"),
        ("Coarse masks, every picture refined", "coarse", "all"),
    ):
        print(f"\n#### {title}: pixel AP / IoU / boundary F\n")
        print_rows(records, "main", part, mode, REFINERS, (*REAL, "parts"), BASES, figures_of)
        if part == "tight":
            print_means(records, part, mode, REFINERS, figures_in)
            print("\nChange of pixel AUROC / AUPRO against the method's own map, points:\n")
            print_rows(records, "main", part, mode, REFINERS[1:], (*REAL, "parts"), BASES, change_of)
            print_means(records, part, mode, REFINERS[1:], changes_in, "+.1f")
    for title, mode in (("every picture refined", "all"), ("as used", "gated")):
        print(f"\n#### The other methods, {title}: pixel AP / IoU / boundary F\n")
        print_rows(records, "main", "tight", mode, REFINERS, REAL, OTHERS, figures_of)
        print("\nChange of pixel AUROC / AUPRO against the method's own map, points:\n")
        print_rows(records, "main", "tight", mode, REFINERS[1:], REAL, OTHERS, change_of)
    print("\n#### One model for all rendered parts: pixel AP / IoU / boundary F\n")
    for words, mode in (("Every picture refined:", "all"), ("As used:", "gated")):
        print(f"\n{words}\n")
        print_rows(records, "many", "tight", mode, REFINERS, ("parts",), OTHERS, figures_of)
        print("\nChange of pixel AUROC / AUPRO, points:\n")
        print_rows(records, "many", "tight", mode, REFINERS[1:], ("parts",), OTHERS, change_of)
    print("\n#### The other methods on coarse masks, every picture refined: pixel AP / IoU / boundary F\n")
    print_rows(records, "main", "coarse", "all", REFINERS, REAL, OTHERS, figures_of)
    for group, structural in (("colours of their own", False), ("structure", True)):
        print(f"\n#### Kinds told by {group}: IoU / boundary F\n")
        show = partial(group_of, structural=structural)
        print_rows(
            records, "main", "tight", "all", ("none", "grabcut", "f2pad"), (*REAL, "parts"), BASES, show
        )
    print("\n#### Ablation, defective pictures: IoU / boundary F\n")
    print_rows(records, "ablation", "ablation", "all", ABLATIONS, ("screw", "magnetic_tile"), BASES, masks_of)
    print()
    print_rows(records, "main", "ablation", "all", ABLATIONS, ("parts",), BASES, masks_of)
    print("\n#### How the values were chosen, drawn defects: pixel AP / IoU / boundary F\n")
    drawn = tuple(f"drawn_{data}" for data in DRAWN)
    print_rows(records, "chosen", "chosen", "all", (*REFINERS, *CHOICES), drawn, ("patchcore",), figures_of)


def print_rows(
    records: Mapping[str, Mapping[str, Json]],
    group: str,
    part: str,
    mode: str,
    arms: Iterable[str],
    of_data: Sequence[str],
    methods: Sequence[str],
    show: Callable[[Sequence[Run], str, str], str],
) -> None:
    """A table: rows by data and arm, a column for each method."""
    print(f"| data | refiner | {' | '.join(methods)} |\n|{'---|' * (len(methods) + 2)}")
    arms = tuple(arms)
    for data in of_data:
        by_method = {method: runs_of(records, group, data, method, part) for method in methods}
        for arm in arms:
            known = {method: [run for run in runs if arm in run] for method, runs in by_method.items()}
            row = [show(runs, arm, mode) if runs else "" for runs in known.values()]
            if any(row):
                print(f"| {data} | {arm} | {' | '.join(row)} |")


def print_means(
    records: Mapping[str, Mapping[str, Json]],
    part: str,
    mode: str,
    arms: Iterable[str],
    figures: Callable[[Run, str, str], Sequence[float | None]],
    form: str = ".3f",
) -> None:
    """Rows of means over the data sets, by refiner, where all are there."""
    of_data = tuple(data for data in (*REAL, "parts") if data != "battery_weld")  # its masks are coarse
    for arm in arms:
        cells = []
        for method in BASES:
            by_data = [runs_of(records, "main", data, method, part) for data in of_data]
            known = by_data if all(by_data) else []
            means = [means_over_seeds([figures(run, arm, mode) for run in runs]) for runs in known]
            cells.append(" / ".join(f"{fmean(values):{form}}" for values in zip(*means, strict=True)))
        print(f"| mean | {arm} | {' | '.join(cells)} |")


def runs_of(
    records: Mapping[str, Mapping[str, Json]], group: str, data: str, method: str, part: str
) -> list[Run]:
    """One for each seed; of "parts" the means over the products, where all are there."""
    if group == "many":
        models = [record_of(records, f"{group}-{data}-{method}-", seed) for seed in SEEDS]
        known = [cast("Mapping[str, Run]", record["extra"]) for record in models if record is not None]
        return [mean_run([own[product] for product in PRODUCTS]) for own in known]
    products = tuple(f"{PARTS}{product}" for product in PRODUCTS) if data == "parts" else (data,)
    found = []
    for seed in SEEDS:
        runs = [
            cast("Mapping[str, Run]", record["extra"])[part]
            for product in products
            for record in [record_of(records, f"{group}-{product}-{method}-", seed)]
            if record is not None and part in cast("Mapping[str, Run]", record["extra"])
        ]
        if len(runs) == len(products):
            found.append(runs[0] if len(runs) == 1 else mean_run(runs))
    return found


def record_of(records: Mapping[str, Mapping[str, Json]], start: str, seed: int) -> Mapping[str, Json] | None:
    names = [name for name in records if name.startswith(start) and name.endswith(f"-{seed}")]
    return records[names[0]] if names else None


def mean_run(runs: Sequence[Run]) -> Run:
    """Means over products; of kinds the mean over the products that have them."""

    def means(parts: Sequence[Figures]) -> dict[str, float | None]:
        keys = [key for key in parts[0] if not isinstance(parts[0][key], dict)]
        known = {key: [one[key] for one in parts if one.get(key) is not None] for key in keys}
        return {key: fmean(cast("list[float]", values)) if values else None for key, values in known.items()}

    found: dict[str, dict[str, dict[str, object]]] = {}
    for arm in runs[0]:
        for mode in runs[0][arm]:
            own = [run[arm][mode] for run in runs]
            kinds: dict[str, list[Figures]] = {}
            for one in own:
                for kind, figures in cast("Mapping[str, Figures]", one["per_defect"]).items():
                    kinds.setdefault(kind, []).append(figures)
            by_kind = {kind: means(of_kind) for kind, of_kind in kinds.items()}
            found.setdefault(arm, {})[mode] = {**means(own), "per_defect": by_kind}
    return cast("Run", found)


def figures_of(runs: Sequence[Run], arm: str, mode: str) -> str:
    return shown([figures_in(run, arm, mode) for run in runs])


def figures_in(run: Run, arm: str, mode: str) -> list[float | None]:
    return [run[arm][mode][key] for key in ("pixel_ap", "iou", "boundary_f")]


def masks_of(runs: Sequence[Run], arm: str, mode: str) -> str:
    return shown([figures_in(run, arm, mode)[1:] for run in runs])


def change_of(runs: Sequence[Run], arm: str, mode: str) -> str:
    return " / ".join(f"{one:+.1f}" for one in means_over_seeds([changes_in(run, arm, mode) for run in runs]))


def changes_in(run: Run, arm: str, mode: str) -> list[float]:
    """Against the method's own map, points."""
    return [
        100 * (cast(float, run[arm][mode][key]) - cast(float, run["none"][mode][key]))
        for key in ("pixel_auroc", "aupro")
    ]


def group_of(runs: Sequence[Run], arm: str, mode: str, *, structural: bool) -> str:
    """Means over the kinds of a group."""
    chosen = [
        [own for kind, own in of_kind.items() if (kind in STRUCTURAL) is structural]
        for of_kind in (cast("Mapping[str, Figures]", run[arm][mode]["per_defect"]) for run in runs)
    ]
    if not all(chosen):
        return ""
    keys = ("iou", "boundary_f")
    return shown([[fmean(own[key] or 0.0 for own in kinds) for key in keys] for kinds in chosen])


def shown(of_seeds: Sequence[Sequence[float | None]]) -> str:
    """Means over seeds, and how many."""
    return f"{' / '.join(f'{mean:.3f}' for mean in means_over_seeds(of_seeds))} ({len(of_seeds)})"


def means_over_seeds(of_seeds: Sequence[Sequence[float | None]]) -> list[float]:
    """Of each figure, over the seeds that have it."""
    return [fmean(one for one in values if one is not None) for values in zip(*of_seeds, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "run", "table"))
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    arguments = parser.parse_args()
    if arguments.action == "table":
        table()
        sys.exit()
    chosen = [one for one in cells() if all(word in one.name for word in arguments.only)]
    if arguments.action == "list":
        missing = [one.name for one in chosen if not record_path(RECORDS, one.name).exists()]
        sys.exit(print("\n".join(missing)))
    for one in chosen:
        run_cells([one], open_data, RECORDS, after=partial(measure, one), say=partial(print, flush=True))
