"""Judge pictures with an exported model, without torch and without fettle.

    pip install numpy onnxruntime pillow
    fettle export MODEL -o exported --format onnx
    python onnx_runtime.py exported part.png more.png

Prints one line a picture: its path, score and verdict. Frames "stretch" and "pad" are covered, for 8-bit
pictures in grey or colour without a region of interest. Other pictures are refused, and the rest goes on; the
exit code is then 3. What the folder's files say is checked by hash.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageOps

VERDICTS = ("ok", "review", "reject")
MODES = ("L", "RGB")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def open_model(folder: Path) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """The graph and the frame of an exported folder, checked."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["export"]["format"] != "onnx" or not manifest["export"]["parity"]["passed"]:
        sys.exit(f"{folder} is no ONNX model that passed its parity check.")
    frame = manifest["frame"]
    if frame["mode"] not in ("stretch", "pad") or frame["roi"] or frame["roi_mask"]:
        sys.exit(f"This example does not cover the frame '{frame['mode']}', or a region of interest.")
    file = manifest["files"]["graph"]
    graph = (folder / Path(file["name"]).name).read_bytes()
    if hashlib.sha256(graph).hexdigest() != file["sha256"]:
        sys.exit(f"The graph of {folder} was altered.")
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]), frame


def framed(path: Path, frame: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A picture as the graph takes it: (1, 3, H, W) in 0..1, and (1, 1, H, W), False on padding."""
    opened = Image.open(path)
    if opened.mode not in MODES:
        raise ValueError(f"its mode is {opened.mode}, not {' or '.join(MODES)}")
    picture = ImageOps.exif_transpose(opened).convert("RGB")
    height, width = frame["height"], frame["width"]
    scaled = (height, width)
    if frame["mode"] == "pad":  # the whole picture, its aspect kept
        factor = min(height / picture.height, width / picture.width)
        scaled = (
            min(max(round(picture.height * factor), 1), height),
            min(max(round(picture.width * factor), 1), width),
        )
    if (picture.height, picture.width) != scaled:
        picture = picture.resize((scaled[1], scaled[0]), FILTERS[frame["resample"]])
    top, left = (height - scaled[0]) // 2, (width - scaled[1]) // 2
    around = ((top, height - scaled[0] - top), (left, width - scaled[1] - left))
    pixels = np.pad(np.asarray(picture), (*around, (0, 0)), mode="edge")
    valid = np.pad(np.ones(scaled, bool), around)
    return np.float32(pixels.transpose(2, 0, 1)[None]) / np.float32(255), valid[None, None]


def main() -> None:
    session, frame = open_model(Path(sys.argv[1]))
    refused = False
    for path in map(Path, sys.argv[2:]):
        try:
            pictures, valid = framed(path, frame)
        except (OSError, ValueError) as error:
            print(f"Refused: {path}: {error}.", file=sys.stderr)
            refused = True
            continue
        score, verdict = session.run(["score", "verdict"], {"pictures": pictures, "valid": valid})
        print(f"{path}  {score[0]:.6g}  {VERDICTS[verdict[0]]}")
    sys.exit(3 if refused else 0)


if __name__ == "__main__":
    main()
