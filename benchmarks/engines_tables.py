"""The tables of engines.py, in Markdown, from its records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from fettle.methods.registry import method_names

Records: TypeAlias = "Mapping[str, Mapping[str, Any]]"
Rows: TypeAlias = "list[dict[str, str]]"

NAMES = {
    "torch": "PyTorch",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "pt2": "pt2",
    "onnx_fp16": "ONNX Runtime, fp16",
    "openvino_fp16": "OpenVINO, fp16",
    "openvino_int8": "OpenVINO, int8",
}
WAYS = {"fettle": "Detector", "alone": "without torch", "command": "fettle inspect"}


def show(records: Records) -> None:
    tables = {
        "Parity": parity(records),
        "Speed, ms a picture": speed(records, "speed"),
        "Processor time, ms a picture": speed(records, "work"),
        "From files to verdicts": fastest(records),
        "Start and memory": starts(records),
        "Start and memory in full": starts_in_full(records, "patchcore"),
    }
    for title, rows in tables.items():
        if rows:
            print(f"\n### {title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
            for row in rows:
                print(f"| {' | '.join(row.values())} |")


def parity(records: Records) -> Rows:
    return [
        {
            "method": method,
            "steps": str(record["configuration"].get("steps", "")),
            "engine": NAMES[engine],
            "scores differ by": scientific(record["max_score_diff"]),
            "maps differ by": scientific(record["max_map_diff"]),
            "verdicts": f"{record['verdict_flips']} of {record['pictures']}",
            "passed": "yes" if record["passed"] else "no",
        }
        for method, engine, record in chosen(records, "parity")
    ]


def speed(records: Records, kind: str) -> Rows:
    """Alone and in eights, and as a share of PyTorch's."""
    rows = []
    for method in method_names():
        record = records.get(f"{kind}-{method}")
        for engine, name in NAMES.items():
            if record is None or f"{engine}_batch1_ms" not in record:
                continue
            row = {"method": method, "engine": name}
            for batch in (1, 8):
                own, torchs = record[f"{engine}_batch{batch}_ms"], record[f"torch_batch{batch}_ms"]
                row |= {f"batch {batch}": f"{own:.1f}", f"batch {batch}, of PyTorch's": f"{own / torchs:.2f}"}
            rows.append({**row, "others took": f"{record['others_busy']:.2f}"})
    return rows


def fastest(records: Records) -> Rows:
    rows = []
    for method in method_names():
        record = records.get(f"fastest-{method}")
        for engine in ("torch", "onnx", "openvino"):
            if record is None:
                continue
            whole, backbone, decode, compute, regions = (
                record[f"{engine}_{part}_ms"]
                for part in ("inspect", "backbone", "decode", "compute", "regions")
            )
            rows.append(
                {
                    "method": method,
                    "engine": NAMES[engine],
                    "pictures a second": f"{1000 / whole:.1f}",
                    "ms": f"{whole:.1f}",
                    "ms of the backbone": f"{backbone:.1f}",
                    "its share": f"{backbone / whole:.2f}",
                    "decode": f"{decode:.1f}",
                    "compute": f"{compute:.1f}",
                    "regions": f"{regions:.1f}",
                }
            )
    return rows


def starts(records: Records) -> Rows:
    """Processor seconds to the first verdict and MiB then, through Detector, and without torch."""
    rows: dict[str, dict[str, str]] = {}
    for method, engine, record in chosen(records, "start"):
        if "_" in engine:
            continue
        row = rows.setdefault(method, {"method": method})
        row[NAMES[engine]] = f"{record['fettle_work']:.1f} s, {record['fettle_rss']:.0f}"
        if "alone_start" in record:
            row[f"{NAMES[engine]}, without torch"] = (
                f"{record['alone_work']:.1f} s, {record['alone_rss']:.0f}"
            )
    return list(rows.values())


def starts_in_full(records: Records, method: str) -> Rows:
    rows = []
    for _, engine, record in (found for found in chosen(records, "start") if found[0] == method):
        for way, words in WAYS.items():
            if f"{way}_start" not in record:
                continue
            row = {"engine": NAMES[engine], "way": words}
            for key, title, digits in (
                ("start", "seconds", 2),
                ("import", "import", 2),
                ("load", "load", 2),
                ("first", "first", 2),
                ("work", "processor seconds", 2),
                ("rss", "resident MiB", 0),
                ("peak", "peak MiB", 0),
            ):
                value = record.get(f"{way}_{key}")
                row[title] = "" if value is None else f"{value:.{digits}f}"
            rows.append(row)
    return rows


def chosen(records: Records, kind: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Method, engine and record of those of a kind that there are."""
    names = [(method, engine) for method in method_names() for engine in NAMES]
    found = [(method, engine, records.get(f"{kind}-{method}-{engine}")) for method, engine in names]
    return [(method, engine, record) for method, engine, record in found if record is not None]


def scientific(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}" if value else "0"
