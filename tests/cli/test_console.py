"""Tables that can be read at any width, and progress on everything that takes long."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable

import pytest

from fettle.cli.console import Screen, print_table
from fettle.cli.evaluate import SHOWN

LONG = "a_defect_with_quite_a_long_name"
HEADER = ["defect", "n", *SHOWN.values()]
ROWS = [["all", 24, *[0.5] * 9], [LONG, 4, None, *[1.0] * 8]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    print_table(HEADER, ROWS)
    return terminal.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 81, 99, 100, 120, 300])
def test_a_terminal_of_80_columns_holds_the_whole_table(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = lines_on_a_terminal(monkeypatch, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    assert text.split()[:10] == ["image"] * 3 + ["pixel"] * 3 + ["AUPRO"] * 2 + ["escape", "defect"]
    second_row = 1 + next(i for i, line in enumerate(lines) if line.startswith("all"))
    assert "".join(line.split()[0] for line in lines[second_row:]) == LONG  # folded perhaps, but whole
    assert text.count("0.500") == 9 and text.count("1.000") == 8 and text.count("n/a") == 1


def test_a_pipe_gets_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(HEADER, ROWS)
    header, everything, long = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "defect" and "image AUROC  image AP" in header
    assert everything.split() == ["all", "24", *["0.500"] * 9]
    assert long.split() == [LONG, "4", "n/a", *["1.000"] * 8]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_short_work_is_done_without_words(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Screen() as screen:
        for what in ("reading", "learning", "calibrating"):
            for done in range(1, 4):
                screen.progress(what, done, 3)
                clock(0.6)
    assert capsys.readouterr() == ("", "")


def test_longer_work_says_how_long_it_will_take_now_and_then(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Screen() as screen:
        for done in range(1, 31):
            screen.progress("learning", done, 30)
            clock(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "learning: 3 of 30, about 18 s left",
        "learning: 13 of 30, about 16 s left",
        "learning: 23 of 30, about 7 s left",
    ]


def test_a_terminal_gets_a_bar_on_standard_error(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Screen() as screen:
        for done in range(1, 6):
            screen.progress("learning", done, 5)
            clock(1)
    assert "learning" in terminal.getvalue() and "5/5" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_sentences_are_not_broken_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "Refused: '[bold]/a/b.png' " + "is too long " * 20
    with Screen() as screen:
        screen.say(sentence)
    assert capsys.readouterr().err == sentence + "\n"
