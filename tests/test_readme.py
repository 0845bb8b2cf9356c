"""README.md tells the truth: its shell blocks are run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


def shell_lines(program: str) -> list[list[str]]:
    """The words of each line of README.md's `sh` blocks that begins with `program`, in their order."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words[:1] == [program]]


def fettle(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fettle", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_first_block_makes_the_demo_and_the_tests() -> None:
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    first = text.partition("```sh\n")[2].partition("```")[0]
    assert [shlex.split(line, comments=True) for line in first.splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_make_target_is_there() -> None:
    targets = [words[1:] for words in shell_lines("make")]
    assert targets
    for target in targets:
        answer = subprocess.run(
            ["make", "-n", *target], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, f"make {' '.join(target)}: {answer.stderr}"


@pytest.mark.slow
def test_every_fettle_line_works_in_an_empty_folder(tmp_path: Path) -> None:
    lines = shell_lines("fettle")
    assert lines[0][:2] == ["fettle", "data"]
    for words in lines:
        answer = fettle(*words[1:], cwd=tmp_path)
        assert answer.returncode == 0, f"{shlex.join(words)}: {answer.stderr}"


@pytest.mark.slow
def test_the_demo_prints_metrics_and_its_report(tmp_path: Path) -> None:
    answer = fettle("demo", "-o", "demo", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "image AUROC" in answer.stdout and "AUPRO" in answer.stdout
    report = tmp_path / answer.stdout.split()[-1]
    assert report.name == "report.html"
    html = report.read_text(encoding="utf-8")
    for link in re.findall(r'href="([^"]+)"', html):
        assert (report.parent / link).is_file()
