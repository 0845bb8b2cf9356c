"""Good pictures for a training: their clean features, from the cache or computed, by walk or by number."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate

import torch
from torch import Tensor

from fettle.errors import DataError
from fettle.feature_cache.store import FeatureCache, half_precision
from fettle.feature_stream import GoodPicture, feature_batch, framed_picture, in_stream_order
from fettle.images.framing import Frame
from fettle.images.loading import Loaded, load_framed
from fettle.inspection import Refusal
from fettle.memory import give_back
from fettle.protocols import Backbone, Batch, FeatureBatch, FramedPicture, Run, Trained

_SCHEMA = 1  # of the files and of what is in a key: a change here makes every old file a stranger
_TRIM_EVERY = 4  # batches
_RANDOM = "random"
_VALID = "valid"  # names in a file; a method may call its features what it likes
_FEATURE = "feature."


def recipe_key(method: Trained, frame: Frame, device: str) -> str:
    """What features depend on besides the picture, as a hash: pictures' features are kept under it.

    The backbone counts by its name and the hash of its weights file; random weights count by themselves.
    """
    backbone = method.backbone
    spec = backbone.spec
    recipe = {
        "schema": _SCHEMA,
        "frame": frame.model_dump(mode="json", exclude={"reason"}),
        "backbone": spec.id,
        "weights": _weights_hash(backbone) if spec.sha256 == _RANDOM else spec.sha256,
        "normalisation": [*spec.mean, *spec.std],
        "levels": method.levels,
        "features": method.feature_key(),
        "device": torch.device(device).type,
        "versions": {name: version(name) for name in ("torch", "timm", "pillow")},
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _weights_hash(backbone: Backbone) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass
class _Views:
    """A picture's views on their way through a walk: framed pixels, or features that were kept."""

    picture: GoodPicture
    valid: Tensor  # (n, 1, H, W) bool
    pixels: Tensor | None = None  # (n, 3, H, W)
    features: dict[str, Tensor] | None = None  # (n, ...) in half precision
    to_keep: bool = False


class TrainingPictures:
    """Good pictures for a training: a stream of clean features, and any views by number.

    As a stream it is what `Method.prepare` walks: group by group, by content and never by listing. The first
    whole walk learns how many views each picture has and lists those that cannot be read in `refusals`; what
    asks for a view by its number takes that walk first, where nobody has. Views are numbered in stream order.

    Features are float32, rounded through half precision, and the same bits whether they come from the cache
    of `run.cache_dir` or are computed. Pictures themselves are never kept. Nothing is held for a picture but
    its key and its number of views.

    Args:
        what: named in the progress.
        batch_size: views that go through the network at once; a smaller rest is filled up with copies.
    """

    def __init__(
        self,
        method: Trained,
        pictures: Sequence[GoodPicture],
        frame: Frame,
        run: Run,
        *,
        what: str = "learning",
        batch_size: int = 8,
    ) -> None:
        self._method = method
        self._pictures = in_stream_order(pictures)
        self._frame = frame
        self._run = run
        self._batch_size = batch_size
        self._refused: dict[str, Refusal] = {}  # by picture key
        self._first_views: list[int] = []  # number of each picture's first view, then that of all views
        self._cache: FeatureCache | None = None
        self._recipe = ""
        if run.cache_dir is not None:
            self._cache = FeatureCache(run.cache_dir, max_mib=run.cache_mib, say=run.say)
            # The chunk's size may change the last bit on some devices.
            self._recipe = f"{recipe_key(method, frame, run.device)}/{batch_size}"
        self.what = what

    @property
    def num_pictures(self) -> int:
        return len(self._pictures)

    @property
    def refusals(self) -> list[Refusal]:
        """Pictures that could not be read, each once."""
        return list(self._refused.values())

    @property
    def num_views(self) -> int:
        """Views of all readable pictures: one each, or one a tile."""
        return self._numbering()[-1]

    @property
    def products(self) -> list[str]:
        """The product of each view."""
        return [picture.product for picture in self._of_views()]

    @property
    def keys(self) -> list[str]:
        """The key of each view's picture."""
        return [picture.key for picture in self._of_views()]

    def _of_views(self) -> Iterator[GoodPicture]:
        first = self._numbering()
        for i, picture in enumerate(self._pictures):
            yield from [picture] * (first[i + 1] - first[i])

    def __iter__(self) -> Iterator[FeatureBatch]:
        counts: list[int] = []
        pending: list[_Views] = []
        num_batches = 0
        for views in self._walk():
            counts.append(0 if views is None else len(views.valid))
            if views is not None:
                pending.append(views)
            self._run.progress(self.what, len(counts), self.num_pictures)
            if sum(len(item.valid) for item in pending) >= self._batch_size:
                yield self._finish(pending)
                pending = []
                num_batches += 1
                if num_batches % _TRIM_EVERY == 0:
                    give_back()
        if pending:
            yield self._finish(pending)
        if not self._first_views:
            self._first_views = [0, *accumulate(counts)]

    def framed(self, path: str) -> FramedPicture:
        """Any picture file in the frame of these pictures. Raises as `framed_picture` does."""
        return framed_picture(path, self._frame, self._run.device)

    def batch(self, indices: Sequence[int], *, pictures: bool = False) -> Batch:
        """Views by number, in the order asked for, on the run's device.

        Args:
            indices: 0 .. num_views - 1; a number may come twice.
            pictures: decode the pictures too.

        Raises:
            DataError: a picture that could be read at first cannot any more.
        """
        places = [self._place(index) for index in indices]
        with torch.autocast(torch.device(self._run.device).type, enabled=False):  # the head's alone
            return self._batch(places, pictures)

    def _batch(self, places: Sequence[tuple[int, int]], pictures: bool) -> Batch:
        kept: dict[tuple[int, int], dict[str, Tensor]] = {}
        if self._cache is not None:
            for number, view in set(places):
                found = self._cache.get_row(self._file_key(self._pictures[number]), view)
                if found is not None:
                    kept[number, view] = found
        missing = [place for place in dict.fromkeys(places) if place not in kept]
        pixels, valid = self._decode_views(places if pictures else missing)
        if missing:
            owners = [self._pictures[number] for number, _ in missing]
            inside = torch.cat([valid[place] for place in missing])
            computed = self._compute(torch.cat([pixels[place] for place in missing]), inside, owners)
            for row, place in enumerate(missing):
                rows = {name: values[row : row + 1] for name, values in computed.items()}
                kept[place] = {_VALID: valid[place], **rows}
        together = {name: torch.cat([kept[place][name] for place in places]) for name in kept[places[0]]}
        features, inside = self._on_device(together)
        shown = torch.cat([pixels[place] for place in places]).to(self._run.device) if pictures else None
        products = tuple(self._pictures[number].product for number, _ in places)
        return Batch(features, inside, shown, products)

    def _numbering(self) -> list[int]:
        if not self._first_views:
            for _ in self:
                pass
        return self._first_views

    def _place(self, index: int) -> tuple[int, int]:
        """(picture's number, view's number in it) of a view."""
        first = self._numbering()
        if not 0 <= index < first[-1]:
            raise IndexError(f"There is no view {index} among {first[-1]}, which are counted from 0.")
        number = bisect_right(first, index) - 1
        return number, index - first[number]

    def _walk(self) -> Iterator[_Views | None]:
        """Each picture's views in order, None where it cannot be read; decodes ahead what is missing."""
        todo = [p for p in self._pictures if p.key not in self._refused and not self._is_kept(p)]
        if self._cache is not None:
            self._cache.trim()  # after the files that are there have been marked as used
        to_load = {picture.key for picture in todo}
        ahead = load_framed(todo, lambda picture: picture.path, self._frame)
        for picture in self._pictures:
            if picture.key in to_load:
                yield self._framed(next(ahead))
            elif picture.key in self._refused:
                yield None
            else:
                assert self._cache is not None
                found = self._cache.get(self._file_key(picture))
                if found is None:  # damaged, or thrown out since the walk began
                    yield self._framed(next(load_framed([picture], lambda one: one.path, self._frame)))
                else:
                    yield _Views(picture, found.pop(_VALID), features=found)

    def _framed(self, loaded: Loaded[GoodPicture] | tuple[GoodPicture, Refusal]) -> _Views | None:
        if not isinstance(loaded, Loaded):
            self._refused[loaded[0].key] = loaded[1]
            return None
        picture, placed = loaded.item, loaded.placed
        unchanged = loaded.picture.sha256 == picture.key
        if self._cache is not None and not unchanged:
            self._run.say(f"'{picture.path}' has changed since it was listed: its features are not kept.")
        return _Views(
            picture, torch.from_numpy(placed.valid), torch.from_numpy(placed.views), to_keep=unchanged
        )

    def _finish(self, pending: Sequence[_Views]) -> FeatureBatch:
        """Compute and keep what is not kept yet, and join all."""
        new = [item for item in pending if item.features is None]
        if new:
            pixels = torch.cat([item.pixels for item in new if item.pixels is not None])
            owners = [item.picture for item in new for _ in item.valid]
            computed = self._compute(pixels, torch.cat([item.valid for item in new]), owners)
            first = 0
            for item in new:
                rows = slice(first, first := first + len(item.valid))
                item.features = {name: values[rows] for name, values in computed.items()}
                if self._cache is not None and item.to_keep:
                    self._cache.put(self._file_key(item.picture), {_VALID: item.valid, **item.features})
        parts = [{_VALID: item.valid, **(item.features or {})} for item in pending]
        together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        features, valid = self._on_device(together)
        return feature_batch(features, valid, [item.picture for item in pending for _ in item.valid])

    @torch.no_grad()
    def _compute(self, views: Tensor, valid: Tensor, owners: Sequence[GoodPicture]) -> dict[str, Tensor]:
        """Features in half precision on the CPU, by their names in a file.

        Every chunk has the same number of views, so that a view's bits do not depend on how many are asked
        for; and values lie in memory as in a file, since matrix products round by how their input lies.
        """
        size, device = self._batch_size, self._run.device
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(views), size):
            stop = min(start + size, len(views))
            rows = torch.arange(start, start + size).clamp_max(stop - 1)  # the last again, to fill up
            found = self._method.features(views[rows].to(device), valid[rows].to(device))
            names = [f"'{owner.path}'" for owner in owners[start:stop]]
            parts.append(
                {
                    _FEATURE + name: half_precision(values[: stop - start], names).cpu().contiguous()
                    for name, values in found.items()
                }
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _on_device(self, stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Features in float32, and the valid mask."""
        features = {
            name.removeprefix(_FEATURE): values.to(self._run.device).float()
            for name, values in stored.items()
            if name.startswith(_FEATURE)
        }
        return features, stored[_VALID].to(self._run.device)

    def _decode_views(
        self, places: Sequence[tuple[int, int]]
    ) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
        """Pixels (1, 3, H, W) and masks (1, 1, H, W) of these views, from their files."""
        pixels: dict[tuple[int, int], Tensor] = {}
        valid: dict[tuple[int, int], Tensor] = {}
        wanted: dict[int, set[int]] = {}
        for number, view in places:
            wanted.setdefault(number, set()).add(view)
        first = self._numbering()
        for loaded in load_framed(wanted, lambda number: self._pictures[number].path, self._frame):
            number = loaded.item if isinstance(loaded, Loaded) else loaded[0]
            if (
                not isinstance(loaded, Loaded)
                or len(loaded.placed.views) != first[number + 1] - first[number]
            ):
                why = "has another size now" if isinstance(loaded, Loaded) else loaded[1].reason
                raise DataError(
                    f"'{self._pictures[number].path}' was read when the training began and now is not: {why}",
                    "Put the picture back, or begin anew without it.",
                )
            for view in wanted[number]:
                pixels[number, view] = torch.from_numpy(loaded.placed.views[view : view + 1])
                valid[number, view] = torch.from_numpy(loaded.placed.valid[view : view + 1])
        return pixels, valid

    def _is_kept(self, picture: GoodPicture) -> bool:
        return self._cache is not None and self._cache.holds(self._file_key(picture))

    def _file_key(self, picture: GoodPicture) -> str:
        return f"{self._recipe}/{picture.key}"
