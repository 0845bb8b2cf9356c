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
from numpy.typing import NDArray
from PIL import Image

from fettle.bench import drawn, pasted
from fettle.bench.drawn import KINDS, draw_defect
from fettle.bench.pasted import Pasted, paste_defects
from fettle.datasets.records import Dataset


def pasted_layout(good: Sequence[Path], name: str) -> Path:
    """A layout without a real defect.

    Two thirds of the good pictures are to be learnt from. The others, and the same ones with a defect pasted
    in, are its test part.
    """

    def defects(held_out: list[NDArray[np.uint8]]) -> list[tuple[str, Pasted]]:
        return [("pasted", one) for one in paste_defects(held_out, seed=0)]

    return _without_real_defects(f"pasted-{name}", good, defects)


def drawn_layout(good: Sequence[Path], name: str) -> Path:
    """As `pasted_layout`, with scratches, stains and foreign fillings in turn (`bench.drawn`)."""

    def defects(held_out: list[NDArray[np.uint8]]) -> list[tuple[str, Pasted]]:
        kinds = [KINDS[number % len(KINDS)] for number in range(len(held_out))]
        return [
            (kind, draw_defect(picture, kind, np.random.default_rng([0, number])))
            for number, (kind, picture) in enumerate(zip(kinds, held_out, strict=True))
        ]

    return _without_real_defects(f"drawn-{name}", good, defects)


def _without_real_defects(
    name: str,
    good: Sequence[Path],
    defects: Callable[[list[NDArray[np.uint8]]], list[tuple[str, Pasted]]],
) -> Path:
    """Two thirds of the good pictures to learn from; the others, and the same ones with defects, to test."""
    paths = sorted(good)

    def fill(layout: Path) -> None:
        for number, path in enumerate(paths):
            part = "train" if number % 3 else "test"
            _save(layout / part / "good", path.stem, Image.open(path).convert("RGB"))
        held_out = [np.asarray(Image.open(path).convert("RGB")) for path in paths[::3]]
        for path, (kind, one) in zip(paths[::3], defects(held_out), strict=True):
            _save(layout / "test" / kind, path.stem, Image.fromarray(one.picture))
            _save(layout / "ground_truth" / kind, f"{path.stem}_mask", Image.fromarray(one.mask))

    return _made_once(name, paths, fill)


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
    sources = [inspect.getsource(module) for module in (sys.modules[__name__], pasted, drawn)]
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
