"""Grids of fits and evaluations: a record a cell, tables from the records, and what studies measure besides.

`pasted` makes defects whose place is known, `copying` asks whether a method rebuilds them, `noise_scale` how
strong training noise should be, and `cost` what inspection takes.
"""

from fettle.bench.grid import After, Cell, run_cell, run_cells
from fettle.bench.records import Difference, paired_difference, read_records, spread, write_record

__all__ = [
    "After",
    "Cell",
    "Difference",
    "paired_difference",
    "read_records",
    "run_cell",
    "run_cells",
    "spread",
    "write_record",
]
