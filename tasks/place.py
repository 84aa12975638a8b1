"""Places an artifact's files in a folder of the user's."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from onnx_config.errors import InputError
from onnx_config.export.artifact import FERRY_FILE, read_ferry_file
from tasks.disk import FULL, disk_errors

__all__ = ["place", "safe_name"]

_LINKED = (".onnx", ".onnx_data", ".safetensors")
# Lies in an output folder while its files are being replaced; knows which of them are an artifact's.
_REPLACING = ".ferry.json.replacing"
_NAME_BYTES = 120


def place(source: Path, target: Path, names: Sequence[str]) -> Path:
    """Make ``target`` hold the files of an artifact, hard-linked where possible, ``ferry.json`` last.

    A new folder appears whole or not at all. In one that holds an earlier artifact, that artifact's files are
    replaced and ``ferry.json`` is missing meanwhile; files of others stay. What a killed process left half done,
    the next call for the same folder completes.

    Raises:
        InputError: If the folder holds files that are not an artifact's, or cannot be written (``bad_input``).
        TransientError: If the disk is full (``store``).
    """
    if _same(source, target, names):
        return target
    with disk_errors(f"the output folder {str(target)!r}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            return _replace(source, target, names)
        with _aside(target) as aside:
            for name in (*names, FERRY_FILE):
                _link(source / name, aside / name)
            aside.replace(target)
    return target


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Make a folder beside ``target``, removed at the end if it is there still; remove those of killed processes.

    The owner keeps its folder locked, and the kernel drops the lock when the owner dies.
    """
    stem = f".{_cut(target.name, 80)}."
    for left in target.parent.glob(f"{glob.escape(stem)}*.part"):
        with suppress(OSError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = target.with_name(f"{stem}{uuid.uuid4().hex[:8]}.part")
        folder.mkdir()
        with _locked(folder, fcntl.LOCK_EX):
            if not folder.exists():
                continue  # Somebody took it for a leftover in the moment before it was locked.
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _replace(source: Path, target: Path, names: Sequence[str]) -> Path:
    earlier = _files_of_artifact(target)
    if earlier is None:
        what = "holds files that are" if target.is_dir() else "is a file, and"
        raise InputError(
            f"The output folder {str(target)!r} {what} no artifact of onnx-ferry; they would be mixed. "
            "Choose an empty or new folder."
        )
    if foreign := sorted(name for name in set(names) - earlier if (target / name).exists()):
        raise InputError(
            f"The output folder {str(target)!r} holds {foreign[0]!r}, which is no file of the artifact in it and "
            "would be overwritten. Choose an empty or new folder."
        )
    known = earlier | set(names)
    draft = _part_of(target / _REPLACING)
    draft.write_text(json.dumps(sorted(known)), encoding="utf-8")
    draft.replace(target / _REPLACING)
    (target / FERRY_FILE).unlink(missing_ok=True)
    for name in names:
        _put(source / name, target / name)
    for name in known:
        path = target / name
        _part_of(path).unlink(missing_ok=True)
        if name not in names:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # Not empty, or no folder of the artifact's own.
                if path.parent != target:
                    path.parent.rmdir()
    _put(source / FERRY_FILE, target / FERRY_FILE)
    (target / _REPLACING).unlink()
    return target


def _files_of_artifact(target: Path) -> set[str] | None:
    """Return which files of a folder are an artifact's; ``None`` where there is no artifact in it.

    Raises:
        InputError: If its ``ferry.json`` cannot be read.
    """
    try:
        listed = json.loads((target / _REPLACING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = read_ferry_file(target) if target.is_dir() else None
        if record is None:
            return None
        listed = record.get("files", {})
    return {name for name in listed if isinstance(name, str) and _is_inside(name)}


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def _part_of(path: Path) -> Path:
    return path.with_name(f".{_cut(path.name, 200)}.part")


def _put(source: Path, target: Path) -> None:
    """Link or copy one file over another, which is the old or the new one at any moment."""
    part = _part_of(target)
    part.unlink(missing_ok=True)
    _link(source, part)
    part.replace(target)
    # Between two links to one file a rename does nothing.
    part.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Hard-link a graph or its weights; copy what a user may want to edit."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.name.endswith(_LINKED):
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (*FULL, errno.EEXIST):
            raise
        shutil.copyfile(source, target)


def _same(source: Path, target: Path, names: Sequence[str]) -> bool:
    """Return whether ``target`` holds this very artifact: the same ``ferry.json``, every file of its size."""
    try:
        if (target / _REPLACING).exists():
            return False
        if (target / FERRY_FILE).read_bytes() != (source / FERRY_FILE).read_bytes():
            return False
        return all((target / name).stat().st_size == (source / name).stat().st_size for name in names)
    except OSError:
        return False


def safe_name(model_id: str) -> str:
    """Return a folder name for a model id: no separators, no leading dot, at most 120 bytes.

    >>> safe_name("org/name"), safe_name("./models/mine")
    ('org__name', 'mine')
    """
    is_path = model_id.startswith((".", "/", "~")) or model_id.count("/") > 1
    text = Path(model_id).absolute().name if is_path else model_id.replace("/", "__")
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in text).lstrip(".-")
    return _cut(kept, _NAME_BYTES) or "model"


def _cut(name: str, limit_bytes: int) -> str:
    """Return the start of ``name`` that a file system takes, which counts bytes and not characters."""
    return name.encode(errors="replace")[:limit_bytes].decode(errors="ignore")
