"""Where backbone weights come from: an explicit file, FETTLE_WEIGHTS, an installed package, the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fettle.errors import WeightsError

FOLDER_VARIABLE = "FETTLE_WEIGHTS"
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class KnownFile:
    """A weights file that is recognised by its hash.

    Attributes:
        name: the file's name.
        sha256: its hash.
        package: the installed package that carries it, "" where none does.
        pickled: a torch file; only ever read when the hash agrees, and with `weights_only`.
    """

    name: str
    sha256: str
    package: str = ""
    pickled: bool = False


@dataclass(frozen=True)
class Found:
    """A weights file that was found, where, and its hash."""

    path: Path
    sha256: str
    source: str
    known: KnownFile | None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_weights(name: str, files: tuple[KnownFile, ...], explicit: Path | None, hub: str | None) -> Found:
    """The first that is there: explicit file, FETTLE_WEIGHTS, installed package, hub cache, hub.

    Args:
        name: the backbone's name, for messages and for files recognised by name.
        files: files known to serve this backbone.
        explicit: a file that the user named; nothing else is then tried.
        hub: repository on the model hub, or None.

    Raises:
        WeightsError: nothing found; the message names every remedy.
    """
    if explicit is not None:
        if not explicit.is_file():
            raise WeightsError(
                f"There is no weights file {explicit}.", "Check the path given with --weights."
            )
        return _recognise(explicit, files, f"file {explicit.name}")
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        path = _in_folder(Path(folder), name, files)
        if path is not None:
            return _recognise(path, files, f"{FOLDER_VARIABLE}, file {path.name}")
    for known in files:
        path = _in_package(known)
        if path is not None:
            return _recognise(path, (known,), f"package {known.package.replace('_', '-')}")
    if hub is not None:
        path = _from_hub(hub)
        if path is not None:
            return _recognise(path, files, f"hub repository {hub}")
    package = next((f.package.replace("_", "-") for f in files if f.package), None)
    remedies = [f"give a file with --weights, or put one into the folder that {FOLDER_VARIABLE} names"]
    if package:
        remedies.append(f"install the package {package}")
    if hub:
        remedies.append("or connect to the model hub, which could not be reached")
    raise WeightsError(
        f"No weights were found for backbone '{name}'.", "Remedies: " + "; ".join(remedies) + "."
    )


def read_weights(found: Found) -> dict[str, Tensor]:
    """The tensors of a weights file: safetensors, or a torch file whose hash is known."""
    if found.known is not None and found.known.pickled:
        state = torch.load(found.path, map_location="cpu", weights_only=True)
    elif found.path.suffix == ".safetensors":
        try:
            state = load_file(found.path)
        except Exception as error:
            raise WeightsError(
                f"The weights file {found.path.name} is damaged: {error}.", "Fetch it again."
            ) from error
    else:
        raise WeightsError(
            f"The weights file {found.path.name} is no safetensors file and its hash is unknown.",
            "Only safetensors files are read; convert it first.",
        )
    return {str(key): value for key, value in state.items()}


def _recognise(path: Path, files: tuple[KnownFile, ...], source: str) -> Found:
    sha256 = file_sha256(path)
    known = next((f for f in files if f.sha256 == sha256), None)
    return Found(path, sha256, source, known)


def _in_folder(folder: Path, name: str, files: tuple[KnownFile, ...]) -> Path | None:
    """A known file by its name, else a safetensors file named after the backbone."""
    for known in files:
        if (folder / known.name).is_file():
            return folder / known.name
    return next(iter(sorted(folder.glob(f"{name}*.safetensors"))), None)


def _in_package(known: KnownFile) -> Path | None:
    """The file inside an installed data-only package. The package's own code is not run."""
    if not known.package:
        return None
    spec = importlib.util.find_spec(known.package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "models" / known.name
        if path.is_file():
            sha256 = file_sha256(path)
            if sha256 != known.sha256:
                raise WeightsError(
                    f"The package {known.package} holds an altered {known.name} ({sha256[:12]}).",
                    "Install it again.",
                )
            return path
    return None


def _from_hub(repository: str) -> Path | None:
    """The hub's cached file, else a download; None where the hub does not answer within 5 s."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    cached = try_to_load_from_cache(repository, "model.safetensors")  # looks at files only
    if isinstance(cached, str):
        return Path(cached)
    host = constants.ENDPOINT.split("://", 1)[-1].split("/", 1)[0].split(":", 1)[0]
    if constants.HF_HUB_OFFLINE or not _answers(host, HUB_SECONDS - 1):
        return None
    try:
        return Path(hf_hub_download(repository, "model.safetensors", etag_timeout=HUB_SECONDS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        return None


def _answers(host: str, seconds: float) -> bool:
    """Whether a host takes a connection in time. Looking its name up may hang, hence the thread."""
    reached = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((host, 443), timeout=seconds).close()
            reached.set()
        except OSError:
            return

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return reached.is_set()
