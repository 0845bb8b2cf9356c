"""The study "attention": does AGPNet's noise help because of where it is? And AGPNet beside other methods.

    python benchmarks/agpnet.py list                     # cells that have no record yet, the first first
    python benchmarks/agpnet.py run                      # fits them
    python benchmarks/agpnet.py run --only ablation -0   # those whose names hold every word
    python benchmarks/agpnet.py table                    # Markdown, from the records

FETTLE_DATA and FETTLE_WEIGHTS name the folders of pictures and weights. Several processes may run at once
where no cell is chosen by two of them. Each cell fits on good training pictures and is evaluated on the test
part after its last step; nothing is chosen by test labels. Cells are named GROUP-DATA-ARM-SEED:

- oneclass: a model a product; PatchCore's and PaDiM's records are those of accuracy.py.
- ablation: AGPNet on the screw, one thing changed at a time, and its first arms on the fabric. "attention"
  has noise on features, both cues, a contrast floor of 1 and two blocks: it is also the "both" of cues, and
  what every other arm is compared with, seed by seed. A difference is called better or worse where it exceeds
  its own deviation.
- multi: four real products in one model; the other methods' records are those of multi_class.py.
- shots1, shots2, shots4: few good pictures.
- backbone: AGPNet on other backbones.
- pasted: how the compact values were chosen, without a test label: two thirds of the screw's good training
  pictures are learnt from; the others, and the same ones with a defect pasted in, are told apart.

The diagnoses are explained in fettle/bench/copying.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from fettle.backbones.registry import DEFAULT_BACKBONE
from fettle.bench import Cell, paired_difference, read_records, run_cells, spread
from fettle.bench.copying import diagnose
from fettle.bench.real_pictures import REAL_PRODUCTS, open_real
from fettle.bench.records import record_path
from fettle.protocols import Json

RECORDS = Path(__file__).parent / "records" / "agpnet"
MULTI_CLASS = Path(__file__).parent / "records" / "multi_class"
ACCURACY = Path(__file__).parent / "records" / "accuracy"
ALONE = ("screw", "fabric")  # products that have models of their own
SEEDS = (0, 1, 2)
STEPS = {"agpnet": 800, "uniad": 2000, "fpfnet": 2000}  # of 16 and of 4 pictures
MULTI_STEPS = 1500
ABLATION_STEPS = 800
REFERENCE = "attention"
FIRST: dict[str, dict[str, Json]] = {  # arms that decide whether it is the place
    REFERENCE: {},
    "none": {"noise": "none"},
    "uniform": {"noise": "uniform"},
    "shuffled": {"noise": "shuffled"},
    "prior": {"cues": "prior"},
    "learned": {"cues": "learned"},
}
LATER: dict[str, dict[str, Json]] = {
    "inverted": {"noise": "inverted"},
    "fixed": {"noise": "fixed"},
    "both_levels": {"levels": "both"},
    "image": {"levels": "image"},
    "momentum_off": {"momentum": 0.0},
    "alpha_constant": {"alpha_schedule": "constant"},
    "alpha_reversed": {"alpha_schedule": "reversed"},
    "floor_0": {"contrast_floor": 0.0},
    "depth_1": {"depth": 1},
    "depth_4": {"depth": 4},
    "taps_16": {"taps": ["stride16"]},
    "taps_8_16_32": {"taps": ["stride8", "stride16", "stride32"]},
}
SHOTS = (1, 2, 4)
CHOICES: dict[str, dict[str, Json]] = {
    "compact": {},
    "weaker": {"alpha_end": 0.5, "beta": 0.1},
    "stronger": {"alpha_end": 2.0, "beta": 0.4},
    "none": {"noise": "none"},
    "taps_8_16_32": {"taps": ["stride8", "stride16", "stride32"]},
    "taps_4_8_16": {"taps": ["stride4", "stride8", "stride16"]},
}
BACKBONES = {"resnet18": 256, "vit_small_patch14": 252}  # framed side, px
KEYS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
DIAGNOSES = ("identity_index", "mask_correlation", "prior_correlation")


def cells() -> Iterator[Cell]:
    """Every cell, the most important first."""
    for seed in SEEDS:
        for data in ALONE:
            for method in ("agpnet", "uniad", "fpfnet"):
                yield cell("oneclass", data, method, seed, method, steps=STEPS.get(method))
    for data in ("magnetic_tile", "battery_weld"):  # beside TFA-Net's
        yield cell("oneclass", data, "fpfnet", 0, "fpfnet", steps=STEPS.get("fpfnet"))
    for data in ALONE:
        for seed in SEEDS:
            for arm, settings in FIRST.items():
                yield ablation(data, arm, seed, settings)
    for seed in SEEDS:
        yield cell("multi", "real", "agpnet", seed, steps=MULTI_STEPS, multi_class=True)
    for seed in SEEDS:
        for arm, settings in LATER.items():
            yield ablation("screw", arm, seed, settings)
    for shots in SHOTS:
        for seed in SEEDS:
            for data in ALONE:
                for method in ("agpnet", "patchcore", "uniad", "fpfnet"):
                    yield cell(f"shots{shots}", data, method, seed, method, shots=shots)
    for arm, settings in CHOICES.items():
        own = {"levels": "feature", **settings}
        yield cell("pasted", "pasted_screw", arm, 0, settings=own, steps=STEPS["agpnet"])
    for seed in SEEDS:
        for backbone, size in BACKBONES.items():
            for data in ALONE:
                more: dict[str, Json] = {"backbone": backbone, "size": size}
                yield cell("backbone", data, backbone, seed, steps=STEPS["agpnet"], **more)


def ablation(data: str, arm: str, seed: int, settings: Mapping[str, Json]) -> Cell:
    """A cell of the ablation; noise is on features alone unless the arm says otherwise."""
    return cell("ablation", data, arm, seed, settings={"levels": "feature", **settings}, steps=ABLATION_STEPS)


def cell(
    group: str,
    data: str,
    arm: str,
    seed: int,
    method: str = "agpnet",
    *,
    settings: Mapping[str, Json] | None = None,
    steps: int | None = None,
    **more: Json,
) -> Cell:
    """One cell; without `steps` the method's own are taken."""
    chosen = {**(settings or {}), **({} if steps is None else {"steps": steps})}
    fit: dict[str, Json] = {"method": method, "seed": seed, "frame": "square", "size": 256, **more}
    return Cell(f"{group}-{data}-{arm}-{seed}", data, {**fit, "settings": chosen} if chosen else fit)


def table() -> None:
    """A table a group and data set, in the order of the cells."""
    records = read_records(RECORDS)
    groups: dict[tuple[str, str], dict[str, dict[int, dict[str, Json]]]] = {}
    for one in cells():
        group, data, arm, seed = one.name.split("-")
        if one.name in records:
            groups.setdefault((group, data), {}).setdefault(arm, {})[int(seed)] = records[one.name]
    for (group, data), arms in groups.items():
        if group == "multi":
            arms |= multi_class_arms()
        if group == "oneclass":
            arms |= memory_arms(data)
        against = arms.get(REFERENCE) if group == "ablation" else None
        compared = [f"{name} less attention's" for name in ("image AUROC", "AUPRO")] if against else []
        products = sorted(REAL_PRODUCTS) if group == "multi" else []
        measured = ["image AUROC", "pixel AUROC", "pixel AP", "AUPRO", "normalised loss"]
        diagnosed = ["identity index", "mask correlation", "prior correlation"] if against else []
        columns = ["arm", "seeds", "steps", *measured, *diagnosed, *compared, *products, "fit, min"]
        print(f"\n### {group}: {data}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for arm, runs in arms.items():
            print(f"| {' | '.join(row(arm, runs, against, products))} |")


def multi_class_arms() -> dict[str, dict[int, dict[str, Json]]]:
    """Records of the other methods on the same pictures, by arm and seed."""
    arms: dict[str, dict[int, dict[str, Json]]] = {}
    for name, record in read_records(MULTI_CLASS).items():
        data, arm, seed = name.split("-")
        if data == "real" and arm in ("patchcore", "uniad", "fpfnet", "uniad_long", "fpfnet_long"):
            arms.setdefault(arm, {})[int(seed)] = record
    return arms


def memory_arms(data: str) -> dict[str, dict[int, dict[str, Json]]]:
    """Records of PatchCore and PaDiM on the default backbone, on the same pictures, by method and seed."""
    name = {"screw": "screw_mixed"}.get(data, data)
    records = read_records(ACCURACY)
    known = {
        method: {seed: records.get(f"{name}-{DEFAULT_BACKBONE}-{method}-square-{seed}") for seed in SEEDS}
        for method in ("patchcore", "padim")
    }
    return {
        method: {seed: record for seed, record in runs.items() if record is not None}
        for method, runs in known.items()
    }


def row(
    arm: str,
    runs: Mapping[int, Mapping[str, Json]],
    against: Mapping[int, Mapping[str, Json]] | None,
    products: Sequence[str],
) -> list[str]:
    """The cells of a table's row: mean ± deviation over seeds, and paired differences."""
    ordered = [runs[seed] for seed in sorted(runs)]
    steps = fact(ordered[0], "steps")
    differences = []
    if against is not None:
        for key in ("image_auroc", "aupro"):
            own, others = (
                {seed: results(run)[key] for seed, run in part.items()} for part in (runs, against)
            )
            differences.append("" if arm == REFERENCE else str(paired_difference(own, others) or "n/a"))
    results_of = [cast("dict[str, Json]", run.get("result", {})) for run in ordered]
    per_product = [cast("dict[str, dict[str, float]]", result.get("per_product")) for result in results_of]
    return [
        arm,
        str(len(ordered)),
        "" if steps is None else f"{steps:.0f}",
        *(spread([results(run)[key] for run in ordered]) for key in KEYS),
        spread([fact(run, "normalised_loss") for run in ordered]),
        *(
            spread([cast("dict[str, float | None]", run.get("extra", {})).get(key) for run in ordered])
            for key in (DIAGNOSES if against else ())
        ),
        *differences,
        *(spread([one[product]["image_auroc"] for one in per_product]) for product in products),
        f"{sum(minutes(run) for run in ordered) / len(ordered):.1f}",
    ]


def results(run: Mapping[str, Json]) -> dict[str, float | None]:
    """Metrics of one product, or their mean over several; the records of accuracy.py are flat."""
    result = cast("dict[str, Json]", run.get("result", run))
    return cast("dict[str, float | None]", result.get("mean", result))


def minutes(run: Mapping[str, Json]) -> float:
    """Of the fit; in the records of accuracy.py of fit and evaluation."""
    seconds = cast("float | None", run.get("seconds_fit"))
    return cast(float, run["minutes"]) if seconds is None else seconds / 60


def fact(run: Mapping[str, Json], name: str) -> float | None:
    return cast("dict[str, float]", run.get("fit", {})).get(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "run", "table"))
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.action == "table":
        sys.exit(table())
    chosen = [one for one in cells() if all(word in one.name for word in arguments.only)]
    if arguments.action == "list":
        missing = [one.name for one in chosen if not record_path(RECORDS, one.name).exists()]
        sys.exit(print("\n".join(missing)))
    if arguments.device != "cpu":
        chosen = [Cell(one.name, one.data, {**one.fit, "device": arguments.device}) for one in chosen]
    for diagnosed in (False, True):
        run_cells(
            [one for one in chosen if one.name.startswith("ablation") == diagnosed],
            open_real,
            RECORDS,
            after=diagnose if diagnosed else None,
            say=lambda sentence: print(sentence, flush=True),
        )
