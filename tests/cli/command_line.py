"""Runs `fettle` in this process, as a shell would: arguments in, exit code and both streams out."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from fettle.cli.main import run

TINY = ("--backbone", "tiny", "--weights", "random", "--size", "64")
SMALL = ("--set", "bank_rows=200")  # of PatchCore


@dataclass(frozen=True)
class Answer:
    """What a shell sees of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """The one sentence of a failure: no traceback, nothing on standard output."""
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if line.startswith("fettle: ")]
        assert len(lines) == 1 and "Traceback" not in self.err
        assert lines[0].endswith((".", "?"))
        return lines[0].removeprefix("fettle: ")


def fettle(*arguments: object) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work only waits for a second thread on a busy machine
    with (
        mock.patch.object(sys, "argv", ["fettle", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run()
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_num_threads(threads)
    assert code is None or isinstance(code, int)
    return Answer(code or 0, out.getvalue(), err.getvalue())


def fit(good: Path, out: Path, *more: object) -> Answer:
    return fettle("fit", good, "-o", out, *TINY, *SMALL, *more)
