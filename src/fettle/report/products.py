"""The folder of `fettle evaluate MODEL ROOT -o OUT` for many products: a run folder each, and one index.

OUT/products.json   products, their folders, and the metrics: per_product, mean, pooled
OUT/PRODUCT/        the run folder of each product
OUT/report.html     one line a product, made by `fettle report OUT`
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from fettle.errors import DataError
from fettle.protocols import Json
from fettle.report.index import write_index
from fettle.report.page import write_report

PRODUCTS_JSON = "products.json"
_FORMAT = "fettle-products"
_MAX_BYTES = 64 << 20


def product_folders(out: Path, products: Sequence[str]) -> dict[str, Path]:
    """The run folder of each product, inside `out` whatever the product is called."""
    folders: dict[str, Path] = {}
    taken: set[str] = set()
    for product in products:
        stem = re.sub(r"[^\w-]+", "_", product).strip("_") or "product"
        name, number = stem, 2
        while name.lower() in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name.lower())
        folders[product] = out / name
    return folders


def write_products(out: Path, folders: Mapping[str, Path], result: Mapping[str, Json]) -> None:
    """Write OUT/products.json: which folders there are, and the metrics of `Detector.evaluate`."""
    content = {
        "format": _FORMAT,
        "folders": {product: folder.name for product, folder in folders.items()},
        "metrics": dict(result),
    }
    partial = out / f"{PRODUCTS_JSON}.partial"
    partial.write_text(json.dumps(content, allow_nan=False, indent=1), encoding="utf-8")
    partial.replace(out / PRODUCTS_JSON)


def write_products_report(out: Path) -> Path:
    """Write each product's report and OUT/report.html, which leads to them.

    Raises:
        DataError: products.json is damaged.
    """
    path = out / PRODUCTS_JSON
    remedy = "Make it anew: `fettle evaluate MODEL ROOT -o OUT`."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is larger than any real one")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError("it was not written by Fettle")
        names = cast("dict[str, str]", content["folders"])
        results = cast("dict[str, dict[str, Json]]", content["metrics"]["per_product"])
        together = {name: content["metrics"][name] for name in ("mean", "pooled")}
        num_seen = int(content["metrics"].get("num_seen_in_fit", 0))
        if any(Path(name).name != name for name in names.values()) or set(names) != set(results):
            raise ValueError("its folders do not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' can't be used ({error}).", remedy) from error
    reports = {product: write_report(out / name) for product, name in names.items()}
    lines = {"mean": together["mean"], "pooled, one shared threshold": together["pooled"]}
    return write_index(out / "report.html", results, reports, lines, num_seen)
