"""Fettle beside anomalib 2.7: the same pictures and ResNet-18 weights, in one run.

    python -m venv ANOMALIB; ANOMALIB/bin/pip install 'anomalib[openvino]==2.7.0' onnxruntime
    python -m venv PLAIN; PLAIN/bin/pip install .         # for the size of an installation alone
    python benchmarks/beside_anomalib.py run --anomalib ANOMALIB/bin/python --plain PLAIN/bin/python
    python benchmarks/beside_anomalib.py table            # Markdown, from the records

FETTLE_DATA and FETTLE_WEIGHTS name the folders of pictures and weights; the latter holds a ResNet-18, layers
1 to 3. Each measurement is a process of one thread; Fettle decodes pictures in two more, whose time counts as
CPU time. The sides take turns. What has a record is not measured again. `--only WORD...` measures the parts
whose names hold all the words. Pictures and models lie in a folder under the system's temporary one, or in
that of --work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from beside_table import tables

from fettle.bench.real_pictures import REAL_PRODUCTS, open_real
from fettle.bench.records import read_records, record_path, write_record
from fettle.datasets.records import Record

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "beside"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
WEIGHTS = "resnet18_tv_in1k_l123.safetensors"
TRAIN, MOST_TEST = 50, 60
PAIRS = 15  # pictures of each kind that exports are compared on
ROUNDS = (1, 2, 3, 4)
PASSES = 25
STARTS = 5
FORMATS = ("onnx", "openvino")
PACKAGES = (
    "anomalib",
    "fettle",
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "numpy",
    "onnxruntime",
    "openvino",
)
NOT_SQUARE = ("magnetic_tile", "battery_weld")  # pictures that anomalib squashes, and Fettle pads or frames
SAME = {"backbone": "resnet18", "frame": "square", "size": 256}
SAME_BANK = {**SAME, "settings": {"bank_rows": 0, "bank_ratio": 0.1}}
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: its record's. side: whose environment: "anomalib", "fettle", or "plain" for the size alone.
        action: what the side's script does, or "start" or "size", which need none.
        given: what it is told besides the folder of work.
    """

    name: str
    side: str
    action: str
    given: Mapping[str, Any] = field(default_factory=dict)


def parts() -> Iterator[Part]:
    """Every measurement, in the order in which they need one another; the sides take turns."""
    yield from fits()
    for turn in ROUNDS:
        for method, data in (("patchcore", "fabric-50"), ("padim", "screw-50")):
            given = {"method": method, "model": f"{method}-{data}", "sample": data, "passes": PASSES}
            yield Part(f"infer-{method}-anomalib-{turn}", "anomalib", "infer", given)
            yield Part(f"infer-{method}-fettle-{turn}", "fettle", "infer", {**given, "formats": FORMATS})
    for turn in ROUNDS:
        given = {"method": "patchcore", "model": "patchcore-fabric-50", "folder": "fabric-folder"}
        yield Part(f"folder-anomalib-{turn}", "anomalib", "predict", given)
        for model in ("patchcore-fabric-50", "default-fabric-50-onnx", "default-fabric-50-openvino"):
            yield Part(f"folder-fettle-{model}-{turn}", "fettle", "inspect", {**given, "model": model})
    for side in ("anomalib", "fettle"):
        yield Part(f"start-{side}", side, "start")
        yield Part(f"size-{side}", "plain" if side == "fettle" else side, "size")


def fits() -> Iterator[Part]:
    """Fits, what is exported from them, and what they score."""
    for data, sides in (("fabric-50", "both"), ("fabric-100", "fettle"), ("screw-200", "fettle")):
        model = f"patchcore-{data}"
        if sides == "both":
            given = {"method": "patchcore", "model": model, "folder": data, "validate": True}
            yield Part(f"fit-{model}-anomalib", "anomalib", "fit", given)
            yield Part(f"select-{model}", "fettle", "select", {"model": model})
        settings = {"model": model, "folder": data, "settings": SAME_BANK}
        yield Part(f"fit-{model}-fettle", "fettle", "fit", settings)
    given = {"method": "patchcore", "model": "memory", "folder": "screw-200", "validate": False}
    few = {**given, "ratio": 0.001}  # a smaller bank, and the same features, projection and distances
    yield Part("memory-patchcore-screw-200-anomalib", "anomalib", "fit", few)
    settings = {"model": "memory", "folder": "screw-200", "settings": SAME}
    yield Part("memory-patchcore-screw-200-fettle", "fettle", "fit", settings)
    for data in ("screw-50", "screw-200", "screw-280"):
        model = f"padim-{data}"
        given = {"method": "padim", "model": model, "folder": data, "validate": False}
        if data != "screw-280":
            yield Part(f"fit-{model}-anomalib", "anomalib", "fit", given)
        settings = {"model": model, "folder": data, "settings": {**SAME, "method": "padim"}}
        yield Part(f"fit-{model}-fettle", "fettle", "fit", settings)
    for product in REAL_PRODUCTS:
        data = f"{product}-{TRAIN}"
        ours = {"model": f"default-{data}", "folder": data, "settings": {}}
        theirs = {"method": "patchcore", "model": f"patchcore-{data}"}
        if product != "fabric":  # which is there already
            given = {**theirs, "folder": data, "validate": False}
            yield Part(f"accuracy-fit-{product}-anomalib", "anomalib", "fit", given)
        yield Part(f"accuracy-fit-{product}-fettle", "fettle", "fit", ours)
        for format_ in FORMATS if product == "fabric" else FORMATS[1:]:
            given = {"model": ours["model"], "format": format_, "pictures": None}
            yield Part(f"accuracy-export-{format_}-{product}-fettle", "fettle", "export", given)
        yield Part(f"accuracy-score-{product}-anomalib", "anomalib", "score", {**theirs, "test": data})
        scored = {"model": f"{ours['model']}-openvino", "test": data}
        yield Part(f"accuracy-score-{product}-fettle", "fettle", "score", scored)
        if product in NOT_SQUARE:
            model = f"square-{data}"
            square = {"model": model, "folder": data, "settings": {"frame": "square"}}
            yield Part(f"square-fit-{product}", "fettle", "fit", square)
            given = {"model": model, "format": "openvino", "pictures": None}
            yield Part(f"square-export-{product}", "fettle", "export", given)
            scored = {"model": f"{model}-openvino", "test": data}
            yield Part(f"accuracy-score-{product}-square", "fettle", "score", scored)
    for format_ in FORMATS:
        given = {"method": "patchcore", "model": "patchcore-fabric-50", "format": format_}
        theirs = {**given, "sample": "fabric-50", "passes": PASSES}
        yield Part(f"export-{format_}-anomalib", "anomalib", "export", theirs)
        yield Part(f"export-{format_}-fettle", "fettle", "export", {**given, "pictures": "fabric-pairs"})
        more = {"model": "padim-screw-50", "format": format_, "pictures": None}
        yield Part(f"export-{format_}-padim-fettle", "fettle", "export", more)


# --- pictures


def by_content(records: Sequence[Record], most: int) -> list[Path]:
    """So many pictures, by the hash of their bytes."""
    paths = [record.path for record in records]
    return sorted(paths, key=lambda path: hashlib.sha256(path.read_bytes()).digest())[:most]


def lay_out(work: Path, data: str) -> Path:
    """The folder of "PRODUCT-NUMBER": so many good pictures to learn from, and the test part."""
    folder = work / "pictures" / data
    if not folder.exists():
        product, number = data.rsplit("-", 1)
        dataset = open_real(product)
        test = list(dataset.for_testing())
        copy(by_content(list(dataset.good_for_training()), int(number)), folder / "train" / "good")
        copy(by_content([one for one in test if one.is_good], MOST_TEST), folder / "test" / "good")
        copy(by_content([one for one in test if not one.is_good], MOST_TEST), folder / "test" / "defective")
    return folder


def flat(work: Path, name: str, most: int | None) -> Path:
    """A folder of fabric's test pictures, so many of each kind."""
    folder = work / "pictures" / name
    if not folder.exists():
        test = lay_out(work, f"fabric-{TRAIN}") / "test"
        copy(
            [path for kind in ("good", "defective") for path in sorted((test / kind).iterdir())[:most]],
            folder,
        )
    return folder


def tested(folder: Path) -> tuple[list[Path], list[Path]]:
    """Good and defective pictures of a test part."""
    return sorted((folder / "good").iterdir()), sorted((folder / "defective").iterdir())


def copy(paths: Sequence[Path], folder: Path) -> None:
    """Copies, named by number, since names of several folders may be the same; PNG and JPEG alike."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, path in enumerate(paths):
        shutil.copy(path, partial / f"{folder.name}_{number:03}{path.suffix}")
    partial.rename(folder)


def told(part: Part, work: Path) -> dict[str, Any]:
    """What the side's script is told: names become paths."""
    given: dict[str, Any] = {**part.given, "work": str(work), "out": str(work / "out" / part.name)}
    given["weights"] = str(Path(os.environ["FETTLE_WEIGHTS"]) / WEIGHTS)
    if "folder" in given:
        name = given["folder"]
        given["folder"] = str(flat(work, name, None) if name.endswith("-folder") else lay_out(work, name))
    if given.get("pictures"):
        given["pictures"] = str(flat(work, given["pictures"], PAIRS))
    if "sample" in given:
        pairs = flat(work, "fabric-pairs", PAIRS) if given["sample"].startswith("fabric") else None
        found = pairs or lay_out(work, given["sample"]) / "test" / "good"
        given["paths"] = [str(path) for path in sorted(found.iterdir())]
    if "test" in given:
        test = lay_out(work, given["test"]) / "test"
        given["paths"] = [
            str(path) for kind in ("good", "defective") for path in sorted((test / kind).iterdir())
        ]
    return given


# --- measuring


def run(words: Sequence[str], pythons: Mapping[str, str | None], work: Path) -> None:
    """Measure what has no record and whose name holds all words."""
    for part in parts():
        if any(word not in part.name for word in words) or record_path(RECORDS, part.name).exists():
            continue
        python = pythons[part.side]
        if python is None:
            print(f"{part.name}: left out, since --{part.side} is not given", flush=True)
            continue
        found = measure(part, python, work)
        record = {"side": part.side, "action": part.action, **found, "versions": versions(python)}
        write_record(RECORDS, part.name, record)
        print(f"{part.name}: {found['process']['cpu_s']:.1f} s of CPU time", flush=True)


def measure(part: Part, python: str, work: Path) -> dict[str, Any]:
    """What one process found, and what it took as a whole."""
    if part.action == "start":
        return start_up(part.side, python)
    if part.action == "size":
        done, process = child([python, "-c", SIZES])
        return {"found": json.loads(done), "process": process}
    script = HERE / f"{part.side}_side.py"
    shutil.rmtree(work / "out" / part.name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as cache:
        command = [python, str(script), part.action, json.dumps(told(part, work))]
        done, process = child(command, {"FETTLE_CACHE": cache})
    line = done.strip().splitlines()[-1].replace(f"{work}{os.sep}", "")
    return {"found": json.loads(line), "process": process}


def child(command: Sequence[str], more: Mapping[str, str] | None = None) -> tuple[str, dict[str, float]]:
    """Output of a process of one thread, and its wall and CPU seconds.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    environment = {**os.environ, **dict.fromkeys(THREADS, "1"), **(more or {})}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, {"wall_s": wall, "cpu_s": cpu}


def start_up(side: str, python: str) -> dict[str, Any]:
    """Medians of `--help` and of imports, as whole processes."""
    script = str(Path(python).with_name(side))
    library = {"anomalib": "anomalib.models", "fettle": "fettle"}[side]
    commands = {
        "help": [script, "--help"],
        "import": [python, "-c", f"import {library}"],
        "import_torch": [python, "-c", "import torch"],
    }
    found = {}
    for name, command in commands.items():
        child(command)  # files are then in memory
        times = [child(command)[1] for _ in range(STARTS)]
        found[name] = {key: median(one[key] for one in times) for key in ("wall_s", "cpu_s")}
    return {"found": found, "process": {"cpu_s": sum(one["cpu_s"] for one in found.values())}}


SIZES = """
import json, os, sysconfig
root = sysconfig.get_path("purelib")
sizes = {}
for name in os.listdir(root):
    path, total = os.path.join(root, name), 0
    for folder, _, files in os.walk(path):
        if not folder.endswith("__pycache__"):
            total += sum(os.lstat(os.path.join(folder, file)).st_size for file in files)
    total += os.lstat(path).st_size if os.path.isfile(path) else 0
    group = name.split("-")[0].lower()
    if group in ("pip", "setuptools"):
        continue
    if group in ("torch", "torchgen", "functorch", "triton") or "nvidia" in group or "cuda" in group:
        group = "torch"
    sizes[group] = sizes.get(group, 0) + total
largest = dict(sorted(sizes.items(), key=lambda one: -one[1])[:12])
mib = lambda number: round(number / 2**20, 1)
print(json.dumps({"all_mib": mib(sum(sizes.values())), "torch_mib": mib(sizes.get("torch", 0)),
                  "largest_mib": {name: mib(size) for name, size in largest.items()}}))
"""

VERSIONS = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def versions(python: str) -> dict[str, str | None]:
    found = json.loads(child([python, "-c", VERSIONS, *PACKAGES])[0])
    return {"python": platform.python_version(), **{name: one for name, one in found.items() if one}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "run", "table"))
    parser.add_argument("--anomalib", help="the Python of an environment with anomalib")
    parser.add_argument("--plain", help="the Python of an environment with Fettle and no extra")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="parts whose name holds all of them"
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fettle-beside")
    options = parser.parse_args()
    if options.action == "table":
        print("\n\n".join(tables(read_records(RECORDS))))
        return
    if options.action == "list":
        print("\n".join(part.name for part in parts() if not record_path(RECORDS, part.name).exists()))
        return
    pythons = {"anomalib": options.anomalib, "fettle": sys.executable, "plain": options.plain}
    run(options.only, pythons, options.work.absolute())


if __name__ == "__main__":
    main()
