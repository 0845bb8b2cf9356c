"""Grids of fits and evaluations: one record a cell, and tables from the records."""

from fettle.bench.grid import Cell, run_cell, run_cells
from fettle.bench.records import read_records, spread, write_record

__all__ = ["Cell", "read_records", "run_cell", "run_cells", "spread", "write_record"]
