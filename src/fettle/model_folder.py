"""A model on disk: a manifest (JSON), and tensors (safetensors) or a graph, named and checked by hashes.

Saving is atomic: tensor files carry their hash in their name, so that new ones never overwrite old ones,
and replacing the manifest is the one step that switches from the old model to the new. A kill at any moment
leaves one of the two whole. Nothing in the folder is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from fettle.errors import ModelFolderError, UsageError
from fettle.protocols import Json

SCHEMA = 1
MANIFEST = "manifest.json"
PARITY = "parity.json"
GRAPH_SUFFIXES = ("onnx", "xml", "bin", "pt2")
_TENSORS = "safetensors"
_MANIFEST_OR_PARITY = r"manifest\.json|parity\.json"
_PARTIAL = r"(\.\d+\.partial)?"
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_TENSOR_BYTES = 16 << 30
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8}
    | {torch.int8, torch.int16, torch.int32, torch.int64}
)


@dataclass(frozen=True)
class StoredModel:
    """What a model folder holds: the manifest's content, the tensors by part ("backbone", "method"), and of
    an exported model the files of its graph by part ("graph", "weights")."""

    content: dict[str, Json]
    tensors: dict[str, dict[str, Tensor]]
    graph: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphFile:
    """A file of an exported graph: its suffix, one of `GRAPH_SUFFIXES`, and its bytes."""

    suffix: str
    data: bytes


def write_model(
    folder: Path,
    content: Mapping[str, Json],
    tensors: Mapping[str, Mapping[str, Tensor]],
    graph: Mapping[str, GraphFile] | None = None,
) -> None:
    """Write or replace a model folder atomically.

    Args:
        folder: made if need be; must be empty or hold a model.
        content: everything of the manifest but `schema`, `files` and `sha256`; JSON values, no NaN.
        tensors: part name -> tensors.
        graph: part name -> file, of an exported model.

    Raises:
        UsageError: see `check_replaceable`.
    """
    check_replaceable(folder, by_graph=bool(graph))
    try:
        _write(folder, content, tensors, graph or {})
    except OSError as error:
        raise ModelFolderError(
            f"The model could not be written to {folder}: {error.strerror or error}.",
            "Check the free space and the rights there; a former model is still whole.",
        ) from error


def check_replaceable(folder: Path, *, by_graph: bool = False) -> None:
    """Refuse a folder whose content a model may not take the place of.

    Args:
        by_graph: the model is an exported one, which must not take the place of a fitted one: that could
            not be calibrated or exported any more.

    Raises:
        UsageError: a file; a folder with something that is no model's; or `by_graph`, and a fitted model.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file where a folder is meant.", _ANOTHER)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    model = any(map(_is_hashed, names))  # others have a manifest.json, too, but not what ours names
    strange = next((name for name in names if not (model and _is_ours(name))), None)
    if strange is not None:
        raise UsageError(f"The folder '{folder}' holds '{strange}', so it is no model's.", _ANOTHER)
    if by_graph and any(name.endswith(f".{_TENSORS}") for name in names):
        raise UsageError(f"'{folder}' holds a fitted model, which the exported one would replace.", _ANOTHER)


def write_parity(folder: Path, report: Mapping[str, Json]) -> None:
    """`parity.json` for people and scripts; what is believed is the same report in the manifest."""
    _write_durably(folder / PARITY, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def _write(
    folder: Path,
    content: Mapping[str, Json],
    tensors: Mapping[str, Mapping[str, Tensor]],
    graph: Mapping[str, GraphFile],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Json] = {}

    def write(part: str, suffix: str, data: bytes) -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{part}-{sha256[:16]}.{suffix}"
        _write_durably(folder / name, data)
        files[part] = {"name": name, "sha256": sha256, "bytes": len(data)}

    for part, state in tensors.items():
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        write(part, _TENSORS, dump_tensors(whole))
    for part, file in graph.items():
        write(part, file.suffix, file.data)
    manifest: dict[str, Json] = {"schema": SCHEMA, **content, "files": files}
    manifest["sha256"] = _content_hash(manifest)
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    _write_durably(folder / MANIFEST, text.encode())
    kept = {cast("dict[str, str]", file)["name"] for file in files.values()}
    for path in folder.iterdir():
        if path.name not in kept and path.name != MANIFEST and _is_ours(path.name):
            path.unlink(missing_ok=True)


def read_model(folder: Path) -> StoredModel:
    """Read and check a model folder.

    Raises:
        ModelFolderError: no model, damaged, altered, of a newer schema, oversized, with a path that leaves
            the folder, or with NaN.
    """
    manifest = _read_manifest(folder)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ModelFolderError(f"The model {folder} is damaged: its manifest lists no files.", _RESTORE)
    tensors: dict[str, dict[str, Tensor]] = {}
    graph: dict[str, bytes] = {}
    for part, entry in files.items():
        name, data = _read_file(folder, entry)
        if name.endswith(f".{_TENSORS}"):
            tensors[part] = _parse_tensors(folder, name, data)
        else:
            graph[part] = data
    content = {key: value for key, value in manifest.items() if key not in ("schema", "files", "sha256")}
    return StoredModel(content, tensors, graph)


_ANOTHER = "Name another folder with -o."
_RESTORE = "Fit it again, or restore it from a copy."


def _read_manifest(folder: Path) -> dict[str, Json]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelFolderError(
            f"{folder} holds no model: there is no {MANIFEST}.", "Make one with 'fettle fit'."
        )
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ModelFolderError(f"The manifest of {folder} is larger than any real one.", _RESTORE)
    try:
        manifest = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        own_hash = _content_hash(manifest) if isinstance(manifest, dict) else ""
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"The manifest of {folder} is damaged: {error}.", _RESTORE) from error
    if not isinstance(manifest, dict):
        raise ModelFolderError(f"The manifest of {folder} is damaged: it is no object.", _RESTORE)
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ModelFolderError(
            f"The model {folder} has schema {schema}; this version reads up to {SCHEMA}.", "Update fettle."
        )
    if schema != SCHEMA or manifest.get("sha256") != own_hash:
        raise ModelFolderError(f"The manifest of {folder} was altered: its hash does not agree.", _RESTORE)
    return cast("dict[str, Json]", manifest)


def _read_file(folder: Path, entry: Json) -> tuple[str, bytes]:
    """Name and bytes of a file that the manifest lists, checked."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ModelFolderError(f"The model {folder} is damaged: a file entry has no name.", _RESTORE)
    name = str(entry["name"])
    path = folder / name
    if Path(name).name != name or not _is_ours(name) or path.is_symlink():
        raise ModelFolderError(f"The model {folder} names a file outside itself: {name!r}.", "Do not use it.")
    if not path.is_file():
        raise ModelFolderError(f"The model {folder} is damaged: {name} is missing.", _RESTORE)
    size = path.stat().st_size
    if size > _MAX_TENSOR_BYTES or size != entry.get("bytes"):
        raise ModelFolderError(f"The model {folder} is damaged: {name} has {size} bytes.", _RESTORE)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise ModelFolderError(
            f"The model {folder} was altered: the hash of {name} does not agree.", _RESTORE
        )
    return name, data


def _parse_tensors(folder: Path, name: str, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = load_tensors(data)
    except Exception as error:
        raise ModelFolderError(f"The model {folder} is damaged: {name}: {error}.", _RESTORE) from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ModelFolderError(f"The model {folder} holds {key} of type {tensor.dtype}.", _RESTORE)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelFolderError(
                f"The model {folder} holds values that are no numbers, in {key}.", _RESTORE
            )
    return tensors


def _is_ours(name: str) -> bool:
    """Names that this module gives: nothing else in a folder is ever read or removed."""
    return _is_hashed(name) or re.fullmatch(rf"({_MANIFEST_OR_PARITY}){_PARTIAL}", name) is not None


def _is_hashed(name: str) -> bool:
    """Names of files of tensors and graphs."""
    suffixes = "|".join((_TENSORS, *GRAPH_SUFFIXES))
    return re.fullmatch(rf"[a-z_0-9]+-[0-9a-f]{{16}}\.({suffixes}){_PARTIAL}", name) is not None


def _content_hash(manifest: Mapping[str, Json]) -> str:
    """Hash of the manifest without its own hash, independent of white space and key order."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _write_durably(path: Path, data: bytes) -> None:
    """Write beside the target, flush to the disk, then rename: the target is never half written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
