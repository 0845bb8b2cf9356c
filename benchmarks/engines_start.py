"""One start of an engine in this process, for engines.py: time to the first verdict, and memory.

    python benchmarks/engines_start.py WAY MODEL PICTURE STARTED

WAY is "fettle", for any model folder; or "onnx" or "openvino", for an exported folder, without torch and
Fettle. STARTED is when the process was started, seconds since the epoch. The picture has the frame's size.
Prints one JSON object: seconds until Python runs ("python") and of the steps "import", "load" and "first"
(decode, run, judge), their sum "start", processor seconds ("work"), and MiB resident after the first verdict
("rss") and at most so far ("peak").
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
VERDICTS = ("ok", "review", "reject")


def main() -> None:
    way, model, picture, started = sys.argv[1:]
    times = [float(started), time.time()]

    def done() -> None:
        times.append(time.time())

    verdict = WAYS[way](Path(model), Path(picture), done)
    done()
    steps = [round(later - before, 4) for before, later in pairwise(times)]
    found = dict(zip(("python", "import", "load", "first"), steps, strict=True))
    memory = {name: resident(of) for name, of in (("rss", "VmRSS"), ("peak", "VmHWM"))}
    print(
        json.dumps(
            {
                "verdict": verdict,
                **found,
                "start": round(times[-1] - times[0], 4),
                "work": round(time.process_time(), 4),
                **memory,
            }
        )
    )


def by_fettle(model: Path, picture: Path, done: Callable[[], None]) -> str:
    """As `fettle inspect` does it, without the run folder."""
    from fettle.detector import Detector

    done()
    detector = Detector.load(model, trusted=True)
    done()
    (answer,) = detector.inspect([picture])
    return answer.verdict.value  # type: ignore[union-attr]  # a refusal is an error here


def by_onnx_runtime(model: Path, picture: Path, done: Callable[[], None]) -> str:
    """As the example does it."""
    sys.path.insert(0, str(EXAMPLES))
    from onnx_runtime import framed, open_model

    done()
    session, frame = open_model(model)
    done()
    pictures, valid = framed(picture, frame)
    return VERDICTS[session.run(["verdict"], {"pictures": pictures, "valid": valid})[0][0]]


def by_openvino(model: Path, picture: Path, done: Callable[[], None]) -> str:
    """The least that runs an OpenVINO graph."""
    import numpy as np
    import openvino
    from PIL import Image

    done()
    files = json.loads((model / "manifest.json").read_text())["files"]
    graph, weights = ((model / Path(files[part]["name"]).name).read_bytes() for part in ("graph", "weights"))
    for part, content in (("graph", graph), ("weights", weights)):
        if hashlib.sha256(content).hexdigest() != files[part]["sha256"]:
            sys.exit(f"The {part} of {model} was altered.")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(graph, weights),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"},
    )
    done()
    pixels = np.float32(np.asarray(Image.open(picture).convert("RGB")).transpose(2, 0, 1)[None]) / np.float32(
        255
    )
    valid = np.ones((1, 1, *pixels.shape[2:]), bool)
    return VERDICTS[compiled({"pictures": pixels, "valid": valid})["verdict"][0]]


WAYS: dict[str, Callable[[Path, Path, Callable[[], None]], str]] = {
    "fettle": by_fettle,
    "onnx": by_onnx_runtime,
    "openvino": by_openvino,
}


def resident(field: str) -> float:
    """A memory field of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    sys.exit("This needs a system with /proc/self/status.")


if __name__ == "__main__":
    main()
