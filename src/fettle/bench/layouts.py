"""Labelled layouts that a study makes of others, once, in the machine's folder for temporary files."""

from __future__ import annotations

import hashlib
import inspect
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fettle.bench import pasted
from fettle.bench.pasted import paste_defects
from fettle.datasets.records import Dataset


def pasted_layout(good: Sequence[Path], name: str) -> Path:
    """A layout without a real defect.

    Two thirds of the good pictures are to be learnt from. The others, and the same ones with a defect pasted
    in, are its test part.
    """
    paths = sorted(good)

    def fill(layout: Path) -> None:
        for number, path in enumerate(paths):
            part = "train" if number % 3 else "test"
            _save(layout / part / "good", path.stem, Image.open(path).convert("RGB"))
        held_out = [np.asarray(Image.open(path).convert("RGB")) for path in paths[::3]]
        for path, one in zip(paths[::3], paste_defects(held_out, seed=0), strict=True):
            _save(layout / "test" / "pasted", path.stem, Image.fromarray(one.picture))
            _save(layout / "ground_truth" / "pasted", f"{path.stem}_mask", Image.fromarray(one.mask))

    return _made_once(f"pasted-{name}", paths, fill)


def turned_layout(dataset: Dataset, name: str) -> Path:
    """The same pictures in four orientations: each is turned by a quarter more than the one before it, with
    its mask. They come first learnt from, then tested."""
    records = [*dataset.good_for_training(), *dataset.for_testing()]
    num_train = len(dataset.good_for_training())

    def fill(layout: Path) -> None:
        for number, record in enumerate(records):
            part = layout / ("train" if number < num_train else "test") / record.defect
            stem = f"{number:04d}"
            _save(part, stem, _turned(record.path, number))
            if record.mask is not None and not record.is_good:
                _save(layout / "ground_truth" / record.defect, f"{stem}_mask", _turned(record.mask, number))

    return _made_once(f"turned-{name}", [record.path for record in records], fill)


def _turned(path: Path, quarters: int) -> Image.Image:
    return Image.fromarray(np.rot90(np.asarray(Image.open(path)), quarters % 4))


def _made_once(name: str, paths: Sequence[Path], fill: Callable[[Path], None]) -> Path:
    """A folder that `fill` fills, or has filled before, from these pictures and with the present code."""
    sources = [inspect.getsource(module) for module in (sys.modules[__name__], pasted)]
    version = hashlib.sha256("\n".join([*sources, *map(str, paths)]).encode()).hexdigest()[:12]
    finished = Path(tempfile.gettempdir()) / f"fettle-{name}-{version}"
    if finished.exists():
        return finished
    layout = Path(tempfile.mkdtemp(prefix=finished.name))
    fill(layout)
    try:
        layout.rename(finished)
    except OSError:
        if not finished.exists():
            raise
        shutil.rmtree(layout)  # another process was faster
    return finished


def _save(folder: Path, name: str, picture: Image.Image) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.png")
