"""In which order a few-shot fit takes good pictures, as many as it wants: a pure function over keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def few_shot_order(keys: Sequence[str], seed: int) -> list[str]:
    """The keys sorted, and permuted by PCG64(seed).

    So the first k lie inside the first k + 1, and neither file names nor listing count.

    Args:
        keys: one a picture: the hash of its content, each once.
        seed: another one gives another order.
    """
    ordered = sorted(keys)
    places = np.random.Generator(np.random.PCG64(seed)).permutation(len(ordered))
    return [ordered[place] for place in places]
