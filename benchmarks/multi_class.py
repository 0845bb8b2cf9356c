"""Many products in one model: the study arms of UniAD and FPFNet, PatchCore beside them.

    python benchmarks/multi_class.py run                  # every cell that has no record yet
    python benchmarks/multi_class.py run --only real-uniad
    python benchmarks/multi_class.py table                # Markdown, from the records

FETTLE_DATA and FETTLE_WEIGHTS name the folders of pictures and weights. "real" is screw (mixed split),
magnetic tile, battery weld and fabric together; "parts" are all rendered products. Every trained arm has the
same steps, seeds and pictures, and the last step counts. Nothing is chosen by test labels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from fettle.bench import Cell, read_records, run_cells, spread
from fettle.bench.real_pictures import REAL_PRODUCTS, open_real
from fettle.datasets.parts import PRODUCTS, write_parts
from fettle.datasets.products import merge_datasets, open_products
from fettle.datasets.records import Dataset
from fettle.protocols import Json

RECORDS = Path(__file__).parent / "records" / "multi_class"
STEPS = 1000
ARMS: dict[str, tuple[str, dict[str, Json]]] = {
    "uniad": ("uniad", {}),
    "no_perturbation": ("uniad", {"pool": "none"}),
    "fpfnet": ("fpfnet", {}),
    "pool": ("fpfnet", {"fusion": "none"}),
    "pool_base_plus_one": ("fpfnet", {"fusion": "none", "pool": "base_plus_one"}),
    "fusion": ("fpfnet", {"pool": "gaussian"}),
}
LONG = 4000  # steps of the same two methods, to see what more of them gives
ALL_SEEDS = ("uniad", "fpfnet", "no_perturbation")  # on the real pictures; the other arms have one


def cells() -> Iterator[Cell]:
    """Every cell, the most important first."""
    common: dict[str, Json] = {"multi_class": True, "frame": "square", "size": 256}
    for data in ("real", "parts"):
        seeds = (0, 1, 2) if data == "real" else (0,)
        for seed in seeds:
            yield Cell(f"{data}-patchcore-{seed}", data, {**common, "method": "patchcore", "seed": seed})
            for arm, (method, settings) in ARMS.items():
                if seed and arm not in ALL_SEEDS:
                    continue
                chosen: dict[str, Json] = {**settings, "steps": STEPS, "early_stop": 0}
                fit: dict[str, Json] = {**common, "method": method, "settings": chosen, "seed": seed}
                yield Cell(f"{data}-{arm}-{seed}", data, fit)

    for arm in ("uniad", "fpfnet"):
        chosen = {"steps": LONG, "early_stop": 0}
        yield Cell(f"real-{arm}_long-0", "real", {**common, "method": arm, "settings": chosen, "seed": 0})
    for product in REAL_PRODUCTS:  # a model each, with as many steps as the one for all
        chosen = {"steps": STEPS, "early_stop": 0}
        yield Cell(
            f"{product}-uniad-0", product, {**common, "method": "uniad", "settings": chosen, "seed": 0}
        )


def open_data(name: str) -> Dataset:
    if name != "parts":
        return open_real(name) if name == "real" else merge_datasets({name: open_real(name)})
    parts = Path(tempfile.gettempdir()) / "fettle-multi-class-parts"
    if not (parts / "done").exists():
        write_parts(parts, products=PRODUCTS)
        (parts / "done").touch()
    return open_products(parts, PRODUCTS)


def table() -> None:
    """One row an arm: means over products, then each product's image AUROC, and all pooled."""
    records = read_records(RECORDS)
    singles = {product: records.get(f"{product}-uniad-0") for product in REAL_PRODUCTS}
    for data in ("real", "parts"):
        own = {name: record for name, record in records.items() if name.startswith(f"{data}-")}
        if not own:
            continue
        products = sorted(_result(next(iter(own.values())))["per_product"])
        print(f"\n### {data}: {', '.join(products)}\n")
        head = ("arm", "seeds", "normalised loss", "image AUROC", "pixel AUROC", "pixel AP", "AUPRO")
        columns = [*head, *products, "pooled image AUROC", "fit, min"]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for arm in [*ARMS, "uniad_long", "fpfnet_long", "patchcore"]:
            runs = [record for name, record in own.items() if name.rpartition("-")[0] == f"{data}-{arm}"]
            if runs:
                print(f"| {' | '.join(_row(arm, runs, products))} |")
    print("\n### UniAD: a model each, seed 0\n\n| product | image AUROC | pixel AUROC | pixel AP | AUPRO |")
    print("|---|---|---|---|---|")
    for product, record in singles.items():
        if record is not None:
            found = _result(record)["per_product"][product]
            keys = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
            print(f"| {product} | {' | '.join(f'{found[key]:.3f}' for key in keys)} |")


def _row(arm: str, runs: Sequence[Mapping[str, Json]], products: Sequence[str]) -> list[str]:
    facts = [cast("dict[str, float]", run["fit"]) for run in runs]
    means = [_result(run)["mean"] for run in runs]
    keys = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
    return [
        arm,
        str(len(runs)),
        spread([fact["normalised_loss"] for fact in facts]) if "normalised_loss" in facts[0] else "",
        *(spread([mean[key] for mean in means]) for key in keys),
        *(spread([_result(run)["per_product"][name]["image_auroc"] for run in runs]) for name in products),
        spread([_result(run)["pooled"]["image_auroc"] for run in runs]),
        f"{sum(cast(float, run['seconds_fit']) for run in runs) / len(runs) / 60:.0f}",
    ]


def _result(run: Mapping[str, Json]) -> dict[str, dict]:
    return cast("dict[str, dict]", run["result"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    arguments = parser.parse_args()
    if arguments.action == "table":
        sys.exit(table())
    chosen = [cell for cell in cells() if all(word in cell.name for word in arguments.only)]
    run_cells(chosen, open_data, RECORDS, say=lambda sentence: print(sentence, flush=True))
