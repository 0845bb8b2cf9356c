"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fettle.memory import give_back

# Blocks below the size that malloc maps by itself; the last one alive keeps the heap from shrinking.
_PROGRAM = """
import os
from fettle.memory import give_back
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]
last = bytearray(b"x") * 100_000
del blocks
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim belongs to glibc")
def test_holes_in_the_heap_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 100_000_000


def test_may_be_called_at_any_time() -> None:
    give_back()
    give_back()
