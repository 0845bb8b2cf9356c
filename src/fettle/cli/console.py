"""What the terminal shows: progress with ETA and words on standard error, results on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fettle.protocols import Json

_SHOW_AFTER = 2.0  # s; shorter work needs no bar
_LINE_EVERY = 10.0  # s between lines where there is no terminal
_ROOMY = 100  # columns; a narrower terminal gets narrower gaps
_UNBOUNDED = 10_000  # columns of a pipe


class Screen:
    """Progress bars on a terminal, a line now and then elsewhere. A context manager.

    `progress` and `say` fit `protocols.Run`.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._task = TaskID(0)
        self._what = ""
        self._began = 0.0
        self._next_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()

    def say(self, sentence: str) -> None:
        """A sentence for a person."""
        self._console.print(sentence, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """So many of so many are done."""
        now = time.monotonic()
        if what != self._what:
            self._stop_bar()
            self._what, self._began, self._next_line = what, now, now + _SHOW_AFTER
        if now - self._began < _SHOW_AFTER:
            return
        if self._console.is_terminal:
            if self._bars is None:
                self._start_bar(what, done, total)
            else:
                self._bars.update(self._task, completed=done, total=total)
        elif now >= self._next_line and 0 < done < total:
            self._next_line = now + _LINE_EVERY
            left = (now - self._began) / done * (total - done)
            self.say(f"{what}: {done} of {total}, about {left:.0f} s left")

    def _start_bar(self, what: str, done: int, total: int) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bars.add_task(what, total=total, completed=done)
        self._bars.start()

    def _stop_bar(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def print_json(value: Json) -> None:
    """One JSON object, alone on standard output."""
    print(json.dumps(value, allow_nan=False), flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output; numbers to the right, three decimals, n/a for None.

    A line break in a head is kept on a terminal, where width is scarce. A pipe gets one line a row however
    wide it is, without ornament.
    """
    cells = [list(row) for row in rows]
    terminal = sys.stdout.isatty()
    console = Console() if terminal else Console(width=_UNBOUNDED)
    gap = 2 if console.width >= _ROOMY else 1
    table = Table(
        box=box.SIMPLE_HEAD if terminal else None,  # its rule brings a gap of its own
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1 if terminal else gap, 0, 0),
        header_style="bold" if terminal else "",
    )
    for i, name in enumerate(header):
        numeric = all(isinstance(row[i], int | float | None) for row in cells)
        table.add_column(
            Text(name if terminal else name.replace("\n", " ")),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",  # a long name goes on in the next line, whole
            min_width=min(12, max((len(str(row[i])) for row in cells), default=0)) if i == 0 else None,
        )
    for row in cells:
        table.add_row(*[Text(_cell(value)) for value in row])  # names may look like markup
    console.print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Names and values, one a line."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {_cell(value)}")


def _cell(value: object) -> str:
    if value is None:
        return "n/a"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
