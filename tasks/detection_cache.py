"""Detections kept by content: what was found once for a config is not found again until the versions change.

One file per detection, ``<2 hex>/<sha256>.json``, whole or not there. Files that are torn, foreign or of another
schema count as absent, and so does a folder that cannot be read; one that cannot be written to keeps nothing.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnx_config.config_file import read_config_dict
from onnx_config.errors import ErrorKind, FerryError, error_of_kind
from onnx_config.export.isolate import ChildError
from onnx_config.preprocessors import TOKENIZER_FILE
from onnx_config.remote_code import code_sha256, names_code
from onnx_config.sentence_modules import MODULES_FILE, module_folders, transformer_settings
from onnx_config.spec import ModelSpec
from tasks.key import content_sha256
from tasks.structure import structural_part
from tasks.versions import CODE_EPOCH, detection_versions

__all__ = ["DetectionCache", "detection_key", "detection_parts", "is_kept"]

_SCHEMA = 1
_LARGEST_BYTES = 16 * 1024**2
# Stands for the model's folder in a message, since the same content may lie in another one.
_FOLDER = "\ufffcfolder\ufffc"


def detection_parts(folder: Path, *, task: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Return all that decides what detection finds for a model's folder, as JSON values; no path is among them.

    Raises:
        InputError: If the config cannot be read.
        OSError, ValueError: If a file cannot be read, or is too large to be what it should be.
    """
    modules = _module_files(folder)
    for path in (folder / "config.json", *modules.values()):
        if path.is_file() and path.stat().st_size > _LARGEST_BYTES:
            raise ValueError(f"{str(path)!r} is larger than {_LARGEST_BYTES} bytes")
    config = read_config_dict(folder)
    own, tokenizer = trust_remote_code and names_code(config), folder / TOKENIZER_FILE
    return {
        "config": config,
        "modules": {name: path.read_text(encoding="utf-8") for name, path in modules.items()},
        "task": task,
        "trust_remote_code": trust_remote_code,
        "code": code_sha256(folder) if own else None,
        "tokenizer": tokenizer.read_text(encoding="utf-8") if own and tokenizer.is_file() else None,
    }


def _module_files(folder: Path) -> dict[str, Path]:
    """Return what sentence-transformers says of its modules, by name; empty for any other model."""
    if not (folder / MODULES_FILE).is_file():
        return {}
    names = [MODULES_FILE, *transformer_settings(folder), *(f"{name}/config.json" for name in module_folders(folder))]
    return {name: folder / name for name in names if (folder / name).is_file()}


def detection_key(parts: Mapping[str, Any], *, versions: Mapping[str, str] | None = None) -> str:
    """Return the full SHA-256 under which a detection is kept; configs that differ in nothing it reads have one.

    Args:
        parts: What decides the answer beside versions, as `detection_parts` gives it; JSON values.
        versions: Versions of packages and code; ``None``: those installed.
    """
    found = detection_versions() if versions is None else dict(versions)
    # Of what code of the model's own reads nothing is known.
    deciding = parts if parts.get("code") else {**parts, "config": structural_part(parts["config"])}
    return content_sha256({"schema": _SCHEMA, "epoch": CODE_EPOCH, "parts": deciding, "versions": found})


def is_kept(error: FerryError) -> bool:
    """Return whether detection would fail the same way again for the same key.

    What somebody foresaw and worded does; time, memory, the disk, and exceptions that nobody foresaw may not.
    """
    foreseen = not isinstance(error.__cause__, ChildError)
    return foreseen and error.kind in (ErrorKind.UNSUPPORTED, ErrorKind.BAD_INPUT)


class DetectionCache:
    """The detections in a folder. Any number of processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """The folder; made when something is written."""

    def path_of(self, key: str) -> Path:
        """Return where the detection of ``key`` is, or would be."""
        return self.root / key[:2] / f"{key}.json"

    def read(self, key: str, *, folder: Path) -> ModelSpec | FerryError | None:
        """Return what was found, or the error that it ended in; ``None``: not known.

        ``folder`` is the model's, for an error's message.
        """
        try:
            record = json.loads(self.path_of(key).read_bytes())
            if (record["schema"], record["key"]) != (_SCHEMA, key):
                return None
            # When it was last used, for whoever clears up; a folder that cannot be written to is read all the same.
            with suppress(OSError):
                os.utime(self.path_of(key))
            if (error := record.get("error")) is not None:
                return error_of_kind(ErrorKind(error["kind"]), error["message"].replace(_FOLDER, str(folder)))
            return ModelSpec.from_json(record["spec"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, key: str, found: ModelSpec | FerryError, *, folder: Path, scratch: Path) -> None:
        """Keep what was found for the model in ``folder``; a full disk or a forbidden folder is no error.

        ``scratch`` is a folder on the same file system, where the file is made before it is moved into its place.
        """
        record: dict[str, Any] = {"schema": _SCHEMA, "key": key}
        if isinstance(found, FerryError):
            record["error"] = {"kind": found.kind.value, "message": found.message.replace(str(folder), _FOLDER)}
        else:
            record["spec"] = found.to_json()
        path = self.path_of(key)
        draft = scratch / f"{uuid.uuid4().hex}.detection"
        with suppress(OSError):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                draft.write_text(json.dumps(record), encoding="utf-8")
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
