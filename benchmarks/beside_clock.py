"""What both sides of `beside_anomalib.py` measure with; it needs Python and torch alone."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from statistics import median
from typing import Any

Given = dict[str, Any]
Found = dict[str, Any]


class Clock:
    """Wall and CPU seconds since it was made; both of this process and all its threads."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall_s": time.perf_counter() - self.wall, "cpu_s": time.process_time() - self.cpu}


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def passes(step: Callable[[], object], times: int) -> dict[str, float]:
    """Median wall and CPU milliseconds of a step, after two passes that do not count."""
    step(), step()
    walls, cpus = [], []
    for _ in range(times):
        clock = Clock()
        step()
        found = clock.read()
        walls.append(1000 * found["wall_s"])
        cpus.append(1000 * found["cpu_s"])
    return {"wall_ms": median(walls), "cpu_ms": median(cpus)}


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def answer(actions: Mapping[str, Callable[[Given], Found]]) -> None:
    """Do what the command line asks, on one thread, and print what was found as one line of JSON.

    All that is printed meanwhile goes to the error stream.
    """
    import torch

    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        found = actions[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps(found))
