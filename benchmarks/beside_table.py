"""The tables of `beside_anomalib.py`: Markdown from its records. What was not measured is "not run"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from statistics import fmean
from typing import Any

from fettle.metrics.ranking import image_auroc

Records = Mapping[str, Mapping[str, Any]]
NOT_RUN = "not run"
PRODUCTS = ("screw", "magnetic_tile", "battery_weld", "fabric")
DEFAULT = "default-fabric-50-openvino"


def tables(records: Records) -> list[str]:
    """Every table, with its title."""
    parts = (targets, fits, inference, folders, accuracy, exports, starts)
    return [f"#### {part.__doc__}\n\n{part(records)}" for part in parts]


def found(records: Records, name: str, *keys: str) -> Any:
    """What a record says, None where there is no such record or entry."""
    value: Any = records.get(name, {}).get("found")
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def turns(records: Records, start: str, *keys: str) -> float | None:
    """The mean over the turns of a measurement."""
    values = [found(records, name, *keys) for name in records if name[: name.rfind("-")] == start]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def shown(value: float | None, form: str = ".1f") -> str:
    return NOT_RUN if value is None else f"{value:,{form}}"


def ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- figures


def selection_ms(records: Records, name: str, *keys: str) -> float | None:
    """CPU milliseconds a pick."""
    seconds, picks = found(records, name, *keys, "cpu_s"), found(records, name, *keys, "picks")
    return None if seconds is None else 1000 * seconds / picks


def rate(records: Records, start: str, clock: str) -> float | None:
    """Pictures a second of a folder, without the start."""
    pictures, seconds = turns(records, start, "pictures"), turns(records, start, "loop", clock)
    return ratio(pictures, seconds)


def whole_rate(records: Records, start: str, clock: str) -> float | None:
    """Pictures a second of the whole process."""
    pictures = turns(records, start, "pictures")
    of_turns = [
        record["process"][clock] for name, record in records.items() if name[: name.rfind("-")] == start
    ]
    return ratio(pictures, fmean(of_turns) if of_turns else None)


def auroc(records: Records, product: str, side: str) -> float | None:
    """Of the scores in a record; a picture is good if its folder says so. Square pictures stay square."""
    scores = found(records, f"accuracy-score-{product}-{side}", "scores")
    if scores is None and side == "square" and product in ("screw", "fabric"):
        return auroc(records, product, "fettle")
    if scores is None:
        return None
    return image_auroc(list(scores.values()), [PurePath(path).parent.name != "good" for path in scores])


def mean_auroc(records: Records, side: str) -> float | None:
    values = [auroc(records, product, side) for product in PRODUCTS]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(PRODUCTS) else None


def estimate(records: Records, pictures: int) -> float | None:
    """anomalib's PatchCore fit of more pictures: its selection by picks times rows, the rest by pictures."""
    at_50 = found(records, "fit-patchcore-fabric-50-anomalib", "learnt", "cpu_s")
    selection = found(records, "fit-patchcore-fabric-50-anomalib", "selection", "cpu_s")
    if at_50 is None:
        return None
    times: float = pictures / 50
    return float(times**2 * selection + times * (at_50 - selection))


# --- tables


def targets(records: Records) -> str:
    """Targets"""
    theirs, ours = "fit-patchcore-fabric-50-anomalib", "fit-patchcore-fabric-50-fettle"
    added, peak = ("learnt", "added_mib"), ("whole", "peak_mib")
    padim = {number: found(records, f"fit-padim-screw-{number}-fettle", *added) for number in (50, 200, 280)}
    large = [found(records, f"memory-patchcore-screw-200-{side}", *added) for side in ("anomalib", "fettle")]
    cpu = ("learnt", "cpu_s")
    rows: list[tuple[str, str, float | None, Callable[[float], bool], str]] = [
        row(
            "PatchCore fit, 50 pictures", 20, ratio(found(records, theirs, *cpu), found(records, ours, *cpu))
        ),
        row(
            "the same, 100 pictures, anomalib's estimated",
            20,
            ratio(estimate(records, 100), found(records, "fit-patchcore-fabric-100-fettle", *cpu)),
        ),
        row(
            "selection alone, the same rows and first row",
            30,
            ratio(
                selection_ms(records, theirs, "selection"),
                selection_ms(records, "select-patchcore-fabric-50"),
            ),
        ),
        row(
            "memory that the PatchCore fit adds, 50 pictures, the same bank",
            2,
            ratio(found(records, theirs, *added), found(records, ours, *added)),
        ),
        row(
            "peak of that process, the whole fit",
            2,
            ratio(found(records, theirs, *peak), found(records, ours, *peak)),
        ),
        row("memory that the PatchCore fit adds, 200 pictures, Fettle's default bank", 2, ratio(*large)),
        row(
            "memory that the PaDiM fit adds, 200 pictures",
            2,
            ratio(found(records, "fit-padim-screw-200-anomalib", *added), padim[200]),
        ),
        flat("PaDiM's memory, 200 pictures over 50", ratio(padim[200], padim[50])),
        flat("PaDiM's memory, 280 pictures over 50", ratio(padim[280], padim[50])),
        row("one picture, PatchCore", 1.7, inference_ratio(records, "patchcore")),
        row("one picture, PaDiM", 1.4, inference_ratio(records, "padim")),
        row("folder to results, the same model", 2, folder_ratio(records, "patchcore-fabric-50", rate)),
        row("folder to results, default model in OpenVINO", 2, folder_ratio(records, DEFAULT, rate)),
        row(
            "`--help`",
            12,
            ratio(
                found(records, "start-anomalib", "help", "cpu_s"),
                found(records, "start-fettle", "help", "cpu_s"),
            ),
        ),
        lost("mean image AUROC lost, default model, points", records, "fettle"),
        lost("the same with --frame square", records, "square"),
    ]
    return markdown(
        ("what", "target", "measured", "met"),
        (
            (what, target, shown(value, form), NOT_RUN if value is None else "yes" if met(value) else "no")
            for what, target, value, met, form in rows
        ),
    )


def row(
    what: str, least: float, value: float | None
) -> tuple[str, str, float | None, Callable[[float], bool], str]:
    """A target that is a least ratio of anomalib's figure to Fettle's, or of Fettle's rate to anomalib's."""
    return what, f"{least} times", value, lambda found: found >= least, ".1f"


def flat(what: str, value: float | None) -> tuple[str, str, float | None, Callable[[float], bool], str]:
    """A target that a figure does not grow, by more than a twentieth."""
    return what, "flat", value, lambda found: found <= 1.05, ".2f"


def lost(
    what: str, records: Records, side: str
) -> tuple[str, str, float | None, Callable[[float], bool], str]:
    """A target that anomalib's mean AUROC is at most one point higher."""
    theirs, ours = mean_auroc(records, "anomalib"), mean_auroc(records, side)
    value = None if theirs is None or ours is None else 100 * (theirs - ours)
    return what, "1", value, lambda found: found <= 1, ".1f"


def inference_ratio(records: Records, method: str) -> float | None:
    sides = [turns(records, f"infer-{method}-{side}", "whole", "cpu_ms") for side in ("anomalib", "fettle")]
    return ratio(*sides)


def folder_ratio(
    records: Records, model: str, of: Callable[[Records, str, str], float | None], clock: str = "wall_s"
) -> float | None:
    return ratio(of(records, f"folder-fettle-{model}", clock), of(records, "folder-anomalib", clock))


def fits(records: Records) -> str:
    """Fits: CPU seconds, and MiB that they add to the process"""
    rows = []
    for model in (
        "patchcore-fabric-50",
        "patchcore-fabric-100",
        "patchcore-screw-200",
        "padim-screw-50",
        "padim-screw-200",
        "padim-screw-280",
    ):
        for side in ("anomalib", "fettle"):
            name = f"fit-{model}-{side}"
            method, data, number = model.split("-")
            if name not in records and name.startswith("fit-padim-screw-280"):
                continue
            if name not in records and side == "anomalib" and method == "patchcore":
                guess = shown(estimate(records, int(number)), ".0f")
                rows.append(
                    (method, data, number, side, f"{guess} (estimated)", NOT_RUN, NOT_RUN, NOT_RUN, NOT_RUN)
                )
                continue
            rows.append(
                (
                    method,
                    data,
                    number,
                    side,
                    shown(found(records, name, "learnt", "cpu_s")),
                    "" if method == "padim" else shown(selection_ms(records, name, "selection"), ".2f"),
                    shown(found(records, name, "whole", "cpu_s")),
                    shown(found(records, name, "learnt", "added_mib"), ".0f"),
                    shown(found(records, name, "whole", "peak_mib"), ".0f"),
                )
            )
    head = ("method", "pictures of", "number", "side", "learnt", "ms a pick", "whole", "added", "peak, all")
    return f"{markdown(head, rows)}\n\n{picks(records)}"


def picks(records: Records) -> str:
    """In words, how the two selections compare."""
    name = "select-patchcore-fabric-50"
    if name not in records:
        return f"Selection on the same rows: {NOT_RUN}."
    told = records[name]["found"]
    first = told["first_difference"]
    where = "every pick is the same"
    if first is not None:
        where = f"at the first that differs, number {first}, distances are {told['gap_there']:.1e} apart"
    return (
        f"Selection on the same {told['rows'][0]:,} rows of {told['rows'][1]}, from the same first row: "
        f"{told['shared']:,} of {told['picks']:,} picks are in both sets, {told['same_place']:,} in the same "
        f"place; {where}. The banks' radii are {told['radius_anomalib']:.6f} and {told['radius_fettle']:.6f}."
    )


def inference(records: Records) -> str:
    """One picture alone: CPU milliseconds"""
    rows = []
    for method in ("patchcore", "padim"):
        for side in ("anomalib", "fettle"):
            start = f"infer-{method}-{side}"
            cells = [
                shown(turns(records, start, key, "cpu_ms"))
                for key in ("whole", "backbone", "openvino", "onnx")
            ]
            if side == "anomalib":
                cells[2:] = [
                    shown(found(records, f"export-{format_}-anomalib", "one", "latency", "cpu_ms"))
                    if method == "patchcore"
                    else NOT_RUN
                    for format_ in ("openvino", "onnx")
                ]
            rows.append((method, side, *cells))
    return markdown(("method", "side", "PyTorch", "its backbone", "OpenVINO", "ONNX Runtime"), rows)


def folders(records: Records) -> str:
    """Folder to results: pictures a second"""
    starts = {"anomalib, PatchCore on ResNet-18": "folder-anomalib"}
    for model in ("patchcore-fabric-50", "default-fabric-50-onnx", DEFAULT):
        starts[f"Fettle, {model.replace('-fabric-50', '').replace('-', ' in ')}"] = f"folder-fettle-{model}"
    head = ("what", "wall", "CPU", "wall with the start", "CPU with the start", "files written")
    return markdown(
        head,
        (
            (
                what,
                *(
                    shown(of(records, start, clock))
                    for of in (rate, whole_rate)
                    for clock in ("wall_s", "cpu_s")
                ),
                shown(turns(records, start, "files"), ".0f"),
            )
            for what, start in starts.items()
        ),
    )


def accuracy(records: Records) -> str:
    """Image AUROC"""
    rows = [
        (
            "fettle, --frame square" if side == "square" else side,
            *(shown(auroc(records, product, side), ".3f") for product in PRODUCTS),
            shown(mean_auroc(records, side), ".3f"),
        )
        for side in ("anomalib", "fettle", "square")
    ]
    return markdown(("side", *PRODUCTS, "mean"), rows)


def exports(records: Records) -> str:
    """Exports: largest relative difference of a score from the model's, by size of batch"""
    rows = []
    for format_ in ("onnx", "openvino"):
        for way in ("default", "size", "one"):
            own = found(records, f"export-{format_}-anomalib", way)
            cells = [NOT_RUN] * 3 if own is None else [difference(own, size) for size in ("1", "2", "8")]
            rows.append((format_, f"anomalib, {way}", *cells))
        for name, model in (
            (f"export-{format_}-fettle", "PatchCore"),
            (f"export-{format_}-padim-fettle", "PaDiM"),
        ):
            away = found(records, name, "parity", "max_score_diff")
            rows.append((format_, f"Fettle, {model}", *[shown(away, ".1e")] * 3))
    return markdown(("format", "side", "1", "2", "8"), rows)


def difference(own: Mapping[str, Any], size: str) -> str:
    if "export_error" in own:
        return "no export"
    return "refused" if "error" in own[size] else shown(own[size]["max_score_diff"], ".1e")


def starts(records: Records) -> str:
    """Start-up: wall seconds (CPU seconds), and MiB installed"""
    keys = {
        "`--help`": "help",
        "`import anomalib.models`, `import fettle`": "import",
        "import of torch": "import_torch",
    }
    sides = ("anomalib", "fettle")
    rows = []
    for what, key in keys.items():
        cells = [
            f"{shown(found(records, f'start-{side}', key, 'wall_s'), '.2f')} "
            f"({shown(found(records, f'start-{side}', key, 'cpu_s'), '.2f')})"
            for side in sides
        ]
        rows.append((what, *cells))
    sizes = [[found(records, f"size-{side}", key) for key in ("all_mib", "torch_mib")] for side in sides]
    rows.append(("installed, all", *(shown(own[0], ".0f") for own in sizes)))
    rows.append(("of it torch and CUDA", *(shown(own[1], ".0f") for own in sizes)))
    rest = [None if own[0] is None else own[0] - own[1] for own in sizes]
    rows.append(("the rest", *(shown(own, ".0f") for own in rest)))
    return markdown(("what", *sides), rows)
