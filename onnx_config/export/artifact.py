"""The files of a converted model: which travel with the graph, and under which content address."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_config.errors import InputError
from onnx_config.file_hash import sha256_of
from onnx_config.sentence_modules import config_folder

__all__ = [
    "FERRY_FILE",
    "ArtifactFile",
    "content_address",
    "copy_side_files",
    "finite",
    "list_files",
    "read_ferry_file",
    "write_ferry_file",
    "write_ferry_value",
]

FERRY_FILE = "ferry.json"
"""What is known of the artifact: its report entry and the hash of every other file."""

# Anywhere in a name, so that indexes of shards and graphs' data (model.safetensors.index.json, model.onnx.data) go too.
_LEFT_BEHIND_SUFFIXES = {
    ".bin", ".ckpt", ".gguf", ".h5", ".joblib", ".lock", ".md", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pickle",
    ".pkl", ".pt", ".pth", ".safetensors", ".tflite", ".zip",
}  # fmt: skip
_LEFT_BEHIND_NAMES = {FERRY_FILE, "onnx_data"}
_LARGEST_SIDE_FILE_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """One file of an artifact."""

    path: str
    """Relative to the folder, with forward slashes."""

    size_bytes: int
    """Length of the file."""

    sha256: str
    """SHA-256 of its content, in hex."""


def copy_side_files(source: Path, target: Path) -> tuple[str, ...]:
    """Copy config, tokenizer and processor files as they came; return their relative names.

    Weights, graphs, pickles, readmes and hidden files stay behind. Of subfolders, only the small ``config.json``
    that sentence-transformers keeps for its modules comes along. Where it keeps the transformer in a folder of its own,
    that one's files come to the top, where loaders look for a config and a tokenizer.
    """
    names = []
    files = {path.relative_to(source): path for path in (*source.iterdir(), *source.glob("*/config.json"))}
    if (transformer := config_folder(source)) != source:
        files = {path.relative_to(transformer): path for path in transformer.iterdir()} | files
    for relative, path in sorted(files.items()):
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if path.name in _LEFT_BEHIND_NAMES or _LEFT_BEHIND_SUFFIXES & {s.lower() for s in path.suffixes}:
            continue
        if path.stat().st_size > _LARGEST_SIDE_FILE_BYTES:
            continue
        (target / relative).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / relative)
        names.append(relative.as_posix())
    return tuple(names)


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FERRY_FILE)


def list_files(folder: Path) -> tuple[ArtifactFile, ...]:
    """Return every file of an artifact but ``ferry.json``, hashed, by name."""
    return tuple(
        ArtifactFile(path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in _walk(folder)
    )


def content_address(files: Iterable[ArtifactFile]) -> str:
    """Return the SHA-256 over names and hashes of the files: equal content, equal address."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.path):
        # A file name need not be UTF-8; Python holds the bytes of such a one as surrogates.
        digest.update(f"{file.path}\0{file.sha256}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def write_ferry_file(
    folder: Path, entry: dict[str, Any], files: Iterable[ArtifactFile], *, basis: dict[str, Any] | None = None
) -> Path:
    """Write ``ferry.json`` atomically: ``entry``, the hashes of ``files``, and the ``basis`` of the verdict.

    The basis is what a later comparison needs to know: how the model was asked for, and what each graph takes.

    A number that is not finite (a difference from NaN, say) becomes ``null``, since JSON has none.
    """
    value: dict[str, Any] = {
        "schema": 1,
        "model": finite(entry),
        "files": {file.path: {"sha256": file.sha256, "size_bytes": file.size_bytes} for file in files},
    }
    if basis is not None:
        value["basis"] = basis
    write_ferry_value(folder, value)
    return folder / FERRY_FILE


def write_ferry_value(folder: Path, value: dict[str, Any]) -> None:
    """Write a whole ``ferry.json`` atomically."""
    path = folder / FERRY_FILE
    aside = path.with_name(f".{FERRY_FILE}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def finite(value: Any) -> Any:
    """Return a JSON value with ``None`` in the place of numbers that are not finite, since JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_ferry_file(folder: Path) -> dict[str, Any] | None:
    """Return what `write_ferry_file` wrote; ``None`` where there is no such file.

    Raises:
        InputError: If the file is there and cannot be read.
    """
    path = folder / FERRY_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}. Convert the model again.") from error
    if not isinstance(value, dict) or value.get("schema") != 1 or not isinstance(value.get("model"), dict):
        raise InputError(f"{str(path)!r} is not of schema 1. Convert the model again, or upgrade onnx-ferry.")
    return value
