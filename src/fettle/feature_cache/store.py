"""Tensors of pictures on disk: one safetensors file a picture, in a folder of bounded size."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fettle.errors import DataError
from fettle.protocols import no_words

_MIB = 1 << 20
_LARGEST_HALF = 65504.0
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_LEFTOVER = re.compile(r"[0-9a-f]{64}\.[0-9a-f-]+\.tmp")
_LEFTOVER_SECONDS = 3600.0  # no living writer takes so long for one file
_SCAN_EVERY = 64  # files written between two looks at what other processes wrote

_open_caches: WeakSet[FeatureCache] = WeakSet()  # of this process: what they use is never thrown out


class FeatureCache:
    """Tensors of pictures on disk, by key, in a folder of bounded size.

    Every file is written under another name first and then renamed: a kill leaves whole files only, and
    several processes may use one folder at once. When the folder is full, the files that were used longest
    ago go, but never those that a living cache of this process has used: what does not fit then is not kept.
    Several processes together may exceed the bound by the few files that each writes between two looks.

    Args:
        folder: made when first needed. Files in it that are not the cache's are left alone.
        max_mib: bound on the folder, MiB.
        say: hears, once each, that the cache is full, cannot be written, or has lost a file.
    """

    def __init__(self, folder: Path, *, max_mib: int, say: Callable[[str], None] = no_words) -> None:
        self.folder = Path(folder).absolute()
        self._room = max_mib * _MIB
        self._say = say
        self._said: set[str] = set()
        self._stopped = False  # nothing more is written
        self._used: set[str] = set()  # file names
        self._total = 0  # bytes in the folder, as of the last scan and by own writing since
        self._unused: deque[tuple[Path, int]] = deque()  # (file, bytes) that may go, used longest ago first
        self._since_scan = _SCAN_EVERY
        _open_caches.add(self)

    def holds(self, key: str) -> bool:
        """Whether there is a file for this key. It then counts as used, and stays."""
        path = self._path(key)
        try:
            os.utime(path)
        except OSError:  # absent, or another user's: its age cannot be set, but it can be read
            if not os.access(path, os.R_OK):
                return False
        self._used.add(path.name)
        return True

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put, in half precision, once its checksum agrees; None where it is absent or damaged."""
        return self._read(key, slice(None))

    def get_row(self, key: str, row: int) -> dict[str, Tensor] | None:
        """One row (view) of each tensor, (1, ...), without reading the others."""
        return self._read(key, slice(row, row + 1))

    def put(self, key: str, tensors: dict[str, Tensor]) -> bool:
        """Keep a picture's tensors: float ones in half precision, bool ones as bits, with as many rows each.

        Returns:
            whether they are kept: not where the folder is full or cannot be written.

        Raises:
            DataError: values that half precision cannot hold.
        """
        if self._stopped:
            return False
        data = _encode(tensors)
        path = self._path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._make_room(len(data)):
                self._stop(
                    f"The feature cache {self.folder} is full ({self._room // _MIB} MiB): the features of "
                    "further pictures are computed anew each time. Allow it more, or empty it."
                )
                return False
            _write_whole(path, data)
        except OSError as error:
            self._cannot_write(error)
            return False
        self._used.add(path.name)
        self._total += len(data)
        self._since_scan += 1
        return True

    def trim(self) -> None:
        """Sweep what killed writers left, and bring the folder within its bound as far as unused files go."""
        try:
            self._scan()
            self._make_room(0)
        except OSError as error:
            self._cannot_write(error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _read(self, key: str, rows: slice) -> dict[str, Tensor] | None:
        path = self._path(key)
        try:
            tensors = _decode(path, rows)
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError):
            if path.name in self._used:  # not merely absent
                self._say_once(
                    f"A file of the feature cache {self.folder} is damaged, or another run has thrown it "
                    "out: its features are computed anew."
                )
            return None
        self.holds(key)
        return tensors

    def _make_room(self, size: int) -> bool:
        """Throw out unused files until `size` bytes fit; whether they do."""
        if self._since_scan >= _SCAN_EVERY or (self._total + size > self._room and not self._unused):
            self._scan()
        if self._total + size > self._room:
            used = {name for cache in _open_caches if cache.folder == self.folder for name in cache._used}
            while self._total + size > self._room and self._unused:
                path, freed = self._unused.popleft()
                if path.name not in used:
                    path.unlink(missing_ok=True)
                    self._total -= freed
        return self._total + size <= self._room

    def _scan(self) -> None:
        """Look at the folder: its size, what may go, and leftovers, which go at once."""
        found: list[tuple[float, str, int]] = []
        self._since_scan = 0
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:
            entries = []
        for entry in entries:
            try:
                stat = entry.stat()
                if _ENTRY.fullmatch(entry.name):
                    found.append((stat.st_mtime, entry.path, stat.st_size))
                elif _LEFTOVER.fullmatch(entry.name) and time.time() - stat.st_mtime > _LEFTOVER_SECONDS:
                    Path(entry.path).unlink()
            except FileNotFoundError:  # another process was quicker
                continue
        self._total = sum(size for _, _, size in found)
        self._unused = deque((Path(path), size) for _, path, size in sorted(found))

    def _cannot_write(self, error: OSError) -> None:
        self._stop(
            f"The feature cache {self.folder} cannot be written ({error.strerror or error}): features that "
            "are not in it are computed anew each time. Give a folder that can be written."
        )

    def _stop(self, sentence: str) -> None:
        self._stopped = True
        self._say_once(sentence)

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._say(sentence)


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees a part of it under its name."""
    temporary = path.with_name(f"{path.stem}.{os.getpid():x}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _encode(tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a file: a row of a bool tensor becomes bits, which the header tells the shape of."""
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        rows = tensor.detach().cpu()
        if rows.dtype == torch.bool:
            shapes[name] = list(rows.shape[1:])
            stored[name] = _pack(rows)
        else:
            stored[name] = half_precision(rows, [f"tensor '{name}'"] * len(rows)).contiguous()
    return save(stored, {"bool": json.dumps(shapes), "crc32": str(_checksum(stored))})


def _decode(path: Path, rows: slice) -> dict[str, Tensor]:
    """Rows of a file's tensors. All rows together are checked against the checksum.

    Raises:
        OSError, SafetensorError, RuntimeError, ValueError, KeyError: absent or damaged.
    """
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        stored = {name: file.get_slice(name)[rows] for name in file.keys()}  # noqa: SIM118  # no mapping
    if rows == slice(None) and int(header["crc32"]) != _checksum(stored):
        raise ValueError("the checksum does not agree")
    shapes: dict[str, list[int]] = json.loads(header["bool"])
    return {name: _unpack(t, shapes[name]) if name in shapes else t for name, t in stored.items()}


def _pack(rows: Tensor) -> Tensor:
    """Bool (n, ...) to bits, (n, bytes) uint8."""
    return torch.from_numpy(np.packbits(rows.flatten(1).numpy(), axis=1))


def _unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Bits (n, bytes) uint8 back to bool (n, *shape)."""
    flat = np.unpackbits(bits.numpy(), axis=1, count=math.prod(shape))
    return torch.from_numpy(flat.astype(np.bool_)).reshape(-1, *shape)


def _checksum(stored: dict[str, Tensor]) -> int:
    """CRC-32 over all tensors' bytes: a power cut may leave a file of the right length with zeros in it."""
    found = 0
    for name in sorted(stored):
        found = zlib.crc32(stored[name].contiguous().view(torch.uint8).numpy().data, found)
    return found


def half_precision(values: Tensor, owners: Sequence[str]) -> Tensor:
    """Features in half precision.

    Args:
        values: (n, ...). owners: what each row belongs to, in words for the message.

    Raises:
        DataError: a value that is not finite, or beyond half precision's 65,504.
    """
    fits = (values.abs() <= _LARGEST_HALF).flatten(1).all(dim=1)  # False for NaN
    if not bool(fits.all()):
        row = fits.tolist().index(False)
        largest = float(values[row].abs().max())
        worst = "of NaN" if math.isnan(largest) else f"of size {largest:g}"
        raise DataError(
            f"The features of {owners[row]} hold values {worst}, and half precision, in which they are kept, "
            "ends at 65,504.",
            "Use another backbone or other weights.",
        )
    return values.half()
