"""Which views a training step learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fettle.protocols import stream_seed


class PictureOrder:
    """The order of the views: a function of (seed, step, rank) alone, so that resuming needs no state.

    Without balance an epoch is a permutation of the views; with it, that many draws with replacement.
    Epochs follow one another without a gap, so that every batch is full and each process has its own part.

    Args:
        products: the product of each view.
        balance: how often a product comes: by its number of views ("none"), the number's root ("sqrt"), or
            all alike ("equal"). With one product all three are the same.
        seed: of the run.
    """

    def __init__(self, products: Sequence[str], balance: Literal["none", "sqrt", "equal"], seed: int) -> None:
        self._num = len(products)
        self._seed = seed
        self._weights: NDArray[np.float64] | None = None  # (views,)
        self._epoch: tuple[int, NDArray[np.int64]] | None = None
        _, product, count = np.unique(np.asarray(products), return_inverse=True, return_counts=True)
        if balance != "none" and len(count) > 1:
            share = count**0.5 if balance == "sqrt" else np.ones(len(count))
            self._weights = (share / share.sum() / count)[product]

    def indices(self, number: int, batch: int, rank: int = 0, processes: int = 1) -> list[int]:
        """Indices (batch,) of the views of step `number` for one process of several."""
        first = (number * processes + rank) * batch
        places = range(first, first + batch)
        return [int(self._order(place // self._num)[place % self._num]) for place in places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng(stream_seed(f"{self._seed}/order/{epoch}"))
            if self._weights is None:
                order = rng.permutation(self._num)
            else:
                order = rng.choice(self._num, size=self._num, p=self._weights)
            self._epoch = (epoch, order)
        return self._epoch[1]
