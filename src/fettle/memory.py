"""How much is held at once, and what is freed given back to the system where the C library keeps it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
    return trim


def views_together(device: str) -> int:
    """Views that go through a network at once, by default.

    On a CPU more than four are no faster (`benchmarks/inspect_speed.py`) and hold more.
    """
    return 4 if device.startswith("cpu") else 8


def give_back() -> None:
    """Return free pages inside the heap to the system; without effect where the C library has no such call.

    Many large arrays of changing sizes leave glibc's heap full of holes, so that resident memory grows with
    the number of pictures although nothing is kept.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
