"""Every method in every engine on the CPU: the same answers, how fast, how soon, and in how much memory.

    OMP_NUM_THREADS=2 python benchmarks/engines.py run                 # what has no record yet
    OMP_NUM_THREADS=2 python benchmarks/engines.py run --only speed    # records whose names hold every word
    python benchmarks/engines.py table                                 # Markdown, from the records

Each method learns the fabric's good training pictures on the default backbone, at 256 px, in its compact
form; FETTLE_DATA names the folder of real pictures. Trainings, which would take more than five minutes on one
thread, are cut to STEPS steps: too few to judge a method's accuracy, and enough for these figures. Models and
exports stay in the system's temporary folder. Records:

- parity-METHOD-ENGINE: the export's own comparison with the model, on test pictures, good and defective.
- speed-METHOD: milliseconds a picture, alone and in eights. Engines by turns in one process; each turn comes
  after a pause, so that no other's threads still spin, and after a pass that is not counted.
- work-METHOD: the same in processor time, with OMP_NUM_THREADS=1: for a machine that others use, too.
- start-METHOD-ENGINE: a process from its start to the first verdict, and its memory: through Detector.load
  ("fettle"), without torch or Fettle ("alone"), and for PatchCore all of `fettle inspect` ("command").
- fastest-METHOD: from files to verdicts, and what the backbone alone takes in the same engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import torch
from engines_tables import show
from torch import Tensor, nn

from fettle.bench import read_records, write_record
from fettle.bench.real_pictures import open_real
from fettle.bench.records import record_path
from fettle.detector import Detector
from fettle.export.parity import TOLERANCES, good_views, measure_parity
from fettle.export.run import export_model
from fettle.export.writers import onnx_model, openvino_files, openvino_model, quiet
from fettle.images.decode import read_picture
from fettle.inspection import Inspection
from fettle.methods.registry import find_method
from fettle.model_folder import MANIFEST, read_model
from fettle.protocols import Backbone, Json, no_progress, no_words
from fettle.runtimes import Runtime, open_graph

RECORDS = Path(__file__).parent / "records" / "engines"
MODELS = Path(tempfile.gettempdir()) / "fettle-engines"
START = Path(__file__).with_name("engines_start.py")
METHODS = ("patchcore", "padim", "cflow", "uniad", "fpfnet", "agpnet", "tfanet")
STEPS = 200
GOOD_COMPARED = 12  # beside all 28 with defects
TURNS, PASSES = 3, 7  # counted passes are their product
PAUSE = 0.3  # seconds
STARTS = 3  # of PatchCore; one of the others
INSPECTED, INSPECTIONS = 80, 4


class Engine(NamedTuple):
    """An export, or "torch": the model as it is."""

    format: str
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return self.format if self.precision == "fp32" else f"{self.format}_{self.precision}"


TORCH, ONNX, OPENVINO, PT2 = (Engine(name) for name in ("torch", "onnx", "openvino", "pt2"))
LOWER = (Engine("onnx", "fp16"), Engine("openvino", "fp16"), Engine("openvino", "int8"))


def engines(method: str) -> tuple[Engine, ...]:
    return (TORCH, ONNX, OPENVINO, PT2, *(LOWER if method == "patchcore" else ()))


# --- models


def folder(method: str, engine: Engine) -> Path:
    return MODELS / f"{method}-{engine.name}"


def fitted(method: str) -> Detector:
    """The model, fitted where it was not yet."""
    path = folder(method, TORCH)
    if not (path / MANIFEST).exists():
        Detector.fit(
            open_real("fabric"), method=method, frame="square", size=256, settings=settings(method)
        ).save(path)
    return Detector.load(path)


def settings(method: str) -> dict[str, object]:
    """What the fit changes: a training's length."""
    if not find_method(method).traits.trained:
        return {}
    return {"steps": STEPS, "epochs": None} if method == "cflow" else {"steps": STEPS}


def opened(method: str, engine: Engine) -> Detector:
    """The model, or its export, which must be there."""
    return Detector.load(folder(method, engine), trusted=True)


def pictures(name: str, *, good: int, bad: int) -> Path:
    """A folder of links to so many of the fabric's test pictures."""
    links = MODELS / name
    links.mkdir(parents=True, exist_ok=True)
    tested = open_real("fabric").for_testing()
    chosen = [r for r in tested if r.is_good][:good] + [r for r in tested if not r.is_good][:bad]
    for record in chosen:
        link = links / f"{record.defect}_{record.path.name}"
        if not link.exists():
            link.symlink_to(record.path)
    return links


# --- what is measured


def parity(method: str, engine: Engine) -> dict[str, Json]:
    """Export, and compare on test pictures. Int8 takes the ranges of values from good ones."""
    start = time.perf_counter()
    detector = fitted(method)
    seconds = time.perf_counter() - start
    compared = pictures("test", good=GOOD_COMPARED, bad=28)
    out = folder(method, engine)
    if engine.precision == "int8":
        facts = export_model(
            detector, out, engine.format, precision="int8", pictures=pictures("good", good=50, bad=0)
        )
        graph = open_graph(facts.format, read_model(out).graph, facts.outputs)
        views = good_views(detector, compared, no_words)
        found = measure_parity(detector, graph, views, TOLERANCES["int8"], no_progress)
    else:
        facts = export_model(detector, out, engine.format, precision=engine.precision, pictures=compared)
        found = facts.parity
    return {
        "configuration": detector.method.config.model_dump(mode="json"),
        "seconds_to_fit_or_load": round(seconds, 1),
        "notes": list(facts.notes),
        "mib": round(sum(file.stat().st_size for file in out.iterdir()) / 2**20, 1),
        **found.model_dump(mode="json"),
    }


def speed(method: str, clock: Callable[[], float] = time.perf_counter) -> dict[str, Json]:
    """Milliseconds a picture by engine, alone and in eights."""
    opened_ones = {engine.name: opened(method, engine) for engine in engines(method)}
    detector = opened_ones["torch"]
    paths = sorted(pictures("test", good=GOOD_COMPARED, bad=28).iterdir())[:8]
    placed = [detector.frame.place(read_picture(path)) for path in paths]
    views, valid = (
        torch.from_numpy(np.concatenate([getattr(one, part) for one in placed]))
        for part in ("views", "valid")
    )
    found: dict[str, Json] = {}
    for batch in (1, 8):
        calls = {
            name: lambda own=own, batch=batch: own.method(views[:batch], valid[:batch])
            for name, own in opened_ones.items()
        }
        for name, seconds in by_turns(calls, TURNS, PASSES, clock=clock).items():
            found[f"{name}_batch{batch}_ms"] = round(1000 * median(seconds) / batch, 3)
    return found


def work(method: str) -> dict[str, Json]:
    """Milliseconds of processor time, which other processes change little."""
    if torch.get_num_threads() > 1:
        sys.exit("Threads that wait for each other spin: measure 'work' with OMP_NUM_THREADS=1.")
    return speed(method, time.process_time)


@torch.inference_mode()
def by_turns(
    calls: dict[str, Callable[[], object]],
    turns: int,
    passes: int,
    *,
    uncounted: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of the calls, so many at a time in each turn, after a pause and those that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            time.sleep(PAUSE)
            for _ in range(uncounted):
                call()
            for _ in range(passes):
                start = clock()
                call()
                seconds[name].append(clock() - start)
    return seconds


def start(method: str, engine: Engine) -> dict[str, Json]:
    """Processes from their start to the first verdict; medians."""
    model = folder(method, engine)
    picture = sorted(pictures("test", good=GOOD_COMPARED, bad=28).iterdir())[0]
    times = STARTS if method == METHODS[0] else 1
    ways = {"fettle": "fettle", **({"alone": engine.format} if engine in (ONNX, OPENVINO) else {})}
    found: dict[str, Json] = {}
    for name, way in ways.items():
        runs = [started(way, model, picture) for _ in range(times)]
        assert len({run.pop("verdict") for run in runs}) == 1
        found |= {f"{name}_{key}": round(median(run[key] for run in runs), 3) for key in runs[0]}
    if method == METHODS[0] and engine != PT2:  # which no command reads
        commands = [commanded(model, picture) for _ in range(times)]
        for key, values in zip(("start", "peak"), zip(*commands, strict=True), strict=True):
            found[f"command_{key}"] = round(median(values), 3)
    return found


def started(way: str, model: Path, picture: Path) -> dict[str, float]:
    command = [sys.executable, str(START), way, str(model), str(picture), str(time.time())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def commanded(model: Path, picture: Path) -> tuple[float, float]:
    """Seconds that `fettle inspect` takes with one picture, and its peak of memory, MiB."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "fettle", "inspect", str(model), str(picture), "-o", f"{out}/run"]
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"'{' '.join(command)}' failed.")
        return time.perf_counter() - begin, usage.ru_maxrss / 1024


class BareBackbone(nn.Module):
    """A backbone with the inputs of a whole graph."""

    def __init__(self, backbone: Backbone, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.levels = levels

    def forward(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        return {**self.backbone(pictures, self.levels), "any_valid": valid.flatten(1).any(dim=1)}


def bare_backbone(detector: Detector, engine: Engine) -> Callable[[Tensor, Tensor], object]:
    """The backbone alone in an engine, as the export would write it."""
    height, width = detector.frame.height, detector.frame.width
    backbone = detector.method.backbone
    bare = BareBackbone(backbone, detector.method.levels).eval()
    if engine == TORCH:
        return bare
    backbone.fix(height, width)
    some = torch.rand(2, 3, height, width), torch.ones(2, 1, height, width, dtype=torch.bool)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad(), quiet():
        names = tuple(bare(*some))
        program = torch.export.export(bare, some, dynamic_shapes=({0: batch}, {0: batch}), strict=False)
        model = onnx_model(program, names)
        files = (
            {"graph": model.SerializeToString()}
            if engine == ONNX
            else openvino_files(openvino_model(model), half=False)
        )
        graph: Runtime = open_graph(engine.format, files, names)  # type: ignore[arg-type]
    return lambda pictures, valid: graph(pictures.numpy(), valid.numpy())


def fastest(method: str) -> dict[str, Json]:
    """From files to verdicts, and the backbone alone on the same pictures, in batches of eight."""
    fabric = open_real("fabric")
    tested = [record.path for record in fabric.for_testing()]
    paths = (tested + [record.path for record in fabric.good_for_training()])[:INSPECTED]
    calls: dict[str, Callable[[], object]] = {}
    steps: dict[str, list[dict[str, float]]] = {}
    for engine in (TORCH, ONNX, OPENVINO):
        detector = opened(method, engine)
        placed = [detector.frame.place(read_picture(path)) for path in paths]
        views, valid = (
            torch.from_numpy(np.concatenate([getattr(one, part) for one in placed]))
            for part in ("views", "valid")
        )
        graph = bare_backbone(opened(method, TORCH), engine)

        def alone(
            graph: Callable[[Tensor, Tensor], object] = graph, views: Tensor = views, valid: Tensor = valid
        ) -> None:
            for i in range(0, len(views), 8):
                graph(views[i : i + 8], valid[i : i + 8])

        def whole(detector: Detector = detector, name: str = engine.name) -> None:
            answers = list(detector.inspect(paths))
            steps.setdefault(name, []).extend(a.seconds for a in answers if isinstance(a, Inspection))

        calls |= {f"{engine.name}_inspect": whole, f"{engine.name}_backbone": alone}
    found: dict[str, Json] = {"pictures": len(paths)}
    for name, seconds in by_turns(calls, INSPECTIONS, 1, uncounted=0).items():
        found[f"{name}_ms"] = round(1000 * median(seconds) / len(paths), 2)
    for name, parts in steps.items():
        for step in ("decode", "compute", "regions"):
            found[f"{name}_{step}_ms"] = round(1000 * mean(part[step] for part in parts), 2)
    return found


# --- records


def cells() -> Iterator[tuple[str, Callable[[], dict[str, Json]]]]:
    for method in METHODS:
        for engine in engines(method)[1:]:
            yield f"parity-{method}-{engine.name}", lambda m=method, e=engine: parity(m, e)
    for method in METHODS:
        yield f"speed-{method}", lambda m=method: speed(m)
    for method in METHODS:
        yield f"work-{method}", lambda m=method: work(m)
    for method in METHODS:
        yield f"fastest-{method}", lambda m=method: fastest(m)
    for method in METHODS:
        for engine in engines(method)[:4]:  # the precision of weights changes little here
            yield f"start-{method}-{engine.name}", lambda m=method, e=engine: start(m, e)


def run(words: Sequence[str]) -> None:
    for name, measure in cells():
        if not all(word in name for word in words) or record_path(RECORDS, name).exists():
            continue
        begin, busy = time.perf_counter(), busy_elsewhere()
        record = measure()
        seconds = time.perf_counter() - begin
        others = (busy_elsewhere() - busy) / seconds
        packages = {package: version(package) for package in ("torch", "onnxruntime", "openvino")}
        facts = {
            "threads": torch.get_num_threads(),
            "others_busy": round(others, 2),
            "processor": processor(),
            "versions": packages,
        }
        write_record(RECORDS, name, {**facts, **record})
        print(f"{name}: {seconds:.0f} s, other processes took {others:.2f} processors", flush=True)


def busy_elsewhere() -> float:
    """Processor seconds since the start of the machine that this process and its children did not take."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    own = os.times()
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK") - sum(own[:4])


def processor() -> str:
    """The vector units that matter here, as Linux names them."""
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text().split()) if file.exists() else set()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return " ".join(flag for flag in known if flag in flags)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    arguments = parser.parse_args()
    sys.exit(run(arguments.only) if arguments.action == "run" else show(read_records(RECORDS)))
