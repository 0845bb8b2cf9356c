"""Good pictures as a stream of a method's clean features, decoded ahead and kept on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.feature_file import FeatureFile
from fettle.images.decode import read_picture
from fettle.images.framing import Frame
from fettle.images.loading import Loaded, load_framed
from fettle.inspection import Refusal
from fettle.memory import give_back, views_together
from fettle.protocols import FeatureBatch, FramedPicture, Method, Progress

_TRIM_EVERY = 2  # batches


@dataclass(frozen=True)
class GoodPicture:
    """A good picture's file, the hash of its bytes, and the group it belongs to (itself without groups)."""

    path: Path
    key: str
    group: str
    product: str = ""


def in_stream_order(pictures: Sequence[GoodPicture]) -> list[GoodPicture]:
    """Pictures group by group, ordered by content and never by listing."""
    first_key: dict[str, str] = {}
    for picture in sorted(pictures, key=lambda picture: picture.key):
        first_key.setdefault(picture.group, picture.key)
    return sorted(pictures, key=lambda picture: (first_key[picture.group], picture.key))


def framed_picture(path: Path | str, frame: Frame, device: str) -> FramedPicture:
    """A picture file as the network sees it, alone.

    Raises:
        UsageError: the frame cuts pictures into tiles: none is seen whole.
        PictureError: it cannot be read.
    """
    if frame.mode == "tile":
        raise UsageError(
            f"'{path}' cannot be framed whole: this model cuts its pictures into tiles.",
            "Fit one with --frame auto.",
        )
    picture = read_picture(path)
    placed = frame.place(picture)
    return FramedPicture(
        torch.from_numpy(placed.views).to(device),
        torch.from_numpy(placed.valid).to(device),
        picture.sha256,
        picture.size,
        keeps_aspect=frame.mode != "stretch",
    )


def feature_batch(features: dict[str, Tensor], valid: Tensor, owners: Sequence[GoodPicture]) -> FeatureBatch:
    """Features of some views, with the names of the picture that each is of."""
    return FeatureBatch(
        features,
        valid,
        keys=tuple(owner.key for owner in owners),
        groups=tuple(owner.group for owner in owners),
        paths=tuple(str(owner.path) for owner in owners),
        products=tuple(owner.product for owner in owners),
    )


class GoodFeatures:
    """The features of good pictures, group by group, ordered by content and never by listing.

    The first walk keeps what fits into `kept`; later walks compute only the rest anew. Pictures that cannot
    be read are left out and listed in `refusals`.

    Args:
        batch_size: views (pictures, or tiles of them) that go through the network at once; None: see
            `memory.views_together`.
        kept: keeps batches for later walks; None: all are computed in each.
        progress: called with (`what` and the number of a later pass, pictures done, pictures in all).
    """

    def __init__(
        self,
        method: Method,
        pictures: Sequence[GoodPicture],
        frame: Frame,
        *,
        device: str,
        progress: Progress,
        what: str,
        batch_size: int | None = None,
        kept: FeatureFile | None = None,
    ) -> None:
        self._method = method
        self._pictures = in_stream_order(pictures)
        self._frame = frame
        self._device = device
        self._batch_size = views_together(device) if batch_size is None else batch_size
        self._place = {picture.key: place for place, picture in enumerate(self._pictures)}
        self._kept = kept
        self._num_kept = 0  # pictures whose place in the stream is before its first batch that is not kept
        self._refused: dict[str, Refusal] = {}
        self._passes = Counter[str]()
        self.progress = progress
        self.what = what

    @property
    def num_pictures(self) -> int:
        return len(self._pictures)

    @property
    def refusals(self) -> list[Refusal]:
        return list(self._refused.values())

    def framed(self, path: str) -> FramedPicture:
        """Any picture file in the frame of these pictures. Raises as `framed_picture` does."""
        return framed_picture(path, self._frame, self._device)

    def __iter__(self) -> Iterator[FeatureBatch]:
        self._passes[self.what] += 1
        nth = self._passes[self.what]
        what = self.what if nth == 1 else f"{self.what}, pass {nth}"
        done = 0
        for number, batch in enumerate(self._batches()):
            if number % _TRIM_EVERY == 0:
                give_back()
            done += len(set(batch.keys))
            self.progress(what, done, self.num_pictures)
            yield batch

    def _batches(self) -> Iterator[FeatureBatch]:
        """First those that are kept, an unbroken beginning of the stream."""
        if self._kept is not None:
            yield from self._kept
        num_kept = self._num_kept
        for batch in self._computed(self._pictures[num_kept:]):
            # Of two walks at once the first to get on keeps.
            if self._kept is not None and self._num_kept == num_kept and self._kept.append(batch):
                self._num_kept = num_kept = 1 + self._place[batch.keys[-1]]
            yield batch

    def _computed(self, pictures: Sequence[GoodPicture]) -> Iterator[FeatureBatch]:
        pending: list[Loaded[GoodPicture]] = []
        readable = [picture for picture in pictures if picture.key not in self._refused]
        for loaded in load_framed(readable, lambda picture: picture.path, self._frame):
            if not isinstance(loaded, Loaded):
                self._refused[loaded[0].key] = loaded[1]
                continue
            if loaded.picture.sha256 != loaded.item.key:
                path = str(loaded.item.path)
                self._refused[loaded.item.key] = Refusal(path, f"'{path}' has changed since it was listed.")
                continue
            pending.append(loaded)
            if sum(len(item.placed.views) for item in pending) >= self._batch_size:
                yield self._features(pending)
                pending = []
        if pending:
            yield self._features(pending)

    @torch.inference_mode()
    def _features(self, pending: Sequence[Loaded[GoodPicture]]) -> FeatureBatch:
        views = torch.cat([torch.from_numpy(item.placed.views) for item in pending])
        valid = torch.cat([torch.from_numpy(item.placed.valid) for item in pending])
        parts = [
            self._method.features(
                views[i : i + self._batch_size].to(self._device),
                valid[i : i + self._batch_size].to(self._device),
            )
            for i in range(0, len(views), self._batch_size)
        ]
        features = parts[0]
        if len(parts) > 1:
            features = {name: torch.cat([part[name] for part in parts]) for name in features}
        owners = [item.item for item in pending for _ in item.placed.views]
        return feature_batch(features, valid.to(self._device), owners)
