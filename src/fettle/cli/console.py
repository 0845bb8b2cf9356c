"""What the terminal shows: progress with ETA and words on standard error, results on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fettle.protocols import Json

_SHOW_AFTER = 2.0  # s; shorter work needs no bar
_LINE_EVERY = 10.0  # s between lines where there is no terminal


class Screen:
    """Progress bars on a terminal, a line now and then elsewhere. A context manager.

    `progress` and `say` fit `protocols.Run`.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._what = ""
        self._began = 0.0
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, sentence: str) -> None:
        """A sentence for a person."""
        self._console.print(sentence, highlight=False, markup=False)

    def progress(self, what: str, done: int, total: int) -> None:
        """So many of so many are done."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._last_line = what, now, now
            if self._task is not None:
                self._bars.remove_task(self._task)
                self._task = None
        if now - self._began < _SHOW_AFTER:
            return
        if self._console.is_terminal:
            if self._task is None:
                self._bars.start()
                self._task = self._bars.add_task(what, total=total, completed=done)
            self._bars.update(self._task, completed=done, total=total)
        elif now - self._last_line >= _LINE_EVERY and 0 < done < total:
            self._last_line = now
            left = (now - self._began) / done * (total - done)
            self.say(f"{what}: {done} of {total}, about {left:.0f} s left")


def print_json(value: Json) -> None:
    """One JSON object, alone on standard output."""
    print(json.dumps(value, allow_nan=False), flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """A table on standard output; numbers to the right, three decimals, n/a for None."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    rows = [list(row) for row in rows]
    for i, name in enumerate(header):
        numeric = all(isinstance(row[i], int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*[_cell(value) for value in row])
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Names and values, one a line."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {_cell(value)}")


def _cell(value: object) -> str:
    if value is None:
        return "n/a"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
