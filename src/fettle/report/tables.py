"""An evaluation's figures as words and cells, for the report's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fettle.protocols import Json

NOT_KNOWN = "n/a"
GOOD = "good"


@dataclass(frozen=True)
class Figure:
    """One line of the metrics table."""

    label: str
    value: str
    note: str = ""


@dataclass
class Counts:
    """Verdicts on the pictures of one kind."""

    ok: int = 0
    review: int = 0
    reject: int = 0
    refused: int = 0

    @property
    def judged(self) -> int:
        return self.ok + self.review + self.reject

    def count(self, verdict: str | None) -> None:
        """One more picture with this verdict; None is a refused one."""
        name = verdict or "refused"
        setattr(self, name, getattr(self, name) + 1)


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text; the first column is words, the others are figures."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)


_IMAGE = {"image_auroc": "Image AUROC", "image_ap": "Image AP", "image_f1max": "Image F1-max"}
_PIXEL = {
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1max": "Pixel F1-max",
    "aupro": "AUPRO (FPR to 0.3)",
    "aupro_005": "AUPRO (FPR to 0.05)",
    "iou": "IoU",
    "boundary_f": "Boundary F (2 px)",
}
_LENGTHS = {"hd95": "Hausdorff distance, 95 %"}
_RATES = {
    "frr_promised": ("False-reject rate, promised", ""),
    "frr_measured": ("False-reject rate, measured", "frr_interval"),
    "review_rate_good": ("Good pictures sent to review", ""),
    "escape_rate": ("Escape rate", "escape_interval"),
}
_NOTES = {
    "image_f1max": "the best threshold in hindsight, chosen on these labels",
    "pixel_f1max": "the best threshold in hindsight, chosen on these labels",
    "escape_rate": "defective pictures judged ok",
    "iou": "what is marked against the labelled defect, a mean over pictures",
}
_PER_DEFECT = {
    "image_auroc": "Image AUROC",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "aupro": "AUPRO 0.3",
    "aupro_005": "AUPRO 0.05",
    "iou": "IoU",
    "boundary_f": "Boundary F",
}


_COUNTED = {"review": "good pictures not judged ok", "reject": "good pictures judged reject"}


def figure_groups(metrics: Mapping[str, Json]) -> list[tuple[str, list[Figure]]]:
    """The known figures among `metrics` under three headings; a null is "n/a", a missing key is left out."""
    groups = [
        ("Which pictures are defective", _ratios(metrics, _IMAGE)),
        ("Where the defects are", [*_ratios(metrics, _PIXEL), *_lengths(metrics)]),
        ("Reliability of the verdicts", _rates(metrics)),
    ]
    return [(title, figures) for title, figures in groups if figures]


def _ratios(metrics: Mapping[str, Json], labels: Mapping[str, str]) -> list[Figure]:
    return [
        Figure(label, ratio(metrics[key]), _NOTES.get(key, ""))
        for key, label in labels.items()
        if key in metrics
    ]


def _lengths(metrics: Mapping[str, Json]) -> list[Figure]:
    return [
        Figure(label, NOT_KNOWN if (value := metrics[key]) is None else f"{value:.1f} px")
        for key, label in _LENGTHS.items()
        if key in metrics
    ]


def _rates(metrics: Mapping[str, Json]) -> list[Figure]:
    figures = []
    for key, (label, interval_key) in _RATES.items():
        if key not in metrics:
            continue
        note = counted_event(metrics) if key == "frr_measured" else _NOTES.get(key, "")
        interval = metrics.get(interval_key)
        if isinstance(interval, list) and len(interval) == 2:
            low, high = percent(interval[0]), percent(interval[1])
            note = "; ".join(filter(None, [f"95 % interval {low} to {high}", note]))
        figures.append(Figure(label, percent(metrics[key]), note))
    if "frr_p_value" in metrics:
        note = "chance of at least so many false rejects if the promise holds"
        figures.append(Figure("p-value of the promise", ratio(metrics["frr_p_value"]), note))
    return figures


def counted_event(metrics: Mapping[str, Json]) -> str:
    """What the measured false-reject rate counts: the event that the promise is on, rejects without one."""
    return _COUNTED["review" if metrics.get("promise_on") == "review" else "reject"]


def defect_table(counts: Mapping[str, Counts], metrics: Mapping[str, Json]) -> Table:
    """One row for each kind of picture, good ones first: verdict counts, escape rate, the metrics by kind.

    A metric that no kind has gets no column.
    """
    by_defect = metrics.get("per_defect")
    figures = by_defect if isinstance(by_defect, dict) else {}
    known = [
        key for key in _PER_DEFECT if any(isinstance(kind, dict) and key in kind for kind in figures.values())
    ]
    head = ("Kind", "Pictures", "ok", "review", "reject", "Escape rate")
    table = Table((*head, *(_PER_DEFECT[key] for key in known)))
    for name in sorted(counts, key=lambda name: (name != GOOD, name)):
        kind = counts[name]
        of_kind = figures.get(name)
        values = of_kind if isinstance(of_kind, dict) else {}
        escaped = "" if name == GOOD else percent(kind.ok / kind.judged if kind.judged else None)
        cells = (f"{n:,}" for n in (kind.judged, kind.ok, kind.review, kind.reject))
        missing = "" if name == GOOD else NOT_KNOWN
        table.rows.append(
            (name, *cells, escaped, *(ratio(values[key]) if key in values else missing for key in known))
        )
    return table


def ratio(value: Json) -> str:
    """A figure in 0..1 with four decimals."""
    return f"{value:.4f}" if isinstance(value, int | float) else NOT_KNOWN


def percent(value: Json) -> str:
    """A rate in 0..1 as per cent, with one decimal; with two or three below 1 %."""
    if not isinstance(value, int | float):
        return NOT_KNOWN
    shown = 100 * value
    decimals = 1 if shown >= 1 or shown == 0 else 2 if shown >= 0.1 else 3
    return f"{shown:.{decimals}f} %"


def leaf(value: Json) -> str:
    """A plain value of the model card in words."""
    if value is None:
        return NOT_KNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def size_words(area_px: int, length_px: float, area_mm2: float | None, length_mm: float | None) -> str:
    """A region's size: area and length, in mm too when the scale is known."""
    area, length = f"{area_px:,} px²", f"{length_px:,.0f} px"
    if area_mm2 is not None:
        area += f" ({area_mm2:.3g} mm²)"
    if length_mm is not None:
        length += f" ({length_mm:.3g} mm)"
    return f"{_unbroken(area)}, {_unbroken(length)} long"


def _unbroken(text: str) -> str:
    """A number never loses its unit at the end of a line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def number_words(count: int, one: str, many: str) -> str:
    """ "1 picture", "2 pictures" """
    return f"{count:,} {one if count == 1 else many}"
