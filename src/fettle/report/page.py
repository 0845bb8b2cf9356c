"""write_report: one static HTML page from a run folder, readable without a network."""

from __future__ import annotations

import base64
import hashlib
import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from fettle.errors import FettleError
from fettle.inspection import Verdict
from fettle.protocols import Json
from fettle.report import plots, tables
from fettle.report.compared import KeptTemplate, read_templates
from fettle.report.explanations import explanation_caption
from fettle.report.overlays import CONTOUR_COLOUR, MASK_COLOUR, heat_caption, heat_ramp, scale_is_fixed
from fettle.report.rows import Row, printable, read_rows
from fettle.report.run_folder import read_run
from fettle.report.tables import GOOD, Counts

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT = "report.html"
_MOST_CARDS = 500
_MOST_MISTAKES = 24
_MOST_REFUSALS = 200


@dataclass(frozen=True)
class Card:
    """One picture of the gallery, in words."""

    name: str
    path: str
    score: str
    verdict: str
    truth: str
    regions: str
    notes: str
    strip: str | None
    strip_size: tuple[int, int]
    link: str | None
    explanation: str | None
    explanation_size: tuple[int, int]


@dataclass
class _Best:
    """The rows with the largest keys, in bounded memory."""

    most: int
    seen: int = 0
    heap: list[tuple[float, int, Row]] = field(default_factory=list)

    def offer(self, key: float, row: Row) -> None:
        self.seen += 1
        push = heapq.heappush if len(self.heap) < self.most else heapq.heappushpop
        push(self.heap, (key, -row.number, row))

    def rows(self) -> list[Row]:
        return [row for _, _, row in sorted(self.heap, key=lambda item: item[:2], reverse=True)]


@dataclass
class _Digest:
    """What one pass over the rows leaves: counts, scores, and the rows that the page shows."""

    counts: Counts = field(default_factory=Counts)
    by_kind: dict[str, Counts] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    truths: list[str | None] = field(default_factory=list)
    top: _Best = field(default_factory=lambda: _Best(_MOST_CARDS))
    misses: _Best = field(default_factory=lambda: _Best(_MOST_MISTAKES))
    false_rejects: _Best = field(default_factory=lambda: _Best(_MOST_MISTAKES))
    refusals: list[Row] = field(default_factory=list)
    refined: bool = False  # whether a refiner's map took the place of a picture's own

    def take(self, row: Row) -> None:
        self.counts.count(row.verdict)
        if row.truth is not None:
            self.by_kind.setdefault(row.truth, Counts()).count(row.verdict)
        if row.score is None or row.verdict is None:
            if len(self.refusals) < _MOST_REFUSALS:
                self.refusals.append(row)
            return
        self.scores.append(row.score)
        self.verdicts.append(row.verdict)
        self.truths.append(row.truth)
        self.top.offer(row.score, row)
        self.refined |= (row.refinement or {}).get("applied") is True
        if row.truth is None:
            return
        if row.truth != GOOD and row.verdict == Verdict.OK:
            self.misses.offer(-row.score, row)
        if row.truth == GOOD and row.verdict == Verdict.REJECT:
            self.false_rejects.offer(row.score, row)


def write_report(out: Path) -> Path:
    """Write OUT/report.html from OUT/run.json, OUT/inspections.jsonl and the pictures in OUT.

    The page holds its style and script, asks nothing of any network and refers to pictures by relative
    path. It shows at most 500 pictures, those with the highest scores.

    Returns:
        The page's path.

    Raises:
        UsageError: `out` is not a run folder.
        DataError: run.json or a row is damaged.
        FettleError: the page can't be written.
    """
    run = read_run(out)
    digest = _Digest()
    for row in read_rows(out):
        digest.take(row)
    environment = template_environment()
    html = environment.get_template("report.html.j2").render(_context(out, run, digest, environment))
    path = out / REPORT
    partial = out / f"{REPORT}.partial"
    try:
        partial.write_bytes(html.encode("utf-8", "backslashreplace"))
        partial.replace(path)
    except OSError as error:
        raise FettleError(
            f"The report '{path}' could not be written ({error.strerror or error}).",
            "Free some space or check the rights of the folder.",
        ) from error
    return path


def template_environment() -> Environment:
    """Templates of this package, everything escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fettle.report", "templates"),
        autoescape=True,  # names and paths come from outside
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["leaf"] = tables.leaf
    return environment


def _context(out: Path, run: dict[str, Json], digest: _Digest, environment: Environment) -> dict[str, object]:
    """Everything that the template shows."""
    from markupsafe import Markup

    card, metrics, thresholds = (_mapping(run.get(name)) for name in ("card", "metrics", "thresholds"))
    script, style = (_source(environment, name) for name in ("script.js", "style.css"))
    cuts = {name: _real(thresholds.get(name)) for name in ("review", "reject", "pixel")}
    labelled = bool(digest.by_kind)
    return {
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": Markup(style),
        "kind": "evaluation" if labelled else "inspection",
        "name": str(card.get("name") or ""),
        "promise": str(card.get("promise") or ""),
        "summary": _summary_sentence(digest.counts),
        "complete": run.get("complete") is True,
        "finished": str(run.get("finished") or "").replace("T", " ").replace("+00:00", " UTC"),
        "version": str(run.get("fettle") or ""),
        "counts": digest.counts,
        "histogram": _histogram(digest, cuts),
        "figures": tables.figure_groups(metrics),
        "curves": _curves(digest),
        "defects": tables.defect_table(digest.by_kind, metrics) if labelled else None,
        "labelled": labelled,
        "misses": _cards(out, digest.misses),
        "num_misses": digest.misses.seen,
        "false_rejects": _cards(out, digest.false_rejects),
        "num_false_rejects": digest.false_rejects.seen,
        "gallery": _cards(out, digest.top),
        "num_judged": digest.counts.judged,
        "refusals": [(printable(row.path), printable(row.refusal or "")) for row in digest.refusals],
        "templates": _templates(out, run),
        "model_card": {**card, "thresholds": dict(thresholds)},
        "heat": _heat_legend(cuts["pixel"]),
        "found": _found(cuts["pixel"], digest.refined),
        "num_seen": metrics.get("num_seen_in_fit") or 0,
        "explanation": _explanation(_mapping(run.get("explanation")), cuts["pixel"]),
    }


def _summary_sentence(counts: Counts) -> str:
    total = tables.number_words(counts.judged, "picture was", "pictures were")
    sentence = f"{total} inspected: {counts.ok:,} ok, {counts.review:,} review, {counts.reject:,} reject."
    if counts.refused:
        refused = tables.number_words(counts.refused, "picture", "pictures")
        sentence += f" {refused} could not be inspected."
    return sentence


def _histogram(digest: _Digest, cuts: Mapping[str, float | None]) -> plots.Histogram | None:
    """By truth where every judged picture is labelled, by verdict otherwise."""
    scores = np.asarray(digest.scores, np.float64)
    groups: dict[str, plots.Values]
    if digest.truths and all(truth is not None for truth in digest.truths):
        good = np.asarray([truth == GOOD for truth in digest.truths], bool)
        groups = {"good": scores[good], "defective": scores[~good]}
    else:
        verdicts = np.asarray(digest.verdicts, dtype=np.str_)
        groups = {verdict.value: scores[verdicts == verdict.value] for verdict in Verdict}
    return plots.score_histogram(groups, {name: cuts[name] for name in ("review", "reject")})


def _curves(digest: _Digest) -> list[tuple[str, plots.Curve]]:
    """ROC with the verdict "reject" as a dot, and PR, over the labelled pictures."""
    labelled = [i for i, truth in enumerate(digest.truths) if truth is not None]
    scores = np.asarray([digest.scores[i] for i in labelled], np.float64)
    defective = np.asarray([digest.truths[i] != GOOD for i in labelled], bool)
    rejected = np.asarray([digest.verdicts[i] == Verdict.REJECT for i in labelled], bool)
    dot = None
    if rejected.any() and defective.any() and not defective.all():
        dot = (float(rejected[~defective].mean()), float(rejected[defective].mean()))
    curves = [
        ("ROC", plots.roc_curve(scores, defective, dot)),
        ("Precision and recall", plots.pr_curve(scores, defective)),
    ]
    return [(title, curve) for title, curve in curves if curve is not None]


def _cards(out: Path, best: _Best) -> list[Card]:
    return [_card(out, row) for row in best.rows()]


def _card(out: Path, row: Row) -> Card:
    path = printable(row.path)
    size, explanation_size = (_picture_size(out, name) for name in (row.panel, row.explanation))
    overlay = row.overlay if row.overlay and (out / row.overlay).is_file() else None
    strip = row.panel if size else None
    return Card(
        name=str(PurePath(*PurePath(path).parts[-2:])),  # "scratch/003.png": many folders hold a 003.png
        path=path,
        score=f"{row.score:.4f}" if row.score is not None else tables.NOT_KNOWN,
        verdict=row.verdict or "",
        truth=row.truth or "",
        regions=_regions_words(row),
        notes="; ".join(printable(note) for note in (*row.notes, *_refined_words(row))),
        strip=strip,
        strip_size=size or (0, 0),
        link=overlay or strip,
        explanation=row.explanation if explanation_size else None,
        explanation_size=explanation_size or (0, 0),
    )


def _templates(out: Path, run: dict[str, Json]) -> list[tuple[KeptTemplate, tuple[int, int]]]:
    """The pictures that the method compares with, and their sizes; those alone that are there."""
    sized = [(template, _picture_size(out, template.file)) for template in read_templates(run)]
    return [(template, size) for template, size in sized if size is not None]


def _picture_size(out: Path, name: str | None) -> tuple[int, int] | None:
    """(width, height) of a picture file from its header; None where a killed run left none."""
    from PIL import Image

    if name is None:
        return None
    try:
        with Image.open(out / name) as picture:
            return picture.size
    except OSError:
        return None


def _regions_words(row: Row) -> str:
    largest = row.largest
    if largest is None:
        return "no region"
    size = tables.size_words(largest.area_px, largest.length_px, largest.area_mm2, largest.length_mm)
    if len(row.regions) == 1:
        return f"1 region: {size}"
    return f"{len(row.regions)} regions, the largest {size}"


def _refined_words(row: Row) -> list[str]:
    """What a refiner did, and why not where it did nothing; nothing where there was none."""
    if row.refinement is None:
        return []
    state, reason = (row.refinement.get(key) for key in ("refined", "gate_reason"))
    return [f"refined: {state}, {reason}" if reason else f"refined: {state}"]


def _found(pixel_threshold: float | None, refined: bool) -> str:
    """What the contours enclose; nothing where there are none."""
    if pixel_threshold is not None:
        return "the map is above the pixel threshold"
    return "the refiner's mask, where it applied one" if refined else ""


def _heat_legend(pixel_threshold: float | None) -> dict[str, object]:
    if scale_is_fixed(pixel_threshold):
        ticks = ("0", f"{pixel_threshold:.3g}", f"≥ {2 * pixel_threshold:.3g}")
    else:
        ticks = ("0", "", "maximum")
    return {
        "caption": heat_caption(pixel_threshold),
        "gradient": _gradient(),
        "ticks": ticks,
        "contour": _css(CONTOUR_COLOUR),
        "mask": _css(MASK_COLOUR),
    }


def _explanation(kept: Mapping[str, Json], pixel_threshold: float | None) -> dict[str, object] | None:
    """What the run keeps of its explanations, in words; None where there are none."""
    if not kept:
        return None
    maps, pictures = (_words(kept.get(name)) for name in ("maps", "pictures"))
    return {
        "caption": explanation_caption(maps, pixel_threshold, pictures),
        "gradient": _gradient(),
        "shown": ", ".join([*pictures, *maps]),
        "numbers": _mapping(kept.get("numbers")),
        "words": printable(str(kept.get("words") or "")),
    }


def _gradient() -> str:
    """The heat ramp from left to right, in CSS."""
    ramp = heat_ramp()[np.linspace(0, 255, 17).round().astype(int)]
    return f"linear-gradient(90deg, {', '.join(_css(colour) for colour in ramp)})"


def _css(colour: tuple[int, int, int] | np.ndarray) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def _source(environment: Environment, name: str) -> str:
    """A template file as it stands: the page's hash of the script needs its exact text."""
    if environment.loader is None:
        raise AssertionError("the environment of the report has its templates")
    return environment.loader.get_source(environment, name)[0]


def _words(value: Json) -> list[str]:
    return [printable(str(word)) for word in value] if isinstance(value, list) else []


def _mapping(value: Json) -> dict[str, Json]:
    return value if isinstance(value, dict) else {}


def _real(value: Json) -> float | None:
    return float(value) if isinstance(value, int | float) else None
