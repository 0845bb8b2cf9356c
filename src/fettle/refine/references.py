"""Good pictures that regions are filled from: which are kept, their spectra, and how far fills are off."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fettle.errors import ModelFolderError, UsageError
from fettle.layers.coreset import project, select_greedy
from fettle.refine.fill import fill_roi

MAX_REFERENCES = 256
_MAX_SIDE = 8192  # px
_THUMBNAIL = 16  # px
_DISC_RADIUS = 24.0  # px at a side of 256


@dataclass(frozen=True, eq=False)
class References:
    """Good pictures in the frame, as they are kept in a model.

    Attributes:
        pixels: uint8 (R, 3, H, W). valid: bool (R, 1, H, W), False on padding.
    """

    pixels: Tensor
    valid: Tensor
    _smaller: dict[int, References] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> References:
        """From `state()`, which may come from a file of unknown origin.

        Raises:
            ModelFolderError: names, types or shapes are not those of references.
        """
        if set(state) != {"pixels", "valid"}:
            raise _damaged(f"they hold {sorted(state)}")
        pixels, valid = state["pixels"], state["valid"]
        if pixels.dtype != torch.uint8 or valid.dtype != torch.bool:
            raise _damaged(f"they are of {pixels.dtype} and {valid.dtype}")
        if pixels.ndim != 4 or not 1 <= len(pixels) <= MAX_REFERENCES or pixels.shape[1] != 3:
            raise _damaged(f"they have the shape {tuple(pixels.shape)}")
        if not 1 <= min(pixels.shape[2:]) <= max(pixels.shape[2:]) <= _MAX_SIDE:
            raise _damaged(f"they have the shape {tuple(pixels.shape)}")
        if valid.shape != (len(pixels), 1, *pixels.shape[2:]):
            raise _damaged(f"valid has the shape {tuple(valid.shape)} beside {tuple(pixels.shape)}")
        return cls(pixels, valid)

    @classmethod
    def from_views(cls, views: Tensor, valid: Tensor) -> References:
        """From pictures (R, 3, H, W) in 0..1 and valid (R, 1, H, W) bool."""
        return cls((views.clamp(0, 1) * 255).round().to(torch.uint8), valid)

    def state(self) -> dict[str, Tensor]:
        """What a model keeps."""
        return {"pixels": self.pixels.contiguous(), "valid": self.valid.contiguous()}

    def to(self, device: torch.device | str) -> References:
        """There; itself, with what was computed once, where it is there already."""
        if self.pixels.device == torch.device(device):
            return self
        return References(self.pixels.to(device), self.valid.to(device))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, px."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @cached_property
    def spectra(self) -> tuple[Tensor, Tensor]:
        """Of the colours less 0.5, (R, 3, H, W // 2 + 1), and of their summed squares, (R, H, W // 2 + 1).

        Computed once; complex64, so 16 bytes a pixel and reference.
        """
        centred = self.pixels.float() / 255 - 0.5
        return torch.fft.rfft2(centred), torch.fft.rfft2(centred.square().sum(dim=1))

    @cached_property
    def all_valid(self) -> bool:
        """Whether there is no padding."""
        return bool(self.valid.all())

    def smaller(self, scale: int) -> References:
        """Means of cells of `scale` x `scale` px, valid where all of the cell is; computed once.

        Pixels at the right and at the bottom that fill no cell are left off.
        """
        if scale == 1:
            return self
        if scale not in self._smaller:
            means = F.avg_pool2d(self.pixels.float(), scale).round().to(torch.uint8)
            blank = F.max_pool2d((~self.valid).float(), scale) > 0
            self._smaller[scale] = References(means, ~blank)
        return self._smaller[scale]

    def room(self, places: tuple[int, int], block: slice) -> Tensor:
        """(r, *places) bool: which windows, by their top left corner, hold valid pixels only.

        Args:
            places: numbers of rows and columns at which a window may lie.
            block: which references.
        """
        rows, columns = places
        height, width = self.size[0] - rows + 1, self.size[1] - columns + 1
        counts = self._invalid_counts[block]  # (r, H + 1, W + 1)
        inside = (
            counts[:, height:, width:]
            - counts[:, :rows, width:]
            - counts[:, height:, :columns]
            + counts[:, :rows, :columns]
        )
        return inside == 0

    @cached_property
    def _invalid_counts(self) -> Tensor:
        """(R, H + 1, W + 1): invalid pixels above and to the left."""
        counts = (~self.valid[:, 0]).int().cumsum(1).cumsum(2).int()
        return F.pad(counts, (1, 0, 1, 0))


def _damaged(how: str) -> ModelFolderError:
    return ModelFolderError(
        f"The model's reference pictures are damaged: {how}.", "Fit it again, or restore a copy."
    )


def choose_references(views: Iterable[Tensor], count: int) -> list[int]:
    """Numbers of pictures so that every other is like one of them: greedy k-centre on small thumbnails.

    Starts with the picture nearest to the mean. Of pictures that are all alike fewer are chosen.

    Args:
        views: pictures (3, H, W) or batches of them (B, 3, H, W), walked once; numbers count pictures.
        count: how many to choose at most.

    Returns:
        In the order in which they were chosen, so that its first few are a choice of a few.
    """
    thumbnails = [
        F.adaptive_avg_pool2d(view.float(), _THUMBNAIL).reshape(-1, 3 * _THUMBNAIL**2).cpu() for view in views
    ]
    if not thumbnails or count < 1:
        return []
    rows = torch.cat(thumbnails)
    picks: list[int] = select_greedy(project(rows, None), min(count, len(rows))).indices.tolist()
    return picks


@torch.no_grad()
def noise_floor(
    pictures: Tensor,
    valid: Tensor,
    references: References | None,
    *,
    generator: Generator,
    own: Sequence[int | Collection[int] | None] | None = None,
    ring: int = 12,
    quantile: float = 0.995,
    turn: bool = True,
) -> float:
    """How far fills of good regions are off: a quantile of ||X - F|| over discs on good pictures.

    Args:
        pictures: (N, 3, H, W) in 0..1, good and not learnt from. valid: (N, 1, H, W) bool.
        references: what is filled from.
        generator: on the CPU; draws each disc's place among those where the disc fits.
        own: each picture's number or numbers among the references, which it is never filled from; None for
            none.
        ring, turn: as in `fill_roi`.
        quantile: of the differences (norm over the three channels, in 0..sqrt(3)).

    Raises:
        UsageError: no picture has room for a disc and its surroundings.
    """
    radius = _DISC_RADIUS * min(pictures.shape[-2:]) / 256
    numbers = [None] * len(pictures) if own is None else own
    differences = []
    for picture, shown, number in zip(pictures, valid[:, 0], numbers, strict=True):
        disc = _random_disc(shown, radius, generator) & shown
        if not bool(disc.any()) or not bool((shown & ~disc).any()):
            continue
        fill = fill_roi(picture, disc, references, ring=ring, leave_out=number, valid=shown, turn=turn)
        differences.append((picture - fill.pixels).norm(dim=0)[disc].cpu())
    if not differences:
        raise UsageError(
            f"None of {len(pictures)} good pictures has room for a disc of {radius:.0f} px.",
            "Give larger pictures or a larger region of interest.",
        )
    return float(np.quantile(torch.cat(differences).double().numpy(), quantile))


def _random_disc(shown: Tensor, radius: float, generator: Generator) -> Tensor:
    """(H, W) bool: a disc within `shown`; where none fits, the one that is most inside."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(shown.cpu().numpy(), 1))[1:-1, 1:-1]
    centres = np.argwhere(depth >= min(radius + 1, depth.max()))
    y, x = centres[int(torch.randint(len(centres), (1,), generator=generator))]
    rows = torch.arange(shown.shape[0], device=shown.device)[:, None] - int(y)
    columns = torch.arange(shown.shape[1], device=shown.device)[None] - int(x)
    return rows**2 + columns**2 <= radius**2
