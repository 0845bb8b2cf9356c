"""Where in the good pictures the surroundings of a region are found best, by spectra."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fettle.refine.references import References

_BLOCK = 2**19  # px of references whose sums are held at once
_TIE = 1e-6  # of the compared energy: what fp32 transforms leave between two equal windows


class Window(NamedTuple):
    """A place in the references: number, and top left corner in px."""

    reference: int
    top: int
    left: int


def best_window(
    own: Tensor, ring: Tensor, references: References, left_out: Collection[int] = ()
) -> Window | None:
    """The reference window of least squared difference to `own` (3, h, w) on `ring` (h, w) bool.

    Windows lie wholly inside a reference and on its valid pixels. Of equals the lowest number wins, then the
    first in row-major order. None: no window has room.
    """
    weight = ring.to(own.dtype)
    centred = (own - 0.5) * weight  # small numbers cancel with less rounding
    tie = _TIE * float(centred.square().sum() + weight.sum())
    columns = references.size[1] - own.shape[2] + 1
    best, found = math.inf, None
    for start, sums in window_sums(centred, weight, references):
        for i, least in enumerate(sums.amin(dim=1).tolist()):
            if start + i not in left_out and least < best - tie:
                best = least
                place = int((sums[i] <= least + tie).int().argmax())
                found = Window(start + i, place // columns, place % columns)
    return found


def window_sums(centred: Tensor, weight: Tensor, references: References) -> Iterator[tuple[int, Tensor]]:
    """Sums of squared differences at every window, less a constant, for some references after others.

    sum w (x - r)^2 = const + corr(w, r^2) - 2 corr(w x, r), and both correlations are products of spectra.

    Args:
        centred: (3, h, w), w (x - 0.5). weight: (h, w), w.

    Yields:
        The first reference's number, and (r, rows * columns) the sums; infinite where a window has no room.
        Nothing where none has.
    """
    size = height, width = references.size
    rows, columns = height - weight.shape[0] + 1, width - weight.shape[1] + 1
    if rows < 1 or columns < 1:
        return
    spectra = torch.fft.rfft2(torch.cat([centred, weight[None]]), s=size).conj().resolve_conj()
    num = max(_BLOCK // (height * width), 1)
    for start in range(0, len(references.pixels), num):
        block = slice(start, start + num)
        colours, squares = references.spectra[0][block], references.spectra[1][block]
        product = squares * spectra[3]
        for colour in range(3):  # one after the other: no sum over a large product
            product.addcmul_(colours[:, colour], spectra[colour], value=-2)
        sums = torch.fft.irfft2(product, s=size)[:, :rows, :columns]
        if not references.all_valid:
            sums = sums.masked_fill(~references.room((rows, columns), block), math.inf)
        yield start, sums.flatten(1)
