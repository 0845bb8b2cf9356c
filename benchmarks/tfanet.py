"""The study "template": TFA-Net beside other methods, with and without masking, and by template.

    python benchmarks/tfanet.py list                     # cells that have no record yet, the first first
    python benchmarks/tfanet.py run                      # fits them
    python benchmarks/tfanet.py run --only screw -0      # those whose names hold every word
    python benchmarks/tfanet.py table                    # Markdown, from the records
    python benchmarks/tfanet.py latency                  # cached template against one encoded each time

FETTLE_DATA and FETTLE_WEIGHTS name the folders of pictures and weights. Several processes may run at once
where no cell is chosen by two of them. Each cell fits on good training pictures and is evaluated on the test
part after its last step; nothing is chosen by test labels. Cells are named GROUP-DATA-ARM-SEED:

- oneclass: a model a product, with half of the input's tokens masked in training and with none. Records of
  PatchCore and PaDiM are those of accuracy.py, FPFNet's those of agpnet.py.
- bank: four products in one model, with a template for each and with one for all.
- template: what the template itself gives; the ablation that changes it alone.
- ablation: one other thing changed at a time.
- orientation: attention against convolutions in its place, where parts lie one way (weld), the same ones in
  four ways (turned weld), and anyhow (screw). Attention's rows for weld and screw are those of oneclass.
- pasted: how the compact values were chosen, without a test label: two thirds of the good training pictures
  are learnt from; the others, and the same ones with a defect pasted in, are told apart.

What is measured besides is explained in fettle/bench/templates.py.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import cast

import torch

from fettle.backbones.registry import DEFAULT_BACKBONE
from fettle.bench import Cell, read_records, run_cells, spread
from fettle.bench.cost import interleaved
from fettle.bench.real_pictures import REAL_PRODUCTS, open_real
from fettle.bench.records import record_path
from fettle.bench.templates import FUSIONS, KEYS, controls, diagnose_template
from fettle.datasets.records import Dataset
from fettle.detector import Detector
from fettle.methods.tfanet import TFANet
from fettle.protocols import Json

HERE = Path(__file__).parent / "records"
RECORDS = HERE / "tfanet"
ALL_SEEDS = ("screw", "fabric")  # the others have one
SEEDS = (0, 1, 2)
STEPS = 1000
MULTI_STEPS = 2000
MASKING: dict[str, dict[str, Json]] = {"masked": {}, "unmasked": {"mask_ratio": 0.0}}
TEMPLATES: dict[str, dict[str, Json]] = {
    "first": {"template": "first"},
    "mean": {"template": "mean"},
    "noise": {"template": "noise"},
    "learned": {"template": "learned"},
}
OTHERS: dict[str, dict[str, Json]] = {
    "keep_input": {"discard": "keep_input", "mask_mode": "token"},
    "no_template": {"discard": "no_template", "mask_mode": "token"},
    "mask_token": {"mask_mode": "token"},
    "mask_25": {"mask_ratio": 0.25},
    "mask_75": {"mask_ratio": 0.75},
    "mask_random": {"mask_ratio": "random"},
    "cross": {"aggregation": "cross"},
    "no_residual": {"residual": "none"},
    "residual_template": {"residual": "template"},
    "no_direction": {"lambda_dir": 0.0},
    "no_norm": {"feature_norm": "none"},
    "jitter": {"pool": "gaussian"},
}
CONVOLUTION: dict[str, Json] = {"mask_mode": "token", "aggregation": "convolution"}
ORIENTED = ("battery_weld", "turned_battery_weld", "screw")
BANKS: dict[str, dict[str, Json]] = {"bank": {}, "one": {"template_bank": "one"}}
CHOICES: dict[str, dict[str, Json]] = {
    "compact": {},
    "no_residual": {"residual": "none"},
}
CHOICE_STEPS = 400
NUM_OTHER_TEMPLATES = 5
MOST_LOOKED_AT = 200  # test pictures that diagnoses are made on


def cells() -> Iterator[Cell]:
    """Every cell, the most important first."""
    for seed in SEEDS:
        for data in REAL_PRODUCTS:
            if seed == 0 or data in ALL_SEEDS:
                for arm, settings in MASKING.items():
                    yield cell("oneclass", data, arm, seed, settings)
    for data in ORIENTED:
        yield cell("orientation", data, "convolution", 0, CONVOLUTION)
    yield cell("orientation", "turned_battery_weld", "attention", 0, {})
    for arm, settings in BANKS.items():
        yield cell("bank", "real", arm, 0, settings, steps=MULTI_STEPS, multi_class=True)
    for group, arms in (("template", TEMPLATES), ("ablation", OTHERS)):
        for arm, settings in arms.items():
            yield cell(group, "magnetic_tile", arm, 0, settings)
    yield from choices()


def choices() -> Iterator[Cell]:
    """Cells without a real defect."""
    for data in ALL_SEEDS:
        for arm, settings in CHOICES.items():
            yield cell("pasted", f"pasted_{data}", arm, 0, settings, steps=CHOICE_STEPS)


def cell(
    group: str, data: str, arm: str, seed: int, settings: Mapping[str, Json], steps: int = STEPS, **more: Json
) -> Cell:
    fit: dict[str, Json] = {"method": "tfanet", "seed": seed, "frame": "square", "size": 256, **more}
    return Cell(f"{group}-{data}-{arm}-{seed}", data, {**fit, "settings": {**settings, "steps": steps}})


def look_again(detector: Detector, dataset: Dataset) -> dict[str, Json] | None:
    """What a one-class cell's record holds besides with seed 0: diagnoses, other templates, and the controls
    where nothing was trained."""
    method = cast(TFANet, detector.method)
    if detector.product_calibrations or not len(method.bank) or method.config.discard != "template":
        return None
    if dataset.root.name.startswith("fettle-pasted"):
        return diagnose_template(detector, dataset)
    if detector.card["seed"] != 0:
        return None
    few = first_by_content(dataset, MOST_LOOKED_AT)
    found = diagnose_template(detector, few, others=NUM_OTHER_TEMPLATES)
    return {**found, "controls": controls(detector, few)}


def first_by_content(dataset: Dataset, most: int) -> Dataset:
    """With so many of its test pictures, chosen by the hash of their bytes."""
    tested = sorted(dataset.for_testing(), key=lambda one: hashlib.sha256(one.path.read_bytes()).digest())
    left_out = set(map(id, tested[most:]))
    return replace(dataset, records=tuple(r for r in dataset.records if id(r) not in left_out))


def table() -> None:
    """Tables of the records, in the order of the cells."""
    records = read_records(RECORDS)
    groups: dict[tuple[str, str], dict[str, list[dict[str, Json]]]] = {}
    for one in cells():
        group, data, arm, _ = one.name.split("-")
        if one.name in records:
            groups.setdefault((group, data), {}).setdefault(arm, []).append(records[one.name])
    for (group, data), arms in groups.items():
        print(f"\n### {group}: {data}\n")
        columns = ["arm", "seeds", "image AUROC", "pixel AUROC", "pixel AP", "AUPRO", "normalised loss"]
        columns += ["own-token share x tokens", "fit, min"]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        if group == "oneclass":
            arms |= neighbours(data)
        own = records.get(f"oneclass-{data}-masked-0")
        if group == "orientation" and own is not None:
            arms["attention"] = [own]
        for arm, runs in arms.items():
            print(f"| {' | '.join(row(arm, runs))} |")
        if group == "oneclass":
            looked_at(arms)


def looked_at(arms: Mapping[str, list[dict[str, Json]]]) -> None:
    """Ways of joining the maps, other templates, and the controls."""
    print(f"\n| arm | what | {' | '.join(KEYS)} |\n|---|---|{'---|' * len(KEYS)}")
    for arm in MASKING:
        extras = [cast("dict[str, Json]", run["extra"]) for run in arms.get(arm, []) if "extra" in run]
        parts: dict[str, list[dict[str, float]]] = {}
        for extra in extras:
            for name in FUSIONS:
                own = cast("dict[str, dict[str, float]]", extra["fusion"])[name]
                parts.setdefault(f"map: {name}", []).append(own)
            parts.setdefault("other templates", []).extend(
                cast("list[dict[str, float]]", extra.get("templates", []))
            )
            for name, own in cast("dict[str, dict[str, float]]", extra.get("controls", {})).items():
                parts.setdefault(f"nothing trained: {name}", []).append(own)
        for what, rows in parts.items():
            print(f"| {arm} | {what} | {' | '.join(spread([one[key] for one in rows]) for key in KEYS)} |")


def neighbours(data: str) -> dict[str, list[dict[str, Json]]]:
    """Records of other methods on the same pictures."""
    own = {"screw": "screw_mixed"}.get(data, data)
    accuracy, agpnet = read_records(HERE / "accuracy"), read_records(HERE / "agpnet")
    found = {
        method: [accuracy.get(f"{own}-{DEFAULT_BACKBONE}-{method}-square-{seed}") for seed in SEEDS]
        for method in ("patchcore", "padim")
    }
    for method in ("fpfnet", "agpnet"):
        found[method] = [agpnet.get(f"oneclass-{data}-{method}-{seed}") for seed in SEEDS]
    return {
        method: known for method, runs in found.items() if (known := [run for run in runs if run is not None])
    }


def row(arm: str, runs: list[dict[str, Json]]) -> list[str]:
    """The cells of a table's row: mean ± deviation over seeds."""
    results = [cast("dict[str, Json]", run.get("result", run)) for run in runs]
    metrics = [cast("dict[str, float]", result.get("mean", result)) for result in results]
    facts = [cast("dict[str, float]", run.get("fit", {})) for run in runs]
    extras = [cast("dict[str, float]", run.get("extra", {})) for run in runs]
    shares = [one["own_token_share"] * one["tokens"] for one in extras if "tokens" in one]
    minutes = [cast(float, run["seconds_fit"]) / 60 for run in runs if "seconds_fit" in run]
    return [
        arm,
        str(len(runs)),
        *(spread([one[key] for one in metrics]) for key in KEYS),
        spread([one.get("normalised_loss") for one in facts]),
        spread(shares),
        f"{sum(minutes) / len(minutes):.1f}" if minutes else "",
    ]


def latency(device: str) -> None:
    """One picture with the template's tokens kept, against encoding the template each time, in turns."""
    print(f"| preset | backbone | ratio | kept, ms | encoded each time, ms |\n|{'---|' * 5}")
    presets = {"compact": (DEFAULT_BACKBONE, None), "paper": ("wide_resnet50_2.tv_in1k", "random")}
    for preset, (backbone, weights) in presets.items():
        times = template_times(preset, backbone, weights, device)
        kept, anew = (1000 * median(column) for column in zip(*times, strict=True))
        ratio = median(other / own for own, other in times)
        print(f"| {preset} | {backbone} | {ratio:.2f} | {kept:.1f} | {anew:.1f} |")


def template_times(preset: str, backbone: str, weights: str | None, device: str) -> list[tuple[float, float]]:
    """Seconds of both ways, in turns; the network is fitted for a step only."""
    good = [record.path for record in open_real("fabric").good_for_training()][:10]
    settings: dict[str, Json] = {"steps": 1, "epochs": None, "batch": 1}
    detector = Detector.fit(
        good,
        **{"method": "tfanet", "preset": preset, "backbone": backbone, "weights": weights},
        **{"settings": settings, "device": device, "cache_mib": 0},
    )
    method = cast(TFANet, detector.method)
    pictures = torch.rand(1, 3, detector.frame.height, detector.frame.width).to(device)
    valid = torch.ones_like(pictures[:, :1], dtype=torch.bool)
    template = torch.rand_like(pictures)

    def kept() -> object:
        return method(pictures, valid)

    def encoded() -> object:
        method.bank.tokens = method.net.embed(method.target(template))
        return method(pictures, valid)

    return interleaved(kept, encoded, rounds=15 if preset == "compact" else 5, device=device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "run", "table", "latency"))
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.action == "table":
        sys.exit(table())
    if arguments.action == "latency":
        sys.exit(latency(arguments.device))
    chosen = [one for one in cells() if all(word in one.name for word in arguments.only)]
    if arguments.action == "list":
        missing = [one.name for one in chosen if not record_path(RECORDS, one.name).exists()]
        sys.exit(print("\n".join(missing)))
    if arguments.device != "cpu":
        chosen = [Cell(one.name, one.data, {**one.fit, "device": arguments.device}) for one in chosen]
    run_cells(chosen, open_real, RECORDS, after=look_again, say=lambda sentence: print(sentence, flush=True))
