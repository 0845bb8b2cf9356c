"""Fettle's part of `beside_anomalib.py`, as `anomalib_side.py` is anomalib's.

python benchmarks/fettle_side.py ACTION '{"work": ..., ...}'
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

from beside_clock import Clock, Found, Given, answer, passes, peak_mib


def model_folder(given: Given) -> Path:
    """A model in the work folder."""
    return Path(given["work"]) / "fettle" / given["model"]


def fit(given: Given) -> Found:
    """Detector.fit on a folder: the method alone ("learnt"), and with calibration and saving ("whole")."""
    from fettle.backbones import load_backbone
    from fettle.detector import Detector
    from fettle.layers import coreset
    from fettle.methods.registry import find_method

    learnt: Found = {}
    selection: Found = {}
    select = coreset.select_greedy

    def watched_select(rows, num_picks, **more):  # type: ignore[no-untyped-def]
        clock = Clock()
        chosen = select(rows, num_picks, **more)
        selection.update(clock.read(), picks=len(chosen.indices), rows=list(rows.shape))
        return chosen

    method = find_method(given["settings"].get("method", "patchcore"))
    prepare = method.prepare

    def watched_prepare(self, good, run):  # type: ignore[no-untyped-def]
        clock = Clock()
        record = prepare(self, good, run)
        learnt.update(clock.read(), peak_mib=peak_mib())
        return record

    load_backbone(given["settings"].get("backbone"), ("stride8", "stride16"))  # as anomalib's has its network
    before = peak_mib()
    with (
        mock.patch.object(coreset, "select_greedy", watched_select),
        mock.patch.object(method, "prepare", watched_prepare),
    ):
        clock = Clock()
        detector = Detector.fit(Path(given["folder"]) / "train" / "good", **given["settings"])
        detector.save(model_folder(given))
        whole = clock.read()
    peak = peak_mib()
    found: Found = {
        "pictures": detector.num_fit,
        "learnt": {**learnt, "added_mib": learnt["peak_mib"] - before},
        "whole": {**whole, "peak_mib": peak, "added_mib": peak - before},
        "before_mib": before,
        "facts": detector.card["fit"],
    }
    if selection:
        found["selection"] = selection
    return found


def select(given: Given) -> Found:
    """Fettle's selection on the very rows that anomalib's had, from the same first row; and how they compare.

    Both radii, and the gap at the first pick that differs, are computed in double precision.
    """
    import numpy as np
    import torch

    from fettle.layers.coreset import project, select_greedy

    theirs = np.load(Path(given["work"]) / "anomalib" / f"{given['model']}.npz")
    raw, picks = torch.from_numpy(theirs["rows"]), theirs["picks"].tolist()
    rows = project(raw, None)
    clock = Clock()
    own = select_greedy(rows, len(picks), start=picks[0]).indices.tolist()
    found: Found = {**clock.read(), "picks": len(own), "rows": list(rows.shape)}
    differing = [i for i, (one, other) in enumerate(zip(own, picks, strict=True)) if one != other]
    first = differing[0] if differing else None
    return {
        **found,
        "shared": len(set(own) & set(picks)),
        "same_place": len(own) - len(differing),
        "first_difference": first,
        "gap_there": None if first is None else gap(raw, own, picks, first),
        "radius_fettle": radius(raw, own),
        "radius_anomalib": radius(raw, picks),
    }


def gap(rows, own: list[int], theirs: list[int], place: int) -> float:  # type: ignore[no-untyped-def]
    """How much farther from the picks before it one choice is than the other, relative."""
    before = rows[own[:place]].double()
    far, near = (
        (before - rows[one].double()).norm(dim=1).min().item() for one in (own[place], theirs[place])
    )
    return abs(far - near) / max(far, near)


def radius(rows, picks: list[int]) -> float:  # type: ignore[no-untyped-def]
    """Distance of the farthest row from its nearest pick."""
    import torch

    centres = rows[picks].double()
    nearest = torch.cat([torch.cdist(part.double(), centres).amin(dim=1) for part in rows.split(1024)])
    return float(nearest.max())


def infer(given: Given) -> Found:
    """Milliseconds of one framed picture alone: model, its backbone, and its exported graphs."""
    import torch

    from fettle.detector import Detector
    from fettle.images.decode import read_picture

    detector = Detector.load(model_folder(given))
    placed = detector.frame.place(read_picture(Path(given["paths"][0])))
    view, valid = torch.from_numpy(placed.views), torch.from_numpy(placed.valid)
    method = detector.method
    with torch.inference_mode():
        found = {
            "whole": passes(lambda: method(view, valid), given["passes"]),
            "backbone": passes(lambda: method.backbone(view, method.levels), given["passes"]),
        }
        for format_ in given["formats"]:
            graph = Detector.load(model_folder({**given, "model": f"{given['model']}-{format_}"})).method
            found[format_] = passes(lambda graph=graph: graph(view, valid), given["passes"])
    return found


def inspect(given: Given) -> Found:
    """`fettle inspect MODEL FOLDER -o OUT`, as a user would; rows and pictures of the report are written."""
    clock = Clock()
    from fettle.cli.main import app
    from fettle.detector import Detector

    started: list[Clock] = []
    load: Callable[..., Detector] = Detector.load

    def watched_load(folder: Path) -> Detector:
        detector = load(folder)
        started.append(Clock())
        return detector

    command = ["inspect", str(model_folder(given)), given["folder"], "-o", given["out"], "--json"]
    with mock.patch.object(Detector, "load", watched_load):
        app(command, prog_name="fettle", standalone_mode=False)
    loop, whole = started[0].read(), clock.read()
    files = [path for path in Path(given["out"]).rglob("*") if path.is_file()]
    pictures = sum(path.is_file() for path in Path(given["folder"]).iterdir())
    return {"pictures": pictures, "loop": loop, "whole": whole, "files": len(files)}


def score(given: Given) -> Found:
    """Picture scores by path."""
    from fettle.detector import Detector

    answers = Detector.load(model_folder(given)).inspect(given["paths"])
    return {"scores": {answer.path: answer.score for answer in answers}}


def export(given: Given) -> Found:
    """Fettle's own export and its report of parity, in batches of 1, 2 and 8."""
    from fettle.detector import Detector
    from fettle.export.run import export_model

    pictures = Path(given["pictures"]) if given["pictures"] else None
    out = model_folder({**given, "model": f"{given['model']}-{given['format']}"})
    detector = Detector.load(model_folder(given))
    facts = export_model(detector, out, given["format"], pictures=pictures)
    return facts.model_dump(mode="json")


ACTIONS = {
    "fit": fit,
    "select": select,
    "infer": infer,
    "inspect": inspect,
    "score": score,
    "export": export,
}

if __name__ == "__main__":
    answer(ACTIONS)
