"""Feature batches on disk for the length of a fit, so that they take no memory, however many there are."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from fettle.errors import DataError
from fettle.protocols import FeatureBatch, no_words

_MIB = 1 << 20
_VALID = "valid"
_FEATURE = "feature."


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file, and how it lay in memory: `order` names its dimensions by stride."""

    offset: int
    shape: tuple[int, ...]  # in the file
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class FeatureFile:
    """Feature batches in the order they came, in a temporary file that ends with the process.

    Tensors come back with the same bits, on the same device and in the same order of memory, since matrix
    products round by how their input lies.

    Args:
        folder: made when first needed.
        max_mib: bound on the file, MiB; it never takes more than half of what the disk has free either.
        say: hears once that nothing more is kept, and why.
    """

    def __init__(self, folder: Path, *, max_mib: int, say: Callable[[str], None] = no_words) -> None:
        self.folder = folder
        self._room = max_mib * _MIB
        self._say = say
        self._file: FileIO | None = None
        self._end = 0
        self._batches: list[tuple[dict[str, _Stored], FeatureBatch]] = []  # the batch without its tensors
        self._full = False

    def __iter__(self) -> Iterator[FeatureBatch]:
        for stored, names in self._batches:
            tensors = {name: self._read(one) for name, one in stored.items()}
            valid = tensors.pop(_VALID)
            features = {name.removeprefix(_FEATURE): tensor for name, tensor in tensors.items()}
            yield names._replace(features=features, valid=valid)

    def append(self, batch: FeatureBatch) -> bool:
        """Keep a batch; whether it fits. After the first that does not, none is kept any more."""
        tensors = {_VALID: batch.valid, **{_FEATURE + name: t for name, t in batch.features.items()}}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._full or not self._has_room(size):
            return False
        try:
            stored = {name: self._write(tensor) for name, tensor in tensors.items()}
        except OSError as error:
            self._cannot_write(error)
            return False
        self._batches.append((stored, batch._replace(features={}, valid=torch.empty(0))))
        return True

    def _has_room(self, size: int) -> bool:
        if self._file is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # lives on
                weakref.finalize(self, self._file.close)
                self._room = min(self._room, shutil.disk_usage(self.folder).free // 2)
            except OSError as error:
                self._cannot_write(error)
                return False
        if self._end + size > self._room:
            self._stop(f"there is room for {self._room // _MIB} MiB", "Raise --cache-mib, or free the disk.")
        return not self._full

    def _cannot_write(self, error: OSError) -> None:
        self._stop(error.strerror or str(error), "Give a folder that can be written with --cache-dir.")

    def _stop(self, why: str, remedy: str) -> None:
        self._full = True
        self._say(
            f"Features of further pictures cannot be kept in {self.folder} ({why}) and are computed each "
            f"time they are needed, which is slower. {remedy}"
        )

    def _write(self, tensor: Tensor) -> _Stored:
        assert self._file is not None
        order = tuple(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
        laid = tensor.detach().permute(order).cpu().contiguous()
        stored = _Stored(self._end, tuple(laid.shape), order, tensor.dtype, tensor.device)
        self._file.seek(self._end)
        left = _bytes_of(laid)
        while len(left):
            left = left[self._file.write(left) :]
        self._end += laid.numel() * laid.element_size()
        return stored

    def _read(self, stored: _Stored) -> Tensor:
        assert self._file is not None
        laid = torch.empty(stored.shape, dtype=stored.dtype)
        self._file.seek(stored.offset)
        left = _bytes_of(laid)
        while len(left):
            read = self._file.readinto(left)
            if not read:
                raise DataError(
                    f"The temporary file of features in {self.folder} has lost its end.",
                    "Check the disk, or give another folder with --cache-dir.",
                )
            left = left[read:]
        inverse = sorted(range(len(stored.order)), key=stored.order.__getitem__)
        return laid.to(stored.device).permute(inverse)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.flatten().view(torch.uint8).numpy().data
