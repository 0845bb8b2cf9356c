"""The state of a training on disk, so that it can go on after a kill.

One safetensors file a training, replaced atomically; numbers and names are JSON in its header. Nothing in it
is ever executed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors
from torch import Tensor

SCHEMA = 1
STATE_FILE = "training.safetensors"
_PART_FILE = "training.safetensors.part"
_KEY = "fettle"


class DamagedState(Exception):
    """A state that cannot be used; the training starts anew."""


class Best(BaseModel):
    """The best held-out loss so far, and after how many steps it was reached."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    loss: float
    normalised: float | None


class Header(BaseModel):
    """Everything of a state but its tensors.

    Attributes:
        fingerprint: hash of all that makes a training this one.
        step: steps done. updates: optimiser steps done; several a step where a method gives several losses.
        seconds: time spent so far, over all resumptions.
        facts, warnings: of the fit record, once the training is finished.
        sha256: hash of the tensors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = SCHEMA
    fingerprint: str
    step: int
    updates: int
    seconds: float
    best: Best | None = None
    facts: dict[str, JsonValue] | None = None
    warnings: list[str] = []
    sha256: str = ""


def write_state(folder: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Replace the state in `folder`; a kill at any moment leaves the old one or the new one.

    Raises:
        OSError: the folder cannot be written.
    """
    # Copies: a file may not hold one memory under two names.
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    header = header.model_copy(update={"sha256": _hash(own)})
    data = dump_tensors(own, metadata={_KEY: header.model_dump_json()})
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / _PART_FILE
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / STATE_FILE)


def read_state(folder: Path) -> tuple[Header, dict[str, Tensor]] | None:
    """The state in `folder`, on the CPU; None where there is none.

    Raises:
        DamagedState: the file is cut, altered or of another version.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = Header.model_validate_json((file.metadata() or {}).get(_KEY, ""))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no dict
    except (SafetensorError, ValidationError, OSError) as error:
        raise DamagedState(str(error)) from error
    if header.format != SCHEMA or header.sha256 != _hash(tensors):
        raise DamagedState("its hash does not agree")
    return header, tensors


def forget(training_dir: Path | None) -> None:
    """Remove the state of a training, and of those in folders inside, once their model is saved."""
    if training_dir is None or not training_dir.is_dir():
        return
    for name in (STATE_FILE, _PART_FILE):
        for path in training_dir.rglob(name):
            path.unlink(missing_ok=True)
    folders = [path for path in training_dir.rglob("*") if path.is_dir() and not path.is_symlink()]
    for folder in [*sorted(folders, reverse=True), training_dir]:
        with suppress(OSError):  # it holds something else
            folder.rmdir()


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def signals_held() -> Iterator[None]:
    """Let Ctrl-C (and SIGTERM, where it has a handler) wait for the end of the block; a second comes through.

    A step is then done or not done, never half. Signals reach the main thread only; elsewhere none is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own = {number: handler for number, handler in handlers.items() if callable(handler)}
    pending: list[int] = []

    def give_back() -> None:
        for number, handler in own.items():
            signal.signal(number, handler)

    def hold(number: int, frame: FrameType | None) -> None:
        if pending:
            give_back()
            signal.raise_signal(number)
        pending.append(number)

    for number in own:
        signal.signal(number, hold)
    try:
        yield
    finally:
        give_back()
        if pending:
            signal.raise_signal(pending[0])
