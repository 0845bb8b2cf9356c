"""Procedural parts: a deterministic renderer of products with exact defect masks."""

from fettle.datasets.parts.render import PRODUCTS, Rendered, defects_of, render
from fettle.datasets.parts.sheet import contact_sheet
from fettle.datasets.parts.writer import PartsSummary, write_parts

__all__ = ["PRODUCTS", "PartsSummary", "Rendered", "contact_sheet", "defects_of", "render", "write_parts"]
